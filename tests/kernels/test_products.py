"""Products by writing weights out, which way is chosen, and what is refused: without Triton."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from tests.kernels.weights import distance, random_rows, random_weight
from torch import Tensor

from lamina.kernels import products
from lamina.kernels.nf4 import (
    NF4_BLOCK,
    NF4_LEVELS,
    Groups,
    Nf4,
    reference_dequantize,
    reference_input_grad,
    reference_linear,
)
from lamina.store import codec

CPU = torch.device("cpu")
COUNTS = [(5, 0, 17, 33), (0, 0, 0, 0), (0, 40, 0, 0), (1, 1, 1, 1)]


def test_the_code_book_is_the_store_s() -> None:
    assert torch.equal(torch.tensor(NF4_LEVELS), codec.NF4_CODE)
    assert NF4_BLOCK == codec.NF4_BLOCK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (64, 96)])
def test_the_reference_decodes_what_the_store_encodes(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    w_OI = random_rows(*shape, torch.bfloat16)
    pieces = codec.encode(w_OI, "nf4")
    weight = Nf4(pieces[""], pieces[".absmax"], *shape)

    assert torch.equal(
        reference_dequantize(weight, dtype), codec.decode(pieces, shape, "nf4", dtype)
    )


def test_decoding_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(33, 31)
    whole = reference_dequantize(weight)

    monkeypatch.setattr("lamina.kernels.nf4._CHUNK", 128)

    assert torch.equal(reference_dequantize(weight), whole)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8, 8), (0, 32, 64), (33, 50, 7)])
def test_a_product(shape: tuple[int, int, int], dtype: torch.dtype, gradient: bool) -> None:
    rows, out_features, in_features = shape
    weight = random_weight(out_features, in_features)
    x = random_rows(rows, out_features if gradient else in_features, dtype)
    compute, reference = products.linear, reference_linear
    if gradient:
        compute, reference = products.input_grad, reference_input_grad

    y = compute(x, weight, way="dequantize")

    assert (y.dtype, y.shape) == (dtype, reference(x, weight).shape)
    assert distance(y, reference(x, weight)) < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("room", ["none", "one", "all"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts(counts: tuple[int, ...], room: str, gradient: bool) -> None:
    weight = random_weight(48, 64, len(counts), apart=64)
    groups = Groups.of(counts, CPU)
    x = random_rows(sum(counts), 48 if gradient else 64, torch.bfloat16)
    size = {"none": None, "one": 48 * 64, "all": 4 * 48 * 64}[room]
    workspace = None if size is None else torch.full((size,), torch.nan, dtype=torch.bfloat16)
    out = torch.full((len(x), 64 if gradient else 48), torch.nan, dtype=torch.bfloat16)
    compute, reference = products.linear, reference_linear
    if gradient:
        compute, reference = products.input_grad, reference_input_grad

    y = compute(x, weight, groups, out=out, workspace=workspace, way="dequantize")

    assert y is out
    assert distance(y, reference(x, weight, groups)) < 3e-3


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    most = products.MOST_FUSED_ROWS

    def way(rows: int, *counts: int, device: str = "cuda") -> products.Way:
        # The rule looks at nothing but the rows' number and device.
        x = SimpleNamespace(shape=(rows, 8), device=torch.device(device))
        groups = Groups(counts, torch.empty(0)) if counts else None
        return products.choose(cast(Tensor, x), groups)

    monkeypatch.setattr(products, "fused_runs_on", lambda device: True)

    assert way(most) == "fused"
    assert way(most + 1) == "dequantize"
    # Experts without rows don't count: the mean of those that have some decides.
    assert way(most + 1, most // 2, 0, most // 2 + 1) == "fused"
    assert way(most + 1, most + 1, 0, 0) == "dequantize"
    assert way(0, 0, 0) == "fused"
    assert way(1, device="cpu") == "dequantize"

    monkeypatch.setattr(products, "fused_runs_on", lambda device: False)

    assert way(1) == "dequantize"


def test_what_is_refused() -> None:
    weight, stack = random_weight(16, 64), random_weight(16, 64, 2)
    x = random_rows(6, 64, torch.bfloat16)

    with pytest.raises(ValueError, match=r"needed is \[P, 64\]"):
        products.linear(x[:, :32], weight)
    with pytest.raises(ValueError, match=r"needed is \[P, 16\]"):
        products.input_grad(x, weight)
    with pytest.raises(ValueError, match="float16"):
        products.linear(x.half(), weight)
    with pytest.raises(ValueError, match="needs groups"):
        products.linear(x, stack)
    with pytest.raises(ValueError, match="needs groups"):
        products.linear(x, weight, Groups.of((6,), CPU))
    with pytest.raises(ValueError, match="2 experts and 5 rows"):
        products.linear(x, stack, Groups.of((2, 3), CPU))
    with pytest.raises(ValueError, match="out is"):
        products.linear(x, weight, out=torch.empty(6, 16))
    with pytest.raises(ValueError, match="out is"):
        products.dequantize(weight, torch.empty(64, 16))
    with pytest.raises(ValueError, match="don't run on cpu"):
        products.linear(x, weight, way="fused")


def test_a_matrix_that_does_not_fit_its_shape() -> None:
    weight = random_weight(16, 64)

    with pytest.raises(ValueError, match="codes are"):
        Nf4(weight.codes[:-1], weight.absmax, 16, 64)
    with pytest.raises(ValueError, match="absmax is"):
        Nf4(weight.codes, weight.absmax[:-1], 16, 64)
    with pytest.raises(ValueError, match="aren't uint8 and bfloat16"):
        Nf4(weight.codes, weight.absmax.float(), 16, 64)
    with pytest.raises(ValueError, match="contiguous"):
        Nf4(torch.zeros(1024, dtype=torch.uint8)[::2], weight.absmax, 16, 64)
