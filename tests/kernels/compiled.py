"""What the compiler makes of the kernels, for cards that aren't here: they compile, decode in
registers, and spill none.

Not collected by itself: Triton must not interpret, so `test_on_triton.py` runs this file in a
process of its own.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lamina.kernels import triton_nf4
from lamina.kernels.triton_nf4 import Tiles

#: The tiles that most products get.
LARGE = Tiles(128, 128, 64, warps=8, stages=3)
SMALL = Tiles(64, 128, 64, warps=4, stages=4)

#: What isn't a multiple of 16, among what a launch passes.
_ANY = {"rows", "E", "bucket", "n"}


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], card: int, **options: int
) -> Any:
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(types)
        if name not in _ANY | constants.keys()
    }
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)


def product(
    tiles: Tiles,
    card: int,
    *,
    gradient: bool,
    grouped: bool = False,
    words: bool = True,
    ones: Sequence[str] = (),
) -> Any:
    """
    Args:
        ones: sizes that are 1, which a launch compiles in.
    """
    x = "*bf16" if words else "*fp32"
    pointers = {"x_ptr": x, "codes_ptr": "*i32" if words else "*u8", "absmax_ptr": "*bf16"}
    pointers |= {"levels_ptr": "*fp32", "offsets_ptr": "*i32", "y_ptr": x}
    sizes = ["rows", "outs", "ins", "E", "x_stride", "y_stride", "codes_stride", "absmax_stride"]
    constants = {
        "GRADIENT": gradient,
        "GROUPED": grouped,
        "EXPERTS": 128 if grouped else 2,
        "WORDS": words,
        "INTERPRET": False,
        "BLOCK_P": tiles.rows,
        "BLOCK_N": tiles.columns,
        "BLOCK_K": tiles.depth,
        "SWIZZLE": tiles.swizzle,
        "EVEN_N": words,
        "EVEN_K": words,
        "SPAN": triton_nf4._span(64 if words else 1, tiles.columns if gradient else tiles.depth),
    }
    types = pointers | dict.fromkeys([*sizes, "bucket"], "i32")
    constants |= dict.fromkeys(ones, 1)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return compiled(triton_nf4._product, types, constants, card, **options)


def stack_bytes(kernel: Any, tmp_path: Path) -> int:
    """Bytes of a thread's stack: what doesn't fit its registers."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"STACK:(\d+)", text)
    assert found, text
    return max(map(int, found))


@pytest.mark.parametrize("card", [80, 89, 90])
@pytest.mark.parametrize(
    ("tiles", "gradient", "grouped"),
    [(LARGE, False, False), (LARGE, True, True), (SMALL, True, False)],
    ids=["linear", "input_grad of experts", "input_grad"],
)
def test_a_product(tiles: Tiles, gradient: bool, grouped: bool, card: int, tmp_path: Path) -> None:
    kernel = product(tiles, card, gradient=gradient, grouped=grouped)

    text = kernel.asm["ptx"]
    assert ("wgmma" if card == 90 else "mma.sync") in text
    assert "prmt.b32" in text
    # Levels would be read in words of four bytes; tiles are copied behind the scenes.
    assert "cp.async" in text
    loop = text[text.index("prmt.b32") :]
    assert not re.search(r"ld\.global\S*\.b32", loop)
    assert stack_bytes(kernel, tmp_path) == 0
    assert kernel.metadata.shared < 99 << 10  # what a block of a 24 GB card may have


def test_any_shape_in_fp32() -> None:
    for gradient in (False, True):
        assert product(triton_nf4._PLAIN_TILES, 80, gradient=gradient, words=False).asm["cubin"]


@pytest.mark.parametrize("ones", [("rows", "E"), ("rows", "E", "outs", "ins", "y_stride")], ids=str)
@pytest.mark.parametrize("gradient", [False, True])
def test_sizes_of_one(gradient: bool, ones: tuple[str, ...]) -> None:
    words = "ins" not in ones
    tiles = triton_nf4._PLAIN_TILES

    assert product(tiles, 80, gradient=gradient, words=words, ones=ones).asm["cubin"]


@pytest.mark.parametrize("card", [80, 90])
def test_decoding(card: int, tmp_path: Path) -> None:
    pointers = {"codes_ptr": "*u8", "absmax_ptr": "*bf16", "levels_ptr": "*fp32"}
    sizes = ["n", "codes_stride", "absmax_stride", "out_stride"]
    types = pointers | {"out_ptr": "*bf16"} | dict.fromkeys(sizes, "i32")
    constants = {"WHOLE": True, "BLOCKS": 128, "INTERPRET": False}

    kernel = compiled(triton_nf4._decode, types, constants, card, num_warps=8)

    # Sixteen bytes at a time, in and out.
    assert re.search(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"])
    assert re.search(r"st\.global\S*\.v4\.b32", kernel.asm["ptx"])
    assert not re.search(r"(ld|st)\.global\S*\.b8", kernel.asm["ptx"])
    assert stack_bytes(kernel, tmp_path) == 0
