"""Common cards, from their makers' data sheets: what a plan for a machine that isn't there goes by.

bf16 rates are dense, with sums in fp32: GeForce cards have half the rate that is often quoted for
16-bit sums, and sparsity's factor of two isn't for us. Bus rates are what a copy from pinned memory
reaches in practice, about 80% of the bus's own.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lamina.errors import UsageError

__all__ = ["CARDS", "Card", "find_card"]

_PCIE4_X8, _PCIE4, _PCIE5 = 12e9, 24e9, 50e9


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card.

    Args:
        memory: bytes, as its driver reports them.
        bf16, fp32: peak FLOP/s.
        bandwidth: of its memory, bytes/s.
        bus: host to device, bytes/s.
        watts: at full load.
    """

    name: str
    memory: int
    bf16: float
    fp32: float
    bandwidth: float
    bus: float
    watts: float


def _card(
    name: str, mib: int, bf16: float, fp32: float, bandwidth: float, bus: float, watts: float
) -> Card:
    """In MiB, TFLOP/s and GB/s, as data sheets have them."""
    return Card(name, mib << 20, bf16 * 1e12, fp32 * 1e12, bandwidth * 1e9, bus, watts)


CARDS = (
    _card("RTX 3060 12GB", 12288, 25.6, 12.7, 360, _PCIE4, 170),
    _card("RTX 3090", 24576, 71, 35.6, 936, _PCIE4, 350),
    _card("RTX 4060 Ti 16GB", 16380, 44, 22, 288, _PCIE4_X8, 165),
    _card("RTX 4070 Ti Super", 16376, 88, 44, 672, _PCIE4, 285),
    _card("RTX 4080", 16376, 97.5, 48.7, 717, _PCIE4, 320),
    _card("RTX 4090", 24564, 165, 82.6, 1008, _PCIE4, 450),
    _card("RTX 5070 Ti", 16303, 88, 44, 896, _PCIE5, 300),
    _card("RTX 5080", 16303, 112.6, 56, 960, _PCIE5, 360),
    _card("RTX 5090", 32607, 209.5, 104.8, 1792, _PCIE5, 575),
    _card("RTX A6000", 49140, 155, 38.7, 768, _PCIE4, 300),
    _card("RTX 6000 Ada", 49140, 364, 91, 960, _PCIE4, 300),
    _card("RTX PRO 6000", 97887, 503, 125, 1792, _PCIE5, 600),
    _card("A10", 23028, 125, 31, 600, _PCIE4, 150),
    _card("L4", 23034, 121, 30, 300, _PCIE4, 72),
    _card("L40S", 46068, 362, 91.6, 864, _PCIE4, 350),
    _card("A100 40GB", 40960, 312, 19.5, 1555, _PCIE4, 400),
    _card("A100 80GB", 81920, 312, 19.5, 2039, _PCIE4, 400),
    _card("H100 PCIe", 81559, 756, 51, 2000, _PCIE5, 350),
    _card("H100", 81559, 989, 67, 3350, _PCIE5, 700),
    _card("H200", 143771, 989, 67, 4800, _PCIE5, 700),
    _card("B200", 183359, 2250, 80, 8000, _PCIE5, 1000),
)


#: Words that tell no cards of the table apart.
_NOISE = ("nvidia", "geforce", "tesla", "quadro", "generation", "sxm", "sxm4", "sxm5")


def _words(name: str) -> list[str]:
    return [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in _NOISE]


def _match(given: list[str]) -> Card | None:
    """The card with these words; or else with the most of their beginning (a driver says more than
    a table: `H100 80GB HBM3`); or else the first that goes on after them (a user says less)."""
    by_length = sorted(CARDS, key=lambda card: -len(_words(card.name)))
    for card in CARDS:
        if "".join(_words(card.name)) == "".join(given):
            return card
    for card in by_length:
        words = _words(card.name)
        if given[: len(words)] == words:
            return card
    return next((card for card in CARDS if _words(card.name)[: len(given)] == given), None)


def find_card(name: str) -> Card:
    """The card of that name, as its maker, its driver or a shop writes it.

    Raises:
        UsageError: it isn't in the table.
    """
    given = _words(name)
    found = (_match(given) or _match(["rtx", *given])) if given else None
    if found is None:
        names = [card.name for card in CARDS]
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        raise UsageError(
            f"--gpu {name}: this card isn't in the table"
            + (f"; did you mean {close[0]}?" if close else ""),
            hint=f"There are: {', '.join(names)}. For another one run `lamina doctor` on it.",
        )
    return found
