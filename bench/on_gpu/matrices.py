"""The kernels by themselves: are they right, and how fast is each way?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lamina.kernels import products
from lamina.kernels.nf4 import Groups, Nf4, reference_dequantize
from on_gpu.machine import Machine

#: Rows of each expert, out features, in features.
SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    ((1,), 64, 64),
    ((200,), 300, 7),
    ((77,), 96, 136),
    ((333,), 1000, 1024),
    ((600,), 2048, 1536),
    ((0, 17, 0, 300, 1), 512, 384),
    ((0, 0, 0), 64, 64),
]
#: The same in small: interpreted, a kernel takes a millisecond for each step of each tile.
TINY_SHAPES: list[tuple[tuple[int, ...], int, int]] = [
    ((1,), 64, 64),
    ((20,), 30, 7),
    ((70,), 24, 136),
    ((0, 17, 0, 9, 1), 32, 64),
    ((0, 0, 0), 64, 64),
]
#: (model, what, out features, in features)
EXPERTS = [
    ("Maverick", "gate_up", 16384, 5120),
    ("Maverick", "down", 5120, 8192),
    ("8x22B", "gate_up", 32768, 6144),
    ("8x22B", "down", 6144, 16384),
]
ROWS = (64, 128, 256, 512, 2048)


def random_weight(
    out_features: int, in_features: int, experts: int | None, device: torch.device
) -> Nf4:
    n = out_features * in_features
    stack = () if experts is None else (experts,)
    codes = torch.randint(0, 256, (*stack, -(-n // 2)), device=device, dtype=torch.uint8)
    absmax = (torch.rand(*stack, -(-n // 64), device=device) + 0.5) * 2 / in_features**0.5
    return Nf4(codes, absmax.bfloat16(), out_features, in_features)


def exact(x: Tensor, weight: Nf4, groups: Groups | None, *, gradient: bool) -> Tensor:
    """In fp32, of weights that aren't rounded."""
    w = reference_dequantize(weight)
    stack = w[None] if groups is None else w
    slices = [slice(0, len(x))] if groups is None else groups.slices
    parts = [
        x[rows].float() @ (one if gradient else one.T)
        for rows, one in zip(slices, stack, strict=True)
    ]
    return torch.cat(parts)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm()) if b.numel() else 0.0


Key = tuple[str, str, str]


def check(machine: Machine, *, tiny: bool) -> bool:
    """Every kernel against fp32, each with all the tiles that the tuner may choose. Prints a table
    of the largest distances."""
    torch.backends.cuda.matmul.allow_tf32 = False
    shapes = TINY_SHAPES if tiny else SHAPES
    tiles = candidates(machine) if not tiny else []
    whole = [shape for shape in shapes if shape[2] % 8 == 0 and sum(shape[0])]
    worst: dict[Key, float] = {}
    for shape in shapes:
        # Each tile with one of the shapes that it is meant for.
        own = tiles[whole.index(shape) :: len(whole)] if shape in whole else []
        for key, far in _distances(shape, own, machine):
            worst[key] = _larger(worst.get(key, 0.0), far)
    print("\n### Kernels against fp32, the largest distance over odd shapes and empty experts\n")
    print("| product | way | type | distance | |\n|---|---|---|---|---|")
    right = True
    for (what, way, dtype_name), far in worst.items():
        most = 0.0 if what == "decode" else 1e-5 if dtype_name == "float32" else 5e-3
        good = far <= most
        right &= good
        print(f"| {what} | {way} | {dtype_name} | {far:.1e} | {'ok' if good else 'WRONG'} |")
    return right


def candidates(machine: Machine) -> list[Any]:
    """The tiles that the tuner chooses from."""
    if not products.fused_runs_on(machine.device):
        return []
    from lamina.kernels.triton_nf4 import CANDIDATES

    return list(CANDIDATES)


def _distances(
    shape: tuple[tuple[int, ...], int, int], tiles: Sequence[Any], machine: Machine
) -> Iterator[tuple[Key, float]]:
    counts, out_features, in_features = shape
    experts = None if len(counts) == 1 else len(counts)
    weight = random_weight(out_features, in_features, experts, machine.device)
    groups = None if experts is None else Groups.of(counts, machine.device)
    decoded = torch.full(weight.shape, torch.nan, device=machine.device, dtype=torch.bfloat16)
    products.dequantize(weight, decoded)
    yield (
        ("decode", "-", "bfloat16"),
        distance(decoded, reference_dequantize(weight, decoded.dtype)),
    )
    fused = products.fused_runs_on(machine.device)
    for dtype in (torch.bfloat16, torch.float32):
        for gradient in (False, True):
            summed = out_features if gradient else in_features
            x = torch.randn(sum(counts), summed, device=machine.device).to(dtype)
            truth = exact(x, weight, groups, gradient=gradient)
            what, dtype_name = "dy @ W" if gradient else "x @ W^T", str(dtype)[6:]
            compute = products.input_grad if gradient else products.linear
            workspace = torch.empty_like(decoded).view(-1) if dtype == torch.bfloat16 else None
            y = compute(x, weight, groups, workspace=workspace, way="dequantize")
            yield (what, "dequantize", dtype_name), distance(y, truth)
            if fused and (dtype == torch.float32 or not tiles):
                y = compute(x, weight, groups, way="fused")
                yield (what, "fused", dtype_name), distance(y, truth)
            elif fused:
                for tile, y in _each_tile(x, weight, groups, tiles, gradient):
                    yield (what, f"fused, {tile}", dtype_name), distance(y, truth)


def _each_tile(
    x: Tensor, weight: Nf4, groups: Groups | None, tiles: Sequence[Any], gradient: bool
) -> Iterator[tuple[str, Tensor]]:
    """The fused product with given tiles, over poison."""
    from triton.runtime.errors import OutOfResources

    from lamina.kernels.triton_nf4 import product

    columns = weight.in_features if gradient else weight.out_features
    for one in tiles:
        name = f"{one.rows} x {one.columns} x {one.depth}, {one.warps} warps"
        y = torch.full((len(x), columns), torch.nan, dtype=x.dtype, device=x.device)
        try:
            product(x, weight, groups, y, gradient=gradient, tiles=one)
        except OutOfResources:  # a smaller card: its tuner leaves them out, too
            continue
        yield name, y


def _larger(a: float, b: float) -> float:
    """NaN is larger than anything."""
    return b if not b <= a else a


def measure(machine: Machine, matrix_rate: float, *, tiny: bool) -> None:
    """How fast each way is at the experts' shapes, and from how many rows on writing the weights
    out is the faster one. Prints a table."""
    shrink = 256 if tiny else 1
    fused = products.fused_runs_on(machine.device)
    print(
        "\n### One expert's products: time, and share of the matrix rate "
        f"(the rule: fused up to {products.MOST_FUSED_ROWS} rows)\n"
    )
    print("| matrix | rows | product | fused | dequantize | of it decoding | weights there |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for model, name, *sizes in EXPERTS:
        out_features, in_features = (size // shrink for size in sizes)
        weight = random_weight(out_features, in_features, None, machine.device)
        workspace = torch.empty(weight.shape, dtype=torch.bfloat16, device=machine.device)
        decoding = machine.seconds(partial(products.dequantize, weight, workspace))
        for rows in ROWS[:1] if tiny else ROWS:
            for gradient in (False, True):
                if machine.seconds_left() < 0:
                    print("| the time is up | | | | | | |")
                    return
                times = _times(machine, weight, workspace, rows, gradient, fused)
                flops = 2.0 * rows * out_features * in_features
                cells = [
                    f"{seconds * 1e6:.0f} us, {flops / seconds / matrix_rate:.0%}"
                    if seconds is not None
                    else "no Triton"
                    for seconds in times
                ]
                print(
                    f"| {model} {name} | {rows} | {'dy @ W' if gradient else 'x @ W^T'} "
                    f"| {cells[0]} | {cells[1]} | {decoding * 1e6:.0f} us | {cells[2]} |",
                    flush=True,
                )


def _times(
    machine: Machine, weight: Nf4, workspace: Tensor, rows: int, gradient: bool, fused: bool
) -> tuple[float | None, float, float]:
    """Seconds of a product: fused, by writing the weights out, and with weights that are there."""
    x = torch.randn(
        rows,
        weight.out_features if gradient else weight.in_features,
        dtype=torch.bfloat16,
        device=machine.device,
    )
    compute = partial(
        products.input_grad if gradient else products.linear,
        x,
        weight,
        workspace=workspace.view(-1),
    )
    if fused:  # that the tiles which the tuner chose are right at this shape
        far = distance(compute(way="fused"), compute(way="dequantize"))
        if not far < 5e-3:
            raise RuntimeError(f"{rows} rows, {weight.shape}: the two ways differ by {far}")
    there = partial(torch.mm, x, workspace if gradient else workspace.T)
    return (
        machine.seconds(partial(compute, way="fused")) if fused else None,
        machine.seconds(partial(compute, way="dequantize")),
        machine.seconds(there),
    )
