"""What `target_modules` means: PEFT's rule, and how it reaches routed experts.

Names in, yes or no out, so that a plan can ask without a model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Every linear and the routed experts, but not the router.
ALL_LINEAR = "all-linear"


def matches(module: str, targets: Sequence[str]) -> bool:
    """Whether a matrix of that module name is adapted: a target is its name or the end of it."""
    return ALL_LINEAR in targets or any(
        module == target or module.endswith(f".{target}") for target in targets
    )


def matches_experts(experts: str, projection: str, targets: Sequence[str]) -> bool:
    """Whether a projection of routed experts is. They are targeted by names that say so, as
    `down_proj` alone would in PEFT match modules but no expert parameters.

    Args:
        experts: the name of the module that holds the stacked parameters.
        projection: `gate_up_proj` or `down_proj`.
    """
    named = [target for target in targets if target not in ("gate_up_proj", "down_proj")]
    return (
        matches(f"{experts}.{projection}", named)
        or matches(experts, named)
        # Nothing but experts has a projection of this name.
        or (projection == "gate_up_proj" and projection in targets)
    )
