"""A whole run from a plan: its steps and hours, what they cost, and what a smaller step would."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lamina.plan.plan import Plan
from lamina.plan.sample import DataSize
from lamina.plan.search import at_tokens

__all__ = ["FEW_STEPS", "Prices", "RunEstimate", "Smaller", "estimate_run"]

#: Below so many updates an epoch, the size of a step starts to cost learning.
FEW_STEPS = 50


@dataclass(frozen=True, slots=True)
class Prices:
    """What time costs, in the user's money.

    Args:
        kwh: of electricity.
        hour: of a rented machine, or None.
        watts: what the machine draws.
    """

    kwh: float
    hour: float | None
    watts: float


@dataclass(frozen=True, slots=True)
class Smaller:
    """A run with a smaller step: `FEW_STEPS` updates an epoch, or as many as there can be."""

    tokens_per_step: int
    steps_per_epoch: int
    hours: float


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """A run over the user's data. All of it is estimated.

    Args:
        steps_per_epoch, steps: optimizer steps.
        energy: kWh.
        smaller: a smaller step, where there are fewer than `FEW_STEPS` an epoch.
    """

    data: DataSize
    steps_per_epoch: int
    steps: int
    hours: float
    energy: float
    electricity: float
    rent: float | None
    smaller: Smaller | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": self.data.rows,
            "sampled_rows": self.data.sampled,
            "tokenized": self.data.tokenized,
            "tokens": self.data.tokens,
            "too_long_share": self.data.too_long,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
            "hours": self.hours,
            "energy_kwh": self.energy,
            "electricity_cost": self.electricity,
            "rental_cost": self.rent,
            "smaller_steps": asdict(self.smaller) if self.smaller else None,
        }


def estimate_run(plan: Plan, data: DataSize, prices: Prices) -> RunEstimate:
    """Steps, hours and costs of a run of the plan over the data."""
    recipe = plan.recipe
    per_epoch = data.steps(recipe.tokens_per_step)
    steps = recipe.max_steps or per_epoch * recipe.epochs
    hours = _hours(plan, data, per_epoch) * steps / per_epoch
    smaller = None
    if per_epoch < FEW_STEPS:
        tokens = max(recipe.max_length, data.tokens // FEW_STEPS // 256 * 256)
        if tokens < recipe.tokens_per_step:
            number = data.steps(tokens)
            smaller = Smaller(tokens, number, _hours(plan, data, number) * steps / per_epoch)
    energy = hours * prices.watts / 1000
    return RunEstimate(
        data=data,
        steps_per_epoch=per_epoch,
        steps=steps,
        hours=hours,
        energy=energy,
        electricity=energy * prices.kwh,
        rent=None if prices.hour is None else hours * prices.hour,
        smaller=smaller,
    )


def _hours(plan: Plan, data: DataSize, steps: int) -> float:
    """Of an epoch in so many steps. The last step is as full as what is left, and none is quite
    full: they take what their mean takes."""
    (time,) = at_tokens(plan, [max(1, data.tokens // steps)])
    return steps * time.seconds / 3600
