"""What `lamina plan` prints: a page that reads well at 80 columns, or JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lamina.cli.terminal import duration, note, size

if TYPE_CHECKING:
    from lamina.plan.plan import Plan
    from lamina.plan.run import Prices, RunEstimate
    from lamina.plan.search import Variant

__all__ = ["as_dict", "report"]

_PARTS = {
    "matrix": "matrices",
    "attention": "attention core",
    "lora": "adapters",
    "elementwise": "between matrices",
    "decode": "decoding weights",
    "calls": "starting operations",
    "head": "head and loss",
    "update": "optimizer",
}
_LANES = {"compute": "arithmetic", "reads": "reads from disk", "copies": "copies to the GPU"}
_WIDTH = 80


def as_dict(plan: Plan, run: RunEstimate | None) -> dict[str, Any]:
    """All of the page, for JSON."""
    from lamina.plan.search import faster, hides_reads, nearest

    faster_one = faster(plan) if plan.fits else None
    return {
        **plan.to_dict(),
        "hides_reads_from_tokens": hides_reads(plan),
        "disk_bytes": {
            "checkpoint": plan.shape.checkpoint_bytes,
            "store": plan.store_bytes + plan.shape.extra_bytes,
        },
        "would_fit": [_variant(v) for v in ([] if plan.fits else nearest(plan))],
        "faster": _variant(faster_one) if faster_one else None,
        "run": run.to_dict() if run else None,
    }


def _variant(variant: Variant) -> dict[str, Any]:
    return {
        "changes": dict(variant.changes),
        "ram_bytes": variant.plan.ram,
        "vram_bytes": variant.plan.vram,
        "estimated_tokens_per_second": variant.plan.time.tokens_per_second,
    }


def report(name: str, plan: Plan, run: RunEstimate | None, prices: Prices, *, here: bool) -> None:
    """Print the page to stdout.

    Args:
        name: of the recipe.
        here: the plan is for this machine.
    """
    from rich.console import Console

    out = Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False)

    def section(title: str, lines: Iterator[str]) -> None:
        out.print(f"\n{title}", style="bold")
        for line in lines:
            out.print(line)

    out.print(name, style="bold")
    for line in _about(plan):
        out.print(line)
    verdict = "It fits." if plan.fits else "It doesn't fit."
    out.print(f"\n{verdict}", style="bold green" if plan.fits else "bold red")
    for line in _fitting(plan):
        out.print(line)
    section("Memory", _memory(plan))
    section("A step, estimated", _time(plan))
    section("Disk", _disk(plan))
    if run is not None:
        section("The run, estimated", _run(plan, run, prices))
    if here and plan.hardware.measured is None:
        note("hint: rates are assumed; `lamina doctor` measures this machine in under a minute")


def _pair(name: str, value: str) -> str:
    """A name and what is said of it, continued below itself where it is long."""
    import textwrap

    lines = textwrap.wrap(value, _WIDTH - 22) or [""]
    return "\n".join(f"{name if i == 0 else '':<21} {line}" for i, line in enumerate(lines))


def _about(plan: Plan) -> Iterator[str]:
    recipe, here = plan.recipe, plan.hardware
    yield _pair("model", recipe.model)
    total, trained = _count(plan.shape.parameters), _count(plan.trained.all)
    yield _pair("parameters", f"{total}, {trained} trained")
    gpu = f", {size(here.vram)} of GPU memory" if here.device == "cuda" else ""
    yield _pair("machine", f"{here.name}{gpu}, {size(here.ram)} of RAM")
    disk = "" if here.disk_measured else ", assumed"
    if here.measured:
        rates = f"measured by `lamina doctor` on {here.measured[:10]}"
    else:
        rates = "assumed from data sheets" if here.device == "cuda" else "assumed for a processor"
    yield _pair("rates", f"{rates}; disk {size(here.disk)}/s{disk}")


def _fitting(plan: Plan) -> Iterator[str]:
    import textwrap

    from lamina.plan.search import faster, least_memory, nearest

    if plan.fits:
        better = faster(plan)
        if better is not None:
            yield "Faster on the same machine:"
            yield _described(better)
        return
    for problem in plan.problems:
        yield textwrap.fill(f"- {problem}", _WIDTH, subsequent_indent="  ")
    variants = nearest(plan)
    if variants:
        yield "It would fit with any of these:"
        for variant in variants:
            yield _described(variant)
        return
    least = least_memory(plan)
    gpu = f" and {size(least.vram)} of GPU memory" if plan.hardware.device == "cuda" else ""
    yield f"Even with everything as small as it gets it takes {size(least.ram)} of RAM{gpu}."


def _described(variant: Variant) -> str:
    import textwrap

    speed = f"{variant.plan.time.tokens_per_second:,.0f} tokens/s"
    first, rest = f"  {speed:>15}  ", " " * 19
    return textwrap.fill(
        variant.overrides,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _memory(plan: Plan) -> Iterator[str]:
    cuda = plan.hardware.device == "cuda"
    for place, title, used, budget in (
        ("vram", "GPU memory", plan.vram, plan.budgets.vram),
        ("ram", "RAM", plan.ram, plan.budgets.ram),
    ):
        if place == "vram" and not cuda:
            continue
        held = sorted((b for b in plan.buffers if b.place == place), key=lambda b: -b.nbytes)
        for buffer in held:
            if buffer.nbytes:
                yield f"{buffer.name:<21} {size(buffer.nbytes):>9}  {buffer.what}"
        yield f"{title:<21} {size(used):>9}  of {size(budget or 0)} that may be used"
        if place == "vram":
            yield ""


def _time(plan: Plan) -> Iterator[str]:
    from lamina.plan.search import LEAST_TOKENS, hides_reads

    time = plan.time
    if not plan.fits:
        yield "(as if it fitted)"
    yield _pair(
        "speed",
        f"{time.tokens_per_second:,.0f} tokens/s: {_seconds(time.seconds)} for a step of "
        f"{time.tokens:,} tokens",
    )
    parts = {title: getattr(time, part) for part, title in _PARTS.items()}
    parts["waiting for weights"] = time.waiting
    for title, seconds in parts.items():
        if seconds >= 0.005 * time.seconds:
            yield f"  {title:<19} {_seconds(seconds):>9} {seconds / time.seconds:>5.0%}"
    behind = [f"reads take {_seconds(time.reads)}"]
    if plan.hardware.device == "cuda":
        behind.append(f"copies to the GPU {_seconds(time.copies)}")
    yield _pair(
        "what binds",
        f"{_LANES[time.binds]}; {' and '.join(behind)} beside {_seconds(time.busy)} of arithmetic",
    )
    hidden = hides_reads(plan)
    yield _pair(
        "reads are hidden",
        "by no step of up to a million tokens"
        if hidden is None
        else f"from {hidden:,} tokens a step on"
        if hidden > LEAST_TOKENS
        else "at any size",
    )


def _disk(plan: Plan) -> Iterator[str]:
    checkpoint = plan.shape.checkpoint_bytes
    store = plan.store_bytes + plan.shape.extra_bytes
    yield _pair("the checkpoint", f"{size(checkpoint)} in bf16, before `lamina prepare`")
    yield _pair("the store", f"{size(store)} ({plan.recipe.codec}), which is all that tuning reads")
    yield _pair("read in a step", size(plan.time.bytes_read))


def _run(plan: Plan, run: RunEstimate, prices: Prices) -> Iterator[str]:
    from lamina.plan.run import FEW_STEPS

    data = run.data
    how = "tokenized" if data.tokenized else "taken for 4 characters a token (no tokenizer here)"
    rows = "all of them" if data.sampled == data.rows else f"{data.sampled:,} of them"
    yield _pair("data", f"{data.rows:,} rows, {_count(data.tokens)} tokens ({rows} {how})")
    if data.too_long:
        what = {"drop": "left out", "truncate": "cut", "split": "split"}[plan.recipe.too_long]
        yield _pair("too long", f"{data.too_long:.1%} of them, which are {what}")
    yield _pair("steps", f"{run.steps:,} ({run.steps_per_epoch:,} an epoch)")
    if run.steps_per_epoch < FEW_STEPS:
        few = f"few steps an epoch ({run.steps_per_epoch}): large steps starve small data."
        if run.smaller is not None:
            few += (
                f" tokens_per_step={run.smaller.tokens_per_step} gives "
                f"{run.smaller.steps_per_epoch} and takes {duration(run.smaller.hours * 3600)}."
            )
        yield _pair("  warning", few)
    yield _pair("time", duration(run.hours * 3600))
    yield _pair(
        "electricity",
        f"{run.energy:,.2f} kWh at {prices.watts:.0f} W: {run.electricity:,.2f}, at "
        f"{prices.kwh:.2f} a kWh",
    )
    if run.rent is not None and prices.hour is not None:
        yield _pair("rent", f"{run.rent:,.2f}, at {prices.hour:.2f} an hour")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def _count(number: int) -> str:
    """`1.7B`, `25.2M`, `940`."""
    for unit, scale in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:.{0 if number >= 100 * scale else 1}f}{unit}"
    return str(number)
