"""Optimizers with quantized states: their memory, that they learn, that schedules reach them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lamina.optim import Optim, make_optimizer, make_scheduler

SHAPE = (128, 64)


def optimizer_for(parameter: nn.Parameter, optim: Optim, learning_rate: float = 0.05) -> Any:
    return make_optimizer(
        [parameter],
        optim=optim,
        learning_rate=learning_rate,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.0,
    )


def state_bytes(optimizer: Any) -> int:
    """Bytes of all states of the only parameter, those inside quantized tensors included."""
    total = 0
    for value in next(iter(optimizer.state.values())).values():
        if not isinstance(value, torch.Tensor):
            continue
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            total += sum(getattr(value, name).nbytes for name in names)
        else:
            total += value.nbytes
    return total


@pytest.mark.parametrize(
    ("optim", "bits", "most_error"),
    [("adamw", 32.0, 0.05), ("adamw_8bit", 8.0, 0.05), ("adamw_4bit", 4.0, 0.3)],
)
def test_states_take_their_bits_and_learn(optim: Optim, bits: float, most_error: float) -> None:
    torch.manual_seed(0)
    target = torch.randn(SHAPE)
    parameter = nn.Parameter(torch.zeros(SHAPE))
    optimizer = optimizer_for(parameter, optim)
    scheduler = make_scheduler(optimizer, scheduler_type="linear", warmup_steps=0, total_steps=100)
    for _ in range(100):
        parameter.grad = (parameter.detach() - target) / target.numel()
        optimizer.step()
        scheduler.step()
    # The scales and the code books of small blocks come on top.
    assert 2 * bits / 8 <= state_bytes(optimizer) / parameter.numel() < 2 * bits / 8 * 1.4
    # It was 1. Four bits overshoot where gradients have no noise.
    assert float((parameter.detach() - target).pow(2).mean()) < most_error


def test_a_schedule_reaches_the_four_bit_optimizer() -> None:
    parameter = nn.Parameter(torch.zeros(SHAPE))
    optimizer = optimizer_for(parameter, "adamw_4bit", learning_rate=1.0)
    scheduler = make_scheduler(optimizer, scheduler_type="linear", warmup_steps=0, total_steps=4)
    moved = []
    for _ in range(4):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(SHAPE)
        optimizer.step()
        scheduler.step()
        moved.append(float((before - parameter.detach()).mean()))
    # A constant gradient moves AdamW by the learning rate.
    assert moved == pytest.approx([1.0, 0.75, 0.5, 0.25], rel=0.1)
