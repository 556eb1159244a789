"""Other plans than the one asked for: what would fit, what hides the reads, what is faster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from lamina.plan.plan import Memory, Plan, make_plan, memory_of, timing_of
from lamina.plan.steptime import Sizes, StepTime
from lamina.recipe.schema import Recipe, choices

__all__ = [
    "LEAST_TOKENS",
    "Variant",
    "at_tokens",
    "faster",
    "hides_reads",
    "least_memory",
    "nearest",
]

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
#: A step whose wait is below this share of it hides its reads.
_HIDDEN = 0.05
#: Keys that change sizes only: a simulation takes many of them side by side.
_SIZES = ("tokens_per_step", "ring", "cache")
#: A further change must be worth this much speed.
_WORTH = 0.95
#: The smallest step that is looked at.
LEAST_TOKENS = 256
#: From most to least of an optimizer's states.
_OPTIMIZERS = ("adamw", "adamw_8bit", "adamw_4bit")


@dataclass(frozen=True)
class Variant:
    """A plan that differs from another in some of the recipe's keys.

    Args:
        changes: the keys with their new values.
    """

    changes: Mapping[str, Any]
    plan: Plan

    @property
    def overrides(self) -> str:
        """As they are typed: `tokens_per_step=8192 cache=12%`."""
        return " ".join(f"{key}={_typed(value)}" for key, value in self.changes.items())


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, list) else str(value)


# --- fitting


def nearest(plan: Plan, limit: int = 3) -> list[Variant]:
    """The plans that fit with the fewest keys changed, or one more, the fastest first; none if not
    even the smallest does."""
    options = _smaller(plan)
    found: list[tuple[StepTime, dict[str, Any]]] = []
    for count in range(1, len(options) + 1):
        done = bool(found)
        fitting: list[dict[str, Any]] = []
        for keys in combinations(options, count):
            if any(set(changes) < set(keys) and _waits_little(time) for time, changes in found):
                continue  # fewer changes are enough, and cost nothing
            among = list(_fitting(plan, keys, [options[key] for key in keys]))
            fitting += _least_changed(among)
        found += zip(_times(plan, fitting), fitting, strict=True)
        if done:
            break
    found.sort(key=lambda pair: -pair[0].tokens_per_second)
    best: dict[frozenset[str], tuple[StepTime, dict[str, Any]]] = {}
    for time, changes in found:
        best.setdefault(frozenset(changes), (time, changes))
    worth = [
        changes
        for keys, (time, changes) in best.items()
        if not any(
            fewer < keys and other.tokens_per_second >= _WORTH * time.tokens_per_second
            for fewer, (other, _) in best.items()
        )
    ]
    return [Variant(changes, _changed(plan, changes)) for changes in worth[:limit]]


def _waits_little(time: StepTime) -> bool:
    return time.waiting <= _HIDDEN * time.seconds


def _times(plan: Plan, many: Sequence[dict[str, Any]]) -> list[StepTime]:
    """The time of each of these changes. Those that only change sizes go through one simulation."""
    groups: dict[tuple[str, ...], list[int]] = {}
    memories = [_memory(plan, changes) for changes in many]
    for i, (changes, memory) in enumerate(zip(many, memories, strict=True)):
        work = (f"{key}={value}" for key, value in changes.items() if key not in _SIZES)
        groups.setdefault((*sorted(work), str(memory.experts_on_host)), []).append(i)
    times: dict[int, StepTime] = {}
    for members in groups.values():
        changes, memory = many[members[0]], memories[members[0]]
        alike = replace(
            plan,
            recipe=_recipe(plan, changes),
            experts_on_host=memory.experts_on_host,
        )
        sizes = [
            Sizes(
                many[i].get("tokens_per_step", plan.tokens_per_step),
                memories[i].ring,
                memories[i].cache,
                memories[i].device_ring,
            )
            for i in members
        ]
        times |= zip(members, timing_of(alike).steps(sizes), strict=True)
    return [times[i] for i in range(len(many))]


def least_memory(plan: Plan) -> Plan:
    """The plan with everything as small as it gets."""
    return _changed(plan, {key: values[-1] for key, values in _smaller(plan).items()})


def _smaller(plan: Plan) -> dict[str, list[Any]]:
    """For each key that memory depends on, smaller values, falling. The keys whose change costs
    least come first."""
    recipe, store = plan.recipe, plan.store_bytes
    shares = {100 * plan.cache / store * part for part in (0.75, 0.5, 0.25, 0.0)}
    left = plan.cache - (plan.ram - plan.budgets.ram)  # what the RAM has room for
    if 0 < left < plan.cache:
        shares.add(100 * left // store)
    tokens = [recipe.tokens_per_step >> n for n in range(1, 8)]
    largest = plan.shape.largest_unit(recipe.codec)
    states = [name for name in _OPTIMIZERS if name in choices("optim")]
    options: dict[str, list[Any]] = {
        "cache": [f"{share:.3g}%" for share in sorted(shares, reverse=True)] if plan.cache else [],
        "group_tokens": [
            n for n in (recipe.group_tokens >> 1, recipe.group_tokens >> 2) if n >= 256
        ],
        "ring": [_mib(n) for n in (plan.ring // 2, plan.ring // 4) if n >= 2 * largest],
        "tokens_per_step": [n for n in tokens if n >= recipe.max_length],
        "optim": states[states.index(recipe.optim) + 1 :],
        "float8_boundaries": [] if recipe.float8_boundaries else [True],
        "r": [n for n in (recipe.r // 2, recipe.r // 4) if n],
        "target_modules": [_ATTENTION] if plan.trained.experts else [],
    }
    return {key: values for key, values in options.items() if values}


def _mib(nbytes: int) -> str:
    return f"{max(1, nbytes >> 20)}MiB"


def _fitting(
    plan: Plan, keys: Sequence[str], values: Sequence[Sequence[Any]]
) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Of all combinations of values, those that fit, with how far down each value is."""
    # If not even the last of each fits, none does.
    last = {key: options[-1] for key, options in zip(keys, values, strict=True)}
    if not _fits(plan, last):
        return
    for steps in product(*(range(len(options)) for options in values)):
        changes = {
            key: options[step] for key, options, step in zip(keys, values, steps, strict=True)
        }
        if _fits(plan, changes):
            yield steps, changes


def _least_changed(
    fitting: Sequence[tuple[tuple[int, ...], dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Those of which no value can be larger."""
    steps = {steps for steps, _ in fitting}
    return [
        changes
        for here, changes in fitting
        if not any(
            (*here[:i], here[i] - 1, *here[i + 1 :]) in steps for i in range(len(here)) if here[i]
        )
    ]


def _recipe(plan: Plan, changes: Mapping[str, Any]) -> Recipe:
    return plan.recipe.model_copy(update=dict(changes))


def _memory(plan: Plan, changes: Mapping[str, Any]) -> Memory:
    return memory_of(
        _recipe(plan, changes),
        plan.shape,
        plan.hardware,
        plan.budgets,
        plan.sequences,
    )


def _fits(plan: Plan, changes: Mapping[str, Any]) -> bool:
    return _memory(plan, changes).fits(plan.budgets)


def _changed(plan: Plan, changes: Mapping[str, Any]) -> Plan:
    return make_plan(
        _recipe(plan, changes),
        plan.shape,
        plan.hardware,
        plan.budgets,
        plan.sequences,
    )


# --- speed


def at_tokens(plan: Plan, tokens: Sequence[int]) -> list[StepTime]:
    """The time of steps of other sizes, with the plan's ring and cache."""
    sizes = [Sizes(n, plan.ring, plan.cache, plan.device_ring) for n in tokens]
    return timing_of(plan).steps(sizes)


def hides_reads(plan: Plan) -> int | None:
    """The fewest tokens a step that hide reads and copies behind the arithmetic, to about a fifth;
    None if a million don't."""
    quarters = [LEAST_TOKENS // 4 * 2**k for k in range(12)]
    grid = [quarter * n for quarter in quarters for n in (4, 5, 6, 7)]
    for time in at_tokens(plan, grid):
        if time.waiting <= _HIDDEN * time.seconds:
            return time.tokens
    return None


def faster(plan: Plan, gain: float = 1.1) -> Variant | None:
    """The fastest plan within the same budgets: over tokens a step, ring, and what the RAM has left
    for the cache; None if it isn't faster by `gain`.

    Of plans about as fast, the one with the fewest tokens is taken: more steps learn more.
    """
    store = plan.store_bytes
    tokens = [plan.tokens_per_step * n // 4 for n in (2, 4, 6, 8, 12, 16, 24, 32)]
    candidates: list[tuple[Sizes, dict[str, Any]]] = []
    for ring, count in product((plan.ring // 2, plan.ring, 2 * plan.ring), tokens):
        if count < plan.recipe.max_length:
            continue
        changes = {"tokens_per_step": count, "ring": _mib(ring), "cache": "0%"}
        memory = _memory(plan, changes)
        if not memory.fits(plan.budgets):
            continue
        used = sum(b.nbytes for b in memory.buffers if b.place == "ram")
        share = min(100, 100 * (plan.budgets.ram - used) // store)
        changes["cache"] = f"{share}%"
        sizes = Sizes(count, memory.ring, share * store // 100, memory.device_ring)
        candidates.append((sizes, changes))
    if not candidates:
        return None
    times = timing_of(plan).steps([sizes for sizes, _ in candidates])
    best = max(time.tokens_per_second for time in times)
    if best < gain * plan.time.tokens_per_second:
        return None
    _, changes = min(
        (
            (time, changes)
            for time, (_, changes) in zip(times, candidates, strict=True)
            if time.tokens_per_second >= 0.97 * best
        ),
        key=lambda one: (one[0].tokens, -one[0].tokens_per_second),
    )
    if changes["tokens_per_step"] == plan.tokens_per_step:
        del changes["tokens_per_step"]
    if changes["ring"] == _mib(plan.ring):
        del changes["ring"]
    return Variant(changes, _changed(plan, changes))
