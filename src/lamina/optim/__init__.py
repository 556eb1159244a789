"""Optimizers and learning-rate schedules, from the libraries that keep them well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lamina.errors import LaminaError

Optim = Literal["adamw_8bit", "adamw"]
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
    """AdamW with 8-bit states (arXiv 2110.02861, bitsandbytes; tensors under 4,096 elements keep
    fp32 states) or with fp32 states.

    Raises:
        LaminaError: 8-bit states are asked for and bitsandbytes can't be imported.
    """
    if optim == "adamw":
        return torch.optim.AdamW(
            parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise LaminaError(
            f"optim=adamw_8bit needs bitsandbytes, which can't be imported: {error}",
            hint="install bitsandbytes, or set optim=adamw for fp32 states",
        ) from error
    optimizer: Optimizer = AdamW8bit(
        parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
    )
    return optimizer


def make_scheduler(
    optimizer: Optimizer, *, scheduler_type: SchedulerType, warmup_steps: int, total_steps: int
) -> LRScheduler:
    """transformers' schedules of these names: a linear warm-up, then down to zero, or constant."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if scheduler_type == "constant" else scheduler_type
    scheduler: LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    return scheduler
