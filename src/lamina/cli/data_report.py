"""What the `lamina data` commands say: findings, figures and accounts, for people and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from lamina.data.check import Report
    from lamina.data.detect import Column, Detection
    from lamina.data.formats import Input
    from lamina.data.stats import Bin, Stats

__all__ = [
    "account",
    "as_plain",
    "colours",
    "print_detection",
    "print_report",
    "print_stats",
    "report_json",
    "rows",
    "stdout",
    "title",
]

_CONTAINERS = {
    "jsonl": "JSON lines",
    "json": "JSON",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "text": "plain text",
    "saved-dataset": "a saved dataset",
    "hub": "a dataset on the hub",
}
_SEVERITIES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
_BAR = 40

#: Rejected rows that are looked at for an example of each mistake.
_LOOK = 100_000


def stdout() -> Console:
    """rich's console on stdout: colours on a terminal, plain text in a pipe or under NO_COLOR."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def colours(out: Console) -> bool:
    """Whether colours can be told apart there."""
    return out.is_terminal and out.color_system is not None and not out.no_color


def rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def title(data: Input) -> str:
    """The files, in few words."""
    first, more = data.sources[0].name, len(data.sources) - 1
    if not more:
        return first
    return f"{first} and {more} other file{'s' if more > 1 else ''}"


def as_plain(value: Any) -> Any:
    """A result as what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _table(lines: Iterable[tuple[str, str]], indent: str = "") -> str:
    return "".join(f"{indent}{name:<14} {value}".rstrip() + "\n" for name, value in lines)


# -- detect ---------------------------------------------------------------------------------------


def print_detection(found: Detection) -> None:
    """What a file was found to be, why, how sure that is, and what could be meant otherwise."""
    from rich.text import Text

    out = stdout()
    style = {"certain": "bold green", "likely": "bold yellow"}.get(found.confidence, "bold red")
    what = f"{found.title} ({found.shape})" if found.shape else "no known format"
    out.print(Text(found.name, style="bold"))
    sure = Text("  ") + Text(f"{'format':<14} ") + Text(what) + Text(", ")
    out.print(sure + Text(found.confidence, style=style))
    kind = _CONTAINERS[found.container]
    if found.compression != "none":
        kind += f", {found.compression}"
    lines = [("container", kind), ("looked at", rows(found.rows))]
    lines += _named("because", found.reasons)
    lines += _named("columns", [_about(column, found.rows) for column in found.columns])
    lines += _named("ambiguous", found.ambiguous)
    lines += _named("unreadable", found.problems)
    out.print(_table(lines, "  "), end="")


def _named(name: str, values: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Lines of which the first is named."""
    return ((name if number == 0 else "", value) for number, value in enumerate(values))


def _about(column: Column, looked_at: int) -> str:
    # A name is data: it must not drive the terminal.
    name = column.name if column.name.isprintable() else repr(column.name)
    return f"{name}: {_types(column.types, looked_at)}{'' if column.used else ', not used'}"


def _types(types: Counter[str], looked_at: int) -> str:
    """`a string`, or with how many rows have it where not all do."""
    if len(types) == 1 and types.total() == looked_at:
        return next(iter(types))
    return ", ".join(f"{kind} in {rows(count)}" for kind, count in types.most_common())


# -- check ----------------------------------------------------------------------------------------


def report_json(report: Report) -> dict[str, Any]:
    return {"ok": report.ok, **as_plain(report)}


def print_report(name: str, report: Report) -> None:
    """Every finding: how many rows, the first of them, what to do."""
    from rich.text import Text

    out = stdout()
    for finding in report.findings:
        style = _SEVERITIES[finding.severity]
        about = f" {finding.code}: {finding.title} ({finding.count:,})"
        out.print(Text.assemble((finding.severity, style), about))
        shown = _different(finding.first)
        for sentence in shown:
            out.print(Text(f"    {sentence}"))
        if shown and finding.count > len(shown):
            out.print(Text(f"    ... and {finding.count - len(shown):,} more."))
        out.print(Text.assemble(("    do: ", "cyan"), finding.advice))
        out.print()
    out.print(Text(_verdict(name, report), style="bold"))


def _different(sentences: Sequence[str]) -> list[str]:
    """Those that say more than another place for the same thing."""
    said: dict[str, str] = {}
    for sentence in sentences:
        said.setdefault(sentence.partition(" ")[2], sentence)
    return list(said.values())


def _verdict(name: str, report: Report) -> str:
    number = Counter(finding.severity for finding in report.findings)
    kinds = [
        f"{number[severity]} {severity}{'s' if number[severity] != 1 else ''}"
        for severity in ("error", "warning", "note")
        if number[severity]
    ]
    verdict = ", ".join([f"{name}: {rows(report.rows)}", *kinds])
    if report.bad_rows:
        return f"{verdict}. {rows(report.bad_rows)} can't be trained on."
    return f"{verdict}. Nothing that stops a run." if report.ok else f"{verdict}."


# -- stats ----------------------------------------------------------------------------------------


def print_stats(
    name: str, found: Stats, *, max_length: int | None, policy: str, tokens_per_step: int | None
) -> None:
    """Figures with a histogram of lengths."""
    out = stdout()
    out.print(name, style="bold")
    q = found.lengths
    lines = [("rows", f"{found.rows:,}")]
    if found.unusable:
        lines[0] = ("rows", f"{found.rows:,}, {found.unusable.total():,} of them unusable")
        lines += _named("unusable", [f"{n:,} {code}" for code, n in found.unusable.most_common()])
    lines += _named("formats", [f"{n:,} {shape}" for shape, n in found.shapes.most_common()])
    if found.roles:
        roles = ", ".join(f"{n:,} {role}" for role, n in found.roles.most_common())
        lines.append(("turns", roles))
        turns = found.turns
        lines.append(("turns a row", f"{turns.minimum} to {turns.maximum}, median {turns.median}"))
    several = f", several of {rows(found.several)}" if found.several else ""
    lines.append(("samples", f"{found.samples:,}{several}"))
    share = f"{found.num_loss_tokens:,} ({found.loss_share:.0%}) learned"
    lines.append(("tokens", f"{found.num_tokens:,}, {share}"))
    if found.samples:
        lines.append(
            (
                "a sample",
                f"{q.minimum:,} to {q.maximum:,} tokens, mean {q.mean:,.0f}, median {q.median:,}, "
                f"95% up to {q.p95:,}, 99% up to {q.p99:,}",
            )
        )
    out.print(_table(lines, "  "), end="")
    if found.histogram:
        out.print("\n".join(["", "tokens a sample", *_bars(found.histogram)]))
    if found.longest:
        longest = (f"  {long.num_tokens:>9,}  {long.place}" for long in found.longest)
        out.print("\n".join(["", "longest rows", *longest]))
    if max_length is not None:
        out.print("\n" + "\n".join(_limits(found, max_length, policy, tokens_per_step)), end="\n")


def _bars(bins: Sequence[Bin]) -> Iterator[str]:
    most = max(bin.count for bin in bins)
    wide = len(f"{bins[-1].high:,}")
    for bin in bins:
        bar = "█" * max(round(_BAR * bin.count / most), bool(bin.count))
        yield f"  {bin.low:>{wide},} - {bin.high:>{wide},}  {f'{bar} {bin.count:,}'.lstrip()}"


def _limits(
    found: Stats, max_length: int, policy: str, tokens_per_step: int | None
) -> Iterator[str]:
    yield f"with at most {max_length:,} tokens a sample (longer ones: {policy})"
    if found.too_long:
        done = [
            f"{count:,} {what}"
            for count, what in ((found.dropped, "dropped"), (found.shortened, "shortened"))
            if count
        ]
        yield f"  {rows(found.too_long)} too long: {', '.join(done)}"
    else:
        yield "  no row is too long"
    yield f"  {found.kept_tokens:,} tokens remain"
    if tokens_per_step is None:
        return
    if found.steps_per_epoch is not None:
        steps = f"{found.steps_per_epoch:,} step{'s' if found.steps_per_epoch != 1 else ''}"
        yield f"  {steps} an epoch, of up to {tokens_per_step:,} tokens each"
    elif found.kept_tokens:
        yield f"  a step of {tokens_per_step:,} tokens can't hold the longest sample"


# -- accounts -------------------------------------------------------------------------------------


def account(
    lines: Sequence[tuple[int, str]],
    rejected: int,
    rejected_file: Path | None,
    reasons: Mapping[str, int] | None = None,
) -> str:
    """Where every row went: numbers under each other, then why rows were rejected.

    Args:
        lines: numbers, each with what it counts.
        rejected: how many rows were, and `rejected_file`, where they are.
        reasons: how many of them for each kind of mistake, by its code.
    """
    if rejected_file is None:
        reasons, examples = {}, {}
    else:
        lines = [*lines, (rejected, f"rejected, in {rejected_file}")]
        reasons = reasons or {}
        examples = _examples(rejected_file, len(reasons))
    wide = max(len(f"{count:,}") for count, _ in lines)
    text = "".join(f"{count:>{wide},} {what}\n" for count, what in lines)
    for code, count in sorted(reasons.items(), key=lambda item: -item[1]):
        text += f"{'':>{wide}}   {count:,} {code}: {examples.get(code, '')}\n"
    return text


def _examples(rejected_file: Path, codes: int) -> dict[str, str]:
    """The first rejected row of each code, as a sentence."""
    found: dict[str, str] = {}
    with rejected_file.open("rb") as file:
        for line in islice(file, _LOOK):
            entry = json.loads(line)
            found.setdefault(entry["code"], f"{entry['file']}:{entry['line']} {entry['reason']}.")
            if len(found) >= codes:
                break
    return found
