"""`lamina chat`: a conversation, turn by turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from lamina.cli.generate import speed, write
from lamina.cli.inputs import run_or_model
from lamina.cli.options import (
    Adapter,
    MaxNewTokens,
    RunOrModel,
    Seed,
    System,
    Temperature,
    TopP,
)
from lamina.cli.terminal import byte_progress, note, show_error
from lamina.errors import LaminaError

__all__ = ["chat"]

_HELP = "/reset begins anew, /exit or Ctrl-D ends"


def chat(
    run: RunOrModel,
    adapter: Adapter = True,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    system: System = None,
) -> None:
    """Talk to a tuned model, or to a model as it is. A line is a turn, typed or piped in."""
    source = run_or_model(run)

    from lamina.evaluate.generate import Generator

    opening = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    with byte_progress(run) as progress:
        opened = Generator(source, adapter=adapter, progress=progress)
    with opened as generator:
        if sys.stdin.isatty():
            note(_HELP, style="dim")
        for line in _lines():
            if line == "/exit":
                break
            if line == "/reset":
                history = list(opening)
                note("a new conversation", style="dim")
                continue
            if line.startswith("/") and " " not in line:
                note(f"{line}: there is no such command; {_HELP}")
                continue
            turn = [*history, {"role": "user", "content": line}]
            try:
                (answer,) = generator.generate(
                    [turn],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed + len(history),
                    on_token=lambda _, text: write(text),
                )
            except LaminaError as error:  # a turn that doesn't fit ends the turn, not the talk
                show_error(error)
                continue
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                note("\n(cut off; the turn is forgotten)", style="dim")
                continue
            write("\n")
            note(speed(generator), style="dim")
            history = [*turn, {"role": "assistant", "content": answer.text}]


def _lines() -> Iterator[str]:
    """The lines that aren't blank, until the input ends."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() its line editing)
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            if sys.stdin.isatty():
                note("")
            return
        if line.strip():
            yield line.strip()
