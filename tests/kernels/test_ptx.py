"""The PTX that decodes eight codes, run by a small interpreter of its instructions."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from lamina.kernels.nf4 import NF4_LEVELS
from lamina.kernels.ptx import CONSTRAINTS, OUTPUTS, decode_eight, tables

MASK = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """`prmt.b32` in its default mode: byte k of the result is the byte of (b, a) that nibble k of
    the selector names; a nibble's fourth bit would replicate the sign, and isn't used."""
    both = a | b << 32
    result = 0
    for k in range(4):
        nibble = selector >> 4 * k & 15
        assert nibble < 8, "the sign mode isn't meant"
        result |= (both >> 8 * nibble & 255) << 8 * k
    return result


def halves(word: int) -> Tensor:
    signed = [half - 0x10000 if half >= 0x8000 else half for half in (word & 0xFFFF, word >> 16)]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).double()


def fma_pair(a: int, b: int, c: int) -> int:
    """`fma.rn.bf16x2`: exact in double precision (8 + 8 bits of mantissa and an addend near them),
    rounded once."""
    exact = halves(a) * halves(b) + halves(c)
    low, high = (int(v) & 0xFFFF for v in round_to_bf16(exact).view(torch.int16).tolist())
    return low | high << 16


def round_to_bf16(exact: Tensor) -> Tensor:
    """To nearest, ties to even, straight from double: going through fp32 would round twice."""
    near = exact.float().bfloat16()
    bits = near.view(torch.int16)
    best = near.clone()
    for step in (-1, 1):
        other = (bits + step).view(torch.bfloat16)
        closer = (other.double() - exact).abs() < (best.double() - exact).abs()
        best = torch.where(closer, other, best)
    return best


def run(text: str, word: int, scale: int) -> list[int]:
    """The eight outputs, as bits."""
    registers: dict[str, int] = {f"${OUTPUTS}": word, f"${OUTPUTS + 1}": scale}

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in text.strip("{}\n").splitlines():
        assert line.endswith(";"), line
        name, rest = line.rstrip(";").split(" ", 1)
        if name == ".reg":
            continue
        if match := re.fullmatch(r"\{(\$\d), (\$\d)\}, (\w+)", rest):
            assert name == "mov.b32", line
            registers[match[1]] = value(match[3]) & 0xFFFF
            registers[match[2]] = value(match[3]) >> 16
            continue
        to, *operands = [operand.strip() for operand in rest.split(",")]
        numbers = [value(operand) for operand in operands]
        if name == "prmt.b32":
            # Only the selector's low four nibbles count.
            registers[to] = prmt(numbers[0], numbers[1], numbers[2] & 0xFFFF)
        elif name == "fma.rn.bf16x2":
            registers[to] = fma_pair(*numbers)
        else:
            operation = {
                "and.b32": lambda a, b: a & b,
                "or.b32": lambda a, b: a | b,
                "shr.u32": lambda a, b: a >> b,
                "mov.b32": lambda a: a,
            }[name]
            registers[to] = operation(*numbers) & MASK
    return [registers[f"${k}"] for k in range(OUTPUTS)]


def bf16_of(bits: list[int]) -> Tensor:
    signed = [value - 0x10000 if value >= 0x8000 else value for value in bits]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16)


def codes_of(word: int) -> list[int]:
    """In the store's order: byte by byte, the high half of each first."""
    return [word >> shift & 15 for byte in range(4) for shift in (8 * byte + 4, 8 * byte)]


def decoded(words: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """What the text gives, and level times scale in double precision."""
    text = decode_eight()
    scale16 = torch.tensor([scale]).bfloat16()
    bits = int(scale16.view(torch.int16)) & 0xFFFF
    results, exact = [], []
    for word in words:
        results.append(bf16_of(run(text, word, bits * 0x10001)))
        levels = torch.tensor([NF4_LEVELS[code] for code in codes_of(word)], dtype=torch.float32)
        exact.append(levels.double() * scale16.double())
    return torch.cat(results), torch.cat(exact)


@pytest.mark.parametrize("scale", [1.0, 0.0123, 3.39e2, 2.0**-100, 0.0])
def test_every_code_at_every_place(scale: float) -> None:
    words = [code * 0x11111111 for code in range(16)] + [0x76543210, 0xFEDCBA98, 0x0F1E2D3C]

    result, exact = decoded(words, scale)

    # Half a unit in the last place of 8 bits is 2^-8 at most; the sum of two parts adds 2^-17.
    assert bool(((result.double() - exact).abs() <= exact.abs() * (2.0**-8 + 2.0**-17)).all())


def test_nearly_every_weight_is_rounded_as_the_exact_decode_rounds() -> None:
    generator = torch.Generator().manual_seed(0)
    same = total = 0
    for scale in (torch.rand(60, generator=generator) + 0.5).tolist():
        words = torch.randint(0, 1 << 32, (2,), generator=generator).tolist()
        result, exact = decoded(words, scale)
        same += int((result == round_to_bf16(exact)).sum())
        total += len(exact)

    assert same / total > 0.985


def test_a_level_is_the_sum_of_its_two_parts() -> None:
    planes = tables()
    parts = []
    for part in "hl":
        bits = [a << 8 | b for a, b in zip(planes[f"{part}1"], planes[f"{part}0"], strict=True)]
        parts.append(bf16_of(bits).double())
    level = torch.tensor(NF4_LEVELS).double()

    assert float((parts[0] + parts[1] - level).abs().max()) < 2.0**-17


def test_the_operands_are_those_that_are_declared() -> None:
    text = decode_eight()

    assert set(re.findall(r"\$\d+", text)) == {f"${k}" for k in range(OUTPUTS + 2)}
    assert CONSTRAINTS.count("=h") == OUTPUTS
