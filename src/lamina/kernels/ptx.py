"""Eight nf4 codes to bf16 weights in registers, as PTX: no memory is asked for a level.

`prmt.b32` picks four bytes out of eight by four numbers of three bits. So two of them look four
codes up in a table of sixteen bytes, and a third merges the two halves by the codes' fourth bits. A
level is held as the sum of two bf16 numbers, that is as four such tables, and a weight is
`fma(high, scale, low * scale)`: rounded once, from within 2^-17 of level times scale. Where that
product is nearly halfway between two bf16 numbers (one weight in 500) the other of the two may come
out than the exact decode gives. The instructions are those of sm_80.

`tests/kernels/test_ptx.py` runs the very text, on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina.kernels.nf4 import NF4_LEVELS

#: bf16 outputs, from `$0` on; after them the word of eight codes, and the scale in both halves of
#: a word.
OUTPUTS = 8
CONSTRAINTS = ",".join(["=h"] * OUTPUTS + ["r", "r"])


def tables() -> dict[str, bytes]:
    """The four byte tables, by plane: high and low bytes of the two parts of each level."""
    level = torch.tensor(NF4_LEVELS)
    high = level.bfloat16()
    low = (level - high.float()).bfloat16()
    planes = {}
    for part, numbers in (("h", high), ("l", low)):
        bits = numbers.view(torch.int16).tolist()
        planes[f"{part}1"] = bytes(value >> 8 & 255 for value in bits)
        planes[f"{part}0"] = bytes(value & 255 for value in bits)
    return planes


def decode_eight() -> str:
    """The PTX text."""
    word, scale = f"${OUTPUTS}", f"${OUTPUTS + 1}"
    lines = [
        ".reg .b32 code, merge, zero, x, y, h1, h0, l1, l0, high, low;",
        # There is no product of pairs before sm_90; to add -0 changes nothing.
        "mov.b32 zero, 0x80008000;",
        f"and.b32 code, {word}, 0x77777777;",
        # A nibble of the merging selector: its own place, plus 4 where the code's top bit is set.
        f"shr.u32 merge, {word}, 1;",
        "and.b32 merge, merge, 0x44444444;",
        "or.b32 merge, merge, 0x32103210;",
    ]
    for half in (0, 4):
        if half:
            lines += ["shr.u32 code, code, 16;", "shr.u32 merge, merge, 16;"]
        for plane, table in tables().items():
            lines += _look_up(plane, table)
        # Byte k of a plane belongs to nibble k, and the first of two weights is the high nibble.
        for pair, selector in ((0, 0x4051), (2, 0x6273)):
            first, second = f"${half + pair}", f"${half + pair + 1}"
            lines += [
                f"prmt.b32 high, h0, h1, {selector:#x};",
                f"prmt.b32 low, l0, l1, {selector:#x};",
                f"fma.rn.bf16x2 low, low, {scale}, zero;",
                f"fma.rn.bf16x2 high, high, {scale}, low;",
                f"mov.b32 {{{first}, {second}}}, high;",
            ]
    return "{\n" + "\n".join(lines) + "\n}"


def _look_up(plane: str, table: Sequence[int]) -> list[str]:
    """Four codes' bytes of a plane into the register of that name."""
    words = [f"{int.from_bytes(table[at : at + 4], 'little'):#x}" for at in range(0, 16, 4)]
    return [
        f"prmt.b32 x, {words[0]}, {words[1]}, code;",
        f"prmt.b32 y, {words[2]}, {words[3]}, code;",
        f"prmt.b32 {plane}, x, y, merge;",
    ]
