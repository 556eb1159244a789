"""No input ends in a traceback, and no row is lost: mutated files, and rows of anything."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.data.check import check
from lamina.data.convert import convert
from lamina.data.dataset import load_dataset
from lamina.data.dedup import dedup
from lamina.data.detect import detect
from lamina.data.formats import Input
from lamina.data.mend import mend
from lamina.data.preview import preview, to_html, to_text
from lamina.data.shapes import SHAPES
from lamina.data.split import split
from lamina.data.stats import stats
from lamina.data.template import Renderer
from lamina.errors import LaminaError

SUFFIXES = [
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".txt",
    ".jsonl.gz",
    ".json.zst",
]


@pytest.fixture(scope="module")
def renderer(smol: Any) -> Renderer:
    return Renderer(smol)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def exercise(path: Path, renderer: Renderer, folder: Path) -> None:
    """Do everything with a file that may be anything. Only our own errors may come out."""
    with contextlib.suppress(LaminaError):
        detect(path)
    with contextlib.suppress(LaminaError):
        report = check(Input(path), renderer=renderer, eval_data=Input(path), max_length=50)
        assert report.bad_rows <= report.rows
        alone = check(Input(path), near_duplicates=False)
        assert alone.rows == report.rows
    for to, name in (("messages", "out.jsonl"), ("sharegpt", "out.csv"), ("text", "out.parquet")):
        with contextlib.suppress(LaminaError):
            done = convert(Input(path), folder / name, to=to, force=True)
            assert done.rows_in == done.rows_out + done.rejected == report.rows
            again = list(Input(folder / name).rows()) if done.rows_out else []
            assert len(again) == done.rows_out
    with contextlib.suppress(LaminaError):
        gone = dedup(Input(path), folder / "dedup.jsonl", near=True, force=True)
        assert gone.rows_in == gone.rows_out + gone.rejected
    with contextlib.suppress(LaminaError):
        mended = mend(Input(path), folder / "mend.jsonl", force=True)
        assert mended.rows_in == mended.rows_out + mended.rejected
    with contextlib.suppress(LaminaError):
        parts = split(Input(path), folder / "a.jsonl", folder / "b.jsonl", fraction=0.5, force=True)
        assert parts.rows_in == parts.rows_first + parts.rows_second + parts.rejected
    with contextlib.suppress(LaminaError):
        stats(Input(path), renderer, max_length=30, too_long="split", tokens_per_step=100)
    with contextlib.suppress(LaminaError):
        shown = list(preview(Input(path), renderer))
        to_text(shown, color=False).encode()
        to_html(shown, title="x").encode()
    with contextlib.suppress(LaminaError):
        load_dataset(path, renderer.tokenizer, 30, too_long="truncate", renderer=renderer)


def seed_file(folder: Path, suffix: str, generator: random.Random) -> Path:
    source = folder / "seed.jsonl"
    shape = generator.choice(SHAPES)
    rows = [shape.row] * generator.randint(1, 4)
    if suffix not in (".parquet", ".arrow") and generator.random() < 0.5:
        rows.append(generator.choice(SHAPES).row)
    source.write_text("".join(json.dumps({**row, "id": k}) + "\n" for k, row in enumerate(rows)))
    path = folder / f"mutant{suffix}"
    if suffix == ".txt":
        path.write_bytes(source.read_bytes())
    else:
        convert(Input(source), path, to=shape.name, force=True)
    return path


INSERTED = [b'"', b"{", b"]", b",", b"\n", b"\r", b"\0", b"\xff", b"null", b"NaN", b"\\u", b"true"]
INSERTED += [b"\\ud83d", b"1e999", b'"role"', b"[[[[", b"\xe2\x98", b"-", b"\xef\xbb\xbf"]


def mutate(data: bytes, generator: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(generator.randint(1, 6)):
        at = generator.randrange(len(result) + 1)
        kind = generator.randrange(6)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del result[at : at + generator.randint(1, 20)]
        elif kind == 2:
            result[at:at] = generator.choice(INSERTED)
        elif kind == 3:
            other = generator.randrange(len(result) + 1)
            result[at:at] = result[other : other + generator.randint(1, 60)]
        elif kind == 4:
            result = result[: max(at, 1)]
        else:
            result[at:at] = bytes(generator.randrange(256) for _ in range(generator.randint(1, 5)))
    return bytes(result)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mutated_files(suffix: str, renderer: Renderer, folder: Path) -> None:
    generator = random.Random(suffix)
    for _ in range(8):
        path = seed_file(folder, suffix, generator)
        path.write_bytes(mutate(path.read_bytes(), generator))
        exercise(path, renderer, folder)


COLUMNS = sorted({column for shape in SHAPES for column in shape.columns})
KEYS = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "id"]
KEYS += ["type", "text", "label", "weight", "train", "tool_call_id", "parameters", "messages"]
WORDS = [
    "user",
    "assistant",
    "gpt",
    "human",
    "system",
    "tool",
    "function_call",
    "text",
    "",
    " ",
    "x",
]
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=4), max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=ROWS)
def test_rows_of_anything(rows: list[Any], renderer: Renderer, folder: Path) -> None:
    path = folder / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    exercise(path, renderer, folder)


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([*SUFFIXES, "", ".xyz"]))
def test_bytes_of_anything(data: bytes, suffix: str, renderer: Renderer, folder: Path) -> None:
    path = folder / f"bytes{suffix}"
    path.write_bytes(data)
    exercise(path, renderer, folder)


def test_depths_of_anything(renderer: Renderer, folder: Path) -> None:
    for depth in (100, 500, 990, 2000, 100_000):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            deep = opening * depth + "1" + closing * depth
            call = {"function": {"name": "f", "arguments": deep}}
            messages = [
                {"role": "assistant", "content": "x", "tool_calls": [call]},
                {"role": "assistant", "content": "y"},
            ]
            path = folder / "deep.jsonl"
            path.write_text(
                f'{{"text": "a", "b": {deep}}}\n{deep}\n{{"messages": {deep}}}\n'
                + json.dumps({"messages": messages})
                + "\n"
                + json.dumps({"conversations": deep, "tools": deep})
            )
            exercise(path, renderer, folder)
