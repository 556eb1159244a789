"""Tune a small real Llama 4 on this machine, and see that it learned something.

The model is `mini-maverick`: 16 experts a mixture, streamed from a 4-bit store, like its giant
namesake. It learns to answer a function's help text with one line of JSON, on Python's own
docstrings, and is judged on modules that it never saw. `make demo` runs this; it takes a few
minutes on two cores, writes to `demo/` and can be run again.

Exit 0 if what it learned is as much as it should be, 1 if it isn't or the machine says no.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from make_dataset import KEYS, make_dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lamina
from lamina.cli.display import TuneDisplay
from lamina.cli.quiet import quiet
from lamina.cli.terminal import byte_progress, duration, show_error, size

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "mini-maverick"
#: What the recipe doesn't say: short rows, so small steps; a task soon learned, so few of them.
OVERRIDES = [
    "target_modules=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    "tokens_per_step=1024",
    "max_length=512",
    "max_steps=24",
    "warmup_steps=2",
    "learning_rate=1e-3",
]
#: The longest right answer has 70. A model that hasn't learned to end one talks on.
MAX_NEW_TOKENS = 80
#: The shares of right answers that make the demo fail.
MOST_BEFORE, LEAST_AFTER = 0.10, 0.80

FOLDER = Path("demo")


@dataclass(frozen=True)
class Exam:
    """The held-out questions, and what is right."""

    questions: list[list[dict[str, str]]]
    answers: list[str]

    @classmethod
    def read(cls, file: Path) -> Exam:
        """From a chat JSONL file: the last message of each row is the answer."""
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line)["messages"] for line in lines]
        return cls([row[:-1] for row in rows], [row[-1]["content"] for row in rows])

    def right(self, given: Sequence[str]) -> list[bool]:
        """Which answers are right."""
        return [is_right(a, wanted) for a, wanted in zip(given, self.answers, strict=True)]


def is_right(given: str, wanted: str) -> bool:
    """Whether an answer is JSON with exactly the keys, and the right module, name and signature.

    The summary is free: there is more than one good one.
    """
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict) or found.keys() != set(KEYS):
        return False
    truth = json.loads(wanted)
    return all(found[key] == truth[key] for key in KEYS if key != "summary")


def ask(run_or_model: Path, exam: Exam, out: Console) -> list[str]:
    """The answers to all questions, decoded side by side, and a line on how fast that was."""
    waiting: AbstractContextManager[Any] = nullcontext()
    if out.is_terminal:
        waiting = out.status(f"answering {len(exam.questions)} questions")
    with waiting, lamina.Generator(run_or_model) as generator:
        answers = generator.generate(exam.questions, max_new_tokens=MAX_NEW_TOKENS)
        stats = generator.stats
    say(out, f"{stats.tokens:,} tokens written in {duration(stats.seconds)}")
    return [answer.text for answer in answers]


def say(out: Console, text: str, *, title: str = "") -> None:
    """A line of the story; one with a title begins a chapter."""
    if title:
        out.print(f"\n[bold]{title:<9}[/bold]", end="")
        out.print(text, markup=False, soft_wrap=True)
    else:
        out.print(f"         {text}", markup=False, soft_wrap=True)


def main() -> int:
    """The demo.

    Returns:
        the exit code.
    """
    quiet()
    out = Console(highlight=False)
    begun = time.monotonic()
    out.print("[bold]Lamina[/bold]: a small real Llama 4, tuned on this machine.")

    # 1. Data that every machine with Python has.
    counts = make_dataset(FOLDER / "data")
    train, held_out = FOLDER / "data" / "train.jsonl", FOLDER / "data" / "held-out.jsonl"
    say(
        out,
        f"{counts['train']:,} functions of {counts['train_modules']} modules, by their help text; "
        f"{counts['held_out']} of {counts['held_out_modules']} other modules are held out",
        title="Data",
    )

    # 2. The model, in 4 bits. Once: later runs find it.
    recipe = lamina.load_recipe(MODEL, OVERRIDES)
    with byte_progress(MODEL) as progress:
        store = lamina.prepare(recipe.model, codec=recipe.codec, progress=progress)
    disk = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    say(out, f"{MODEL}, {size(disk)} in {recipe.codec}: {store.path}", title="Model")

    # 3. What it answers untuned.
    exam = Exam.read(held_out)
    say(out, f"{len(exam.questions)} held-out functions to describe in JSON", title="Before")
    before = ask(store.path, exam, out)

    # 4. Tuning.
    run = FOLDER / "run"
    if (run / "recipe.yaml").exists():  # of an earlier demo
        shutil.rmtree(run)
    say(
        out,
        f"LoRA of rank {recipe.r}, {recipe.max_steps} steps of {recipe.tokens_per_step:,} tokens",
        title="Tuning",
    )
    with TuneDisplay(MODEL) as display:
        summary = lamina.tune(
            recipe,
            data=[train],
            eval_data=[held_out],
            out=run,
            on_event=display,
            progress=display.progress,
        )
    if summary.interrupted:
        return 130
    say(
        out,
        f"{summary.tokens:,} tokens in {duration(summary.seconds)}: "
        f"{summary.tokens / summary.seconds:,.0f} tokens/s, {size(summary.store_bytes_read)} of "
        f"weights read, at most {size(summary.peak_memory_bytes)} of memory",
    )

    # 5. What it answers now.
    say(out, "the same questions", title="After")
    after = ask(summary.run, exam, out)

    # 6. What came of it.
    was, now = exam.right(before), exam.right(after)
    out.print()
    out.print(_results(was, now, summary))
    for place in _examples(was, now):
        _show(out, exam, before, after, place)
    say(out, f"{summary.run / 'adapter'}, in PEFT's format", title="Adapter")
    say(out, f"lamina chat {summary.run}", title="Try it")
    say(out, f"{duration(time.monotonic() - begun)} in all")
    return _verdict(_share(was), _share(now))


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right)


def _results(was: Sequence[bool], now: Sequence[bool], summary: lamina.RunSummary) -> Table:
    table = Table("on modules never seen", box=None, padding=(0, 3, 0, 0))
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    table.add_row(
        "held-out loss", f"{summary.eval_loss_before:.3f}", f"{summary.eval_loss_after:.3f}"
    )
    table.add_row("valid JSON, right signature", f"{_share(was):.0%}", f"{_share(now):.0%}")
    return table


def _examples(was: Sequence[bool], now: Sequence[bool]) -> list[int]:
    """Three questions to show: a failure among them, if there is one, since it tells more."""
    wrong = [i for i, right in enumerate(now) if not right]
    right = [i for i, right in enumerate(now) if right]
    return [*right[: 3 - len(wrong[:1])], *wrong[:1]]


def _show(out: Console, exam: Exam, before: Sequence[str], after: Sequence[str], i: int) -> None:
    """One question with both answers."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    question = exam.questions[i][-1]["content"]
    first = " ".join(before[i].split())
    mark = "" if is_right(after[i], exam.answers[i]) else "  (wrong)"
    table.add_row("asked", Text(question.split("\n\n")[0]))
    table.add_row("before", Text(first if len(first) <= 160 else first[:157] + "..."))
    table.add_row("after", Text(after[i] + mark))
    out.print()
    out.print(table)


def _verdict(before: float, after: float) -> int:
    """The exit code, and a plain message if the demo didn't show what it should."""
    problems = []
    if before > MOST_BEFORE:
        problems.append(f"{before:.0%} were right before tuning, where {MOST_BEFORE:.0%} may be")
    if after < LEAST_AFTER:
        problems.append(f"{after:.0%} are right after tuning, where {LEAST_AFTER:.0%} should be")
    if problems:
        show_error(lamina.LaminaError("the demo didn't show what it should", problems=problems))
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except lamina.LaminaError as error:
        show_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
