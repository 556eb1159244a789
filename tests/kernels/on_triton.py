"""The Triton kernels against their references: interpreted on a CPU, or on a GPU.

Not collected by itself: Triton must be told to interpret before anything imports it, so
`test_on_triton.py` runs this file in processes of their own.
"""

from __future__ import annotations

import os

import pytest
import torch
from tests.kernels.weights import distance, random_rows, random_weight

from lamina.kernels import products
from lamina.kernels.nf4 import (
    Groups,
    Nf4,
    reference_dequantize,
    reference_input_grad,
    reference_linear,
)
from lamina.kernels.triton_nf4 import INTERPRETED, Tiles, decode, product
from lamina.store.codec import encode, nf4_decode_reference

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

#: Rounding of the result; the weights are rounded alike in the reference. On a GPU one weight in
#: 500 is rounded the other way.
CLOSE = {torch.bfloat16: 3e-3, torch.float32: 1e-6}
BOTH = {False: reference_linear, True: reference_input_grad}

SHAPES = [
    (1, 8, 8),
    (3, 64, 64),
    (0, 32, 64),
    (33, 48, 128),
    (70, 40, 72),  # blocks run on from row to row
    (17, 50, 96),
    (12, 7, 64),
    (19, 64, 7),  # rows end inside a byte
    (5, 66, 34),
]
TILES = [
    Tiles(16, 32, 64, swizzle=1, stages=2),
    Tiles(32, 64, 32, swizzle=2, stages=2),
    Tiles(16, 16, 128, swizzle=3, stages=2),
]
COUNTS = [(5, 0, 17, 33), (0, 0, 0, 0), (0, 40, 0, 0), (1, 1, 1, 1), (16, 16, 16, 16), (0, 0, 0, 9)]

dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=["bf16", "fp32"])
directions = pytest.mark.parametrize("gradient", BOTH, ids=["linear", "input_grad"])


def test_where_the_kernels_run() -> None:
    assert (DEVICE == "cpu") == INTERPRETED
    assert products.fused_runs_on(torch.device(DEVICE))


@dtypes
@directions
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product(shape: tuple[int, int, int], gradient: bool, dtype: torch.dtype) -> None:
    rows, out_features, in_features = shape
    weight = random_weight(out_features, in_features, device=DEVICE)
    x = random_rows(rows, out_features if gradient else in_features, dtype, device=DEVICE)
    compute = products.input_grad if gradient else products.linear

    y = compute(x, weight, way="fused")

    expected = BOTH[gradient](x, weight)
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    assert distance(y, expected) < CLOSE[dtype]


@directions
@pytest.mark.parametrize("tiles", TILES, ids=lambda tiles: f"{tiles.rows}x{tiles.columns}")
@pytest.mark.parametrize("shape", [(37, 40, 136), (20, 24, 33)])
def test_any_tiles(shape: tuple[int, int, int], tiles: Tiles, gradient: bool) -> None:
    rows, out_features, in_features = shape
    weight = random_weight(out_features, in_features, device=DEVICE)
    x = random_rows(rows, out_features if gradient else in_features, torch.bfloat16, device=DEVICE)
    # Poisoned, so that what isn't written is seen.
    columns = in_features if gradient else out_features
    y = torch.full((rows, columns), torch.nan, dtype=torch.bfloat16, device=DEVICE)

    product(x, weight, None, y, gradient=gradient, tiles=tiles)

    assert distance(y, BOTH[gradient](x, weight)) < CLOSE[torch.bfloat16]


@dtypes
@directions
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_at_once(counts: tuple[int, ...], gradient: bool, dtype: torch.dtype) -> None:
    # 64 bytes apart, as they lie in a stretch of a store.
    weight = random_weight(48, 64, len(counts), apart=64, device=DEVICE)
    groups = Groups.of(counts, DEVICE)
    x = random_rows(sum(counts), 48 if gradient else 64, dtype, device=DEVICE)
    compute = products.input_grad if gradient else products.linear

    y = compute(x, weight, groups, way="fused")

    assert distance(y, BOTH[gradient](x, weight, groups)) < CLOSE[dtype]


def test_experts_whose_codes_lie_at_odd_places() -> None:
    weight = random_weight(16, 64, 3, apart=2, device=DEVICE)
    groups = Groups.of((4, 0, 6), DEVICE)
    x = random_rows(10, 64, torch.bfloat16, device=DEVICE)

    y = products.linear(x, weight, groups, way="fused")

    assert distance(y, reference_linear(x, weight, groups)) < CLOSE[torch.bfloat16]


def test_rows_and_results_inside_larger_tensors() -> None:
    weight = random_weight(32, 64, device=DEVICE)
    wide = random_rows(9, 160, torch.bfloat16, device=DEVICE)
    whole = torch.zeros(9, 80, dtype=torch.bfloat16, device=DEVICE)

    y = products.linear(wide[:, 64:128], weight, out=whole[:, 16:48], way="fused")

    assert distance(y, reference_linear(wide[:, 64:128], weight)) < CLOSE[torch.bfloat16]
    assert not whole[:, :16].any()
    assert not whole[:, 48:].any()


def test_columns_that_are_not_contiguous() -> None:
    weight = random_weight(32, 64, device=DEVICE)
    x = random_rows(64, 9, torch.bfloat16, device=DEVICE).T

    y = products.linear(x, weight, way="fused")

    assert distance(y, reference_linear(x, weight)) < CLOSE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (64, 64), (33, 192), (1, 8193)])
def test_decoding_is_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(*shape, device=DEVICE)
    out = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)

    decode(weight, out)

    exact = nf4_decode_reference(weight.codes, weight.absmax, out.numel(), dtype).view(shape)
    assert torch.equal(out, exact)


def test_decoding_a_stack() -> None:
    weight = random_weight(40, 24, 3, apart=10, device=DEVICE)

    out = torch.full((3, 40, 24), torch.nan, dtype=torch.bfloat16, device=DEVICE)

    decode(weight, out)

    assert torch.equal(out, reference_dequantize(weight, torch.bfloat16))


def test_what_the_store_encodes() -> None:
    w_OI = random_rows(64, 128, torch.bfloat16, seed=4)
    pieces = encode(w_OI, "nf4")
    weight = Nf4(pieces[""].to(DEVICE), pieces[".absmax"].to(DEVICE), 64, 128)
    x = random_rows(16, 128, torch.bfloat16, device=DEVICE)

    y = products.linear(x, weight, way="fused")

    # nf4 keeps about nine tenths of a normal matrix.
    assert 0.02 < distance(y, x.float() @ w_OI.to(DEVICE).float().T) < 0.2
