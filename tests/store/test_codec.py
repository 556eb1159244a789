"""The codecs: bit-equal to bitsandbytes and to the reference, and exact where they claim it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lamina.store import codec as codec_module
from lamina.store.codec import (
    CODECS,
    NF4_BLOCK,
    decode,
    encode,
    import_bitsandbytes,
    nf4_decode_reference,
    nf4_encode_reference,
)
from lamina.store.pieces import encoded_pieces

SHAPES = [(1, 1), (1, 63), (1, 64), (5, 13), (3, 43), (21, 9), (64, 65), (130, 4096), (257, 8191)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random) * 0.02).bfloat16()


@pytest.fixture(params=["native", "torch"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to decode nf4."""
    if request.param == "torch":
        monkeypatch.setattr(codec_module, "_native_dequantize", lambda: None)
    elif codec_module._native_dequantize() is None:
        pytest.skip("bitsandbytes has no compiled library here")
    return str(request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_codes_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = matrix(shape)
    theirs, state = functional.quantize_4bit(w, blocksize=NF4_BLOCK, quant_type="nf4")
    ours = encode(w, "nf4")
    assert torch.equal(ours[""], theirs.view(-1))
    assert torch.equal(ours[".absmax"].float(), state.absmax)  # bf16 loses nothing
    assert torch.equal(codec_module.NF4_CODE, state.code)


def test_nf4_fast_encode_equals_the_reference_for_every_ratio() -> None:
    """Every mantissa of a block's scale against every smaller bf16 number of 18 binades."""
    bits = torch.arange(120 << 7, (127 << 7) + 128, dtype=torch.int16)
    values = torch.cat([bits.view(torch.bfloat16), -bits.view(torch.bfloat16)])
    small = torch.arange(108 << 7, 120 << 7, 13, dtype=torch.int16).view(torch.bfloat16)
    values = torch.cat([values, small, torch.zeros(3, dtype=torch.bfloat16)])
    for mantissa in range(0, 128, 3):
        scale = torch.tensor([(127 << 7) + mantissa], dtype=torch.int16).view(torch.bfloat16)
        rest = values[values.abs() <= scale]
        rest = rest[: len(rest) - len(rest) % 63].view(-1, 63)
        w = torch.cat([scale.expand(len(rest), 1), rest], dim=1)
        codes, absmax = nf4_encode_reference(w.reshape(-1))
        fast = encode(w, "nf4")
        assert torch.equal(fast[""], codes)
        assert torch.equal(fast[".absmax"], absmax)


def test_nf4_blocks_out_of_the_ordinary_equal_the_reference() -> None:
    w = matrix((6, 64))
    w[0] = 0
    w[1] = 1e-39  # a denormal number
    w[2] *= 1e30
    w[3, 1:] *= 1e-30
    w[4] = -0.0
    codes, absmax = nf4_encode_reference(w.reshape(-1))
    fast = encode(w, "nf4")
    assert torch.equal(fast[""], codes)
    assert torch.equal(fast[".absmax"], absmax)
    again = decode(fast, w.shape, "nf4", torch.float32)
    assert torch.equal(again[0], torch.zeros(64))
    w[1] = 0  # without the denormal numbers, all go the fast way
    codes, absmax = nf4_encode_reference(w.reshape(-1))
    fast = encode(w, "nf4")
    assert torch.equal(fast[""], codes)
    assert torch.equal(fast[".absmax"], absmax)
    assert torch.isfinite(again).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_nf4_decodes_as_the_reference(
    shape: tuple[int, int], dtype: torch.dtype, decoder: str
) -> None:
    w = matrix(shape, seed=1)
    pieces = encode(w, "nf4")
    want = nf4_decode_reference(pieces[""], pieces[".absmax"], w.numel(), torch.float32)
    got = decode(pieces, shape, "nf4", dtype)
    assert got.dtype == dtype
    assert torch.equal(got.view(-1), want.to(dtype))


@pytest.mark.parametrize("codec", CODECS)
def test_decodes_into_given_memory(codec: str, decoder: str) -> None:
    w = matrix((37, 70))
    pieces = encode(w, codec)
    for dtype in DTYPES:
        out = torch.full((37, 70), 7.0, dtype=dtype)
        assert decode(pieces, w.shape, codec, dtype, out) is out
        assert torch.equal(out, decode(pieces, w.shape, codec, dtype))
    for wrong in (torch.empty(70, 37), torch.empty(37, 70).double(), torch.empty(70, 37).t()):
        with pytest.raises(ValueError, match="out is"):
            decode(pieces, w.shape, codec, torch.float32, wrong)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_as_announced(codec: str, shape: tuple[int, int]) -> None:
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8", torch.int8: "I8"}
    made = encode(matrix(shape), codec)
    found = tuple((suffix, names[t.dtype], tuple(t.shape)) for suffix, t in made.items())
    assert found == encoded_pieces(shape, codec)


def test_nf4_takes_four_and_a_quarter_bits() -> None:
    made = encode(matrix((128, 1024)), "nf4")
    assert sum(t.numel() * t.element_size() for t in made.values()) * 8 == 4.25 * 128 * 1024


def test_bf16_loses_nothing() -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    w = bits.view(torch.bfloat16)
    w = w[torch.isfinite(w)].view(2, -1)
    again = decode(encode(w, "bf16"), w.shape, "bf16", torch.bfloat16)
    assert torch.equal(again.view(torch.int16), w.view(torch.int16))


def test_int8_is_within_half_a_step_of_each_row() -> None:
    w = matrix((40, 333))
    w[3] = 0
    w[4] *= 1000
    pieces = encode(w, "int8")
    again = decode(pieces, w.shape, "int8", torch.float32)
    step_O = w.float().abs().amax(dim=1) / 127
    assert torch.equal(pieces[".scale"], step_O)
    assert ((again - w.float()).abs() <= step_O[:, None] * 0.5001).all()
    assert torch.equal(again[3], torch.zeros(333))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_sources_are_rounded_to_bf16_first(codec: str, dtype: torch.dtype) -> None:
    w = (torch.randn(30, 77) * 0.02).to(dtype)
    ours, rounded = encode(w, codec), encode(w.bfloat16(), codec)
    assert all(torch.equal(ours[name], rounded[name]) for name in rounded)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38])
@pytest.mark.parametrize("at", [0, 70, 499])
def test_weights_that_are_not_finite_are_refused(codec: str, bad: float, at: int) -> None:
    w = torch.randn(5, 100)
    w.view(-1)[at] = bad  # the largest fp32 becomes infinite in bf16
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode(w, codec)


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="int4"):
        encode(matrix((2, 2)), "int4")
    with pytest.raises(ValueError, match="int4"):
        encoded_pieces((2, 2), "int4")
    with pytest.raises(ValueError, match="int4"):
        decode({"": torch.zeros(4, dtype=torch.uint8)}, (2, 2), "int4", torch.float32)


def test_importing_bitsandbytes_prints_nothing_but_what_matters() -> None:
    code = (
        "import logging\n"
        "from lamina.store.codec import import_bitsandbytes\n"
        "import_bitsandbytes()\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('a real problem')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == ""
    assert done.stderr.strip() == "a real problem"


def test_without_bitsandbytes_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert import_bitsandbytes.__wrapped__() is None
