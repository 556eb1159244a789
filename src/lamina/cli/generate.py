"""`lamina generate`: prompts in, answers out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.inputs import run_or_model
from lamina.cli.options import (
    Adapter,
    AsJson,
    MaxNewTokens,
    RunOrModel,
    Seed,
    System,
    Temperature,
    TopP,
)
from lamina.cli.terminal import byte_progress, note, print_json, size
from lamina.errors import UsageError

if TYPE_CHECKING:
    from lamina.evaluate.generate import Generator

__all__ = ["generate", "message_list", "speed", "write"]


def generate(
    run: RunOrModel,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="Without any, one is read from stdin."),
    ] = None,
    adapter: Adapter = True,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    system: System = None,
    as_json: AsJson = False,
) -> None:
    """Answer prompts with a tuned model, or with a model as it is."""
    source = run_or_model(run)
    prompts = prompts or _from_stdin()
    messages = [message_list(prompt, system) for prompt in prompts]

    from lamina.evaluate.generate import Generator

    streaming = len(prompts) == 1 and not as_json
    with byte_progress(run) as progress:
        opened = Generator(source, adapter=adapter, progress=progress)
    with opened as generator:
        completions = generator.generate(
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_token=(lambda _, text: write(text)) if streaming else None,
        )
        spent = speed(generator)
    if as_json:
        print_json(
            [
                {
                    "prompt": prompt,
                    "text": completion.text,
                    "token_ids": list(completion.token_ids),
                    "prompt_tokens": completion.prompt_tokens,
                    "finish_reason": completion.finish_reason,
                }
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
        )
    elif streaming:
        write("\n")
    else:
        write("\n\n".join(completion.text for completion in completions) + "\n")
    note(spent, style="dim")


def message_list(prompt: str, system: str | None) -> list[dict[str, str]]:
    """A conversation with one turn."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": prompt}]


def speed(generator: Generator) -> str:
    """What the answer cost, in a line."""
    stats = generator.stats
    if not stats.tokens_per_second:  # one token is no measure of those that follow
        return f"{size(stats.bytes_read)} read"
    return f"{stats.tokens_per_second:.1f} tokens/s, {size(stats.bytes_per_token)} read a token"


def write(text: str) -> None:
    """Text to stdout, seen at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _from_stdin() -> list[str]:
    """
    Raises:
        UsageError: nobody pipes anything in.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "there is no prompt", hint='Add one in quotes, or pipe it in: echo "Hello" | lamina ...'
        )
    prompt = sys.stdin.read().strip()
    if not prompt:
        raise UsageError("there is no prompt: stdin is empty")
    return [prompt]
