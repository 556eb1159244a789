"""Optimizers and learning-rate schedules, from the libraries that keep them well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lamina.errors import LaminaError
from lamina.store.codec import import_bitsandbytes

Optim = Literal["adamw_8bit", "adamw_4bit", "adamw"]
SchedulerType = Literal["cosine", "linear", "constant"]


def make_optimizer(
    parameters: Sequence[nn.Parameter],
    *,
    optim: Optim,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> Optimizer:
    """AdamW with 8-bit states (arXiv 2110.02861, bitsandbytes), with 4-bit states (arXiv
    2309.01507, torchao) or with fp32 states. Tensors under 4,096 elements keep fp32 states in any
    case.

    Raises:
        LaminaError: the library for quantized states can't be imported.
    """
    if optim == "adamw":
        return torch.optim.AdamW(
            parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
        )
    if optim == "adamw_4bit":
        return _adamw_4bit(
            parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
        )
    bitsandbytes = import_bitsandbytes()
    if bitsandbytes is None:
        raise LaminaError(
            "optim=adamw_8bit needs bitsandbytes, which can't be imported",
            hint="Install bitsandbytes, or set optim=adamw for fp32 states.",
        )
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(
        parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
    )
    return optimizer


def _adamw_4bit(parameters: Sequence[nn.Parameter], **settings: Any) -> Optimizer:
    try:
        from torchao.optim import AdamW4bit
    except ImportError as error:
        raise LaminaError(
            "optim=adamw_4bit needs torchao, which can't be imported",
            hint="Install torchao, or set optim=adamw_8bit.",
        ) from error

    class EagerAdamW4bit(AdamW4bit):  # type: ignore[misc]
        """torchao compiles its update for each shape of a parameter: minutes, and a C++ compiler
        that a user may not have, for what takes a percent of a step."""

        def step(self, closure: Callable[[], float] | None = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    optimizer: Optimizer = EagerAdamW4bit(parameters, **settings)
    return optimizer


def make_scheduler(
    optimizer: Optimizer, *, scheduler_type: SchedulerType, warmup_steps: int, total_steps: int
) -> LRScheduler:
    """A linear warm-up, then down to zero (cosine, linear) or constant.

    transformers' schedules of these names, shifted by one: theirs begin at a rate of zero, and a
    step that learns nothing is a minute lost where a step takes a minute.
    """

    def factor(done: int) -> float:
        if done < warmup_steps:
            return (done + 1) / (warmup_steps + 1)
        if scheduler_type == "constant":
            return 1.0
        left = (total_steps - done) / max(1, total_steps - warmup_steps)
        return left if scheduler_type == "linear" else 0.5 * (1 - math.cos(math.pi * left))

    return LambdaLR(optimizer, factor)
