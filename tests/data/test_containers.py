from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.columnar import HubName, hub_name, read_hub
from lamina.data.containers import find_sources, read_source
from lamina.data.jsonio import JsonParser, array_items
from lamina.data.messages import RowError
from lamina.data.readers import RawRow
from lamina.errors import DataError

ROWS: list[dict[str, Any]] = [{"text": "a"}, {"text": "é☺\n"}, {"text": "c", "n": [1, {"x": None}]}]


def rows_of(path: Path, **options: Any) -> list[RawRow]:
    (source,) = find_sources(path)
    return list(read_source(source, **options))


def values(path: Path, **options: Any) -> list[Any]:
    return [row.value for row in rows_of(path, **options)]


def save(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False)
COLUMNS = json.dumps({"text": ["a", "b"], "n": [1, 2]})


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.ndjson", "x", "x.data"])
def test_json_lines_under_any_name(name: str, tmp_path: Path) -> None:
    assert values(save(tmp_path / name, LINES)) == ROWS


@pytest.mark.parametrize("text", [ARRAY, json.dumps(ROWS, indent=2), "\n " + ARRAY + " \n"])
@pytest.mark.parametrize("name", ["x.json", "x", "x.dat"])
def test_json_arrays(text: str, name: str, tmp_path: Path) -> None:
    assert values(save(tmp_path / name, text)) == ROWS


def test_lines_of_an_indented_array(tmp_path: Path) -> None:
    path = save(tmp_path / "x.json", json.dumps([{"a": 1}, {"a": 2}], indent=1))
    assert [row.line for row in rows_of(path)] == [2, 5]


def test_an_object_of_columns_and_an_object_that_is_a_row(tmp_path: Path) -> None:
    assert values(save(tmp_path / "x.json", COLUMNS)) == [
        {"text": "a", "n": 1},
        {"text": "b", "n": 2},
    ]
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    assert values(save(tmp_path / "y.json", json.dumps(row, indent=2))) == [row]
    assert values(save(tmp_path / "z.json", json.dumps(row))) == [row]
    ids = {"input_ids": [1, 2], "labels": [1, 2]}
    assert values(save(tmp_path / "i.json", json.dumps(ids))) == [ids]


@pytest.mark.parametrize("compress", ["gzip", "zstd"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_compression_is_told_by_content(compress: str, name: str, tmp_path: Path) -> None:
    if compress == "gzip":
        data = gzip.compress(LINES.encode())
    else:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(LINES.encode())
        data = sink.getvalue().to_pybytes()
    assert values(save(tmp_path / name, data)) == ROWS


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    for name, text in (("x.jsonl", LINES), ("x.json", ARRAY), ("x.csv", "text\na\n")):
        path = save(tmp_path / name, bom + text.encode())
        assert find_sources(path)[0].bom
        assert values(path)[0] == {"text": "a"}


def test_tables(tmp_path: Path) -> None:
    text = 'text,n\na,1\n"b, ""c""\nd",2\n\nlast,3\n'
    path = save(tmp_path / "x.csv", text)
    assert values(path) == [
        {"text": "a", "n": "1"},
        {"text": 'b, "c"\nd', "n": "2"},
        {"text": "last", "n": "3"},
    ]
    assert [row.line for row in rows_of(path)] == [2, 3, 6]
    assert values(save(tmp_path / "x.tsv", "text\tn\na,b\t1\n")) == [{"text": "a,b", "n": "1"}]
    long = "x" * 300_000
    assert values(save(tmp_path / "long.csv", f"text\n{long}\n")) == [{"text": long}]


def test_rows_of_tables_that_can_t_be_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.csv", b"text,n\na\nb,1\n\xff,2\nc,3,4\n")
    first, good, encoding, more = values(path)
    assert (first.code, more.code, encoding.code) == ("csv-columns", "csv-columns", "encoding")
    assert good == {"text": "b", "n": "1"}
    (error,) = values(save(tmp_path / "y.csv", 'text\n"open\n'))
    assert error.code == "not-csv"
    with pytest.raises(DataError, match="not UTF-8 in its header"):
        values(save(tmp_path / "h.csv", b"te\xffxt\na\n"))
    for header in ("a,a", "a,,b"):
        with pytest.raises(DataError, match="no usable header"):
            values(save(tmp_path / "z.csv", f"{header}\n1,2\n"))


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_the_header_tells_what_stands_between_cells(mark: str, tmp_path: Path) -> None:
    text = f'question{mark}answer\r\n"a, b; c\td"{mark}"e\r\nf"\r\n'
    path = save(tmp_path / "x.csv", text)
    assert values(path) == [{"question": "a, b; c\td", "answer": "e\r\nf"}]
    assert rows_of(path)[0].line == 2
    if mark != "\t":
        tabs = save(tmp_path / "x.tsv", f"a{mark}b\n1\n")
        assert values(tabs) == [{f"a{mark}b": "1"}]


def test_a_table_without_a_line_has_no_row(tmp_path: Path) -> None:
    assert values(save(tmp_path / "x.csv", "")) == []
    assert values(save(tmp_path / "y.csv", "text\n")) == []


def test_plain_text(tmp_path: Path) -> None:
    path = save(tmp_path / "x.txt", "one\ntwo\n\n\nthree\n")
    assert values(path) == [{"text": "one\ntwo\n\n\nthree"}]
    assert values(path, text_rows="line") == [{"text": t} for t in ("one", "two", "three")]
    assert values(path, text_rows="paragraph") == [{"text": "one\ntwo"}, {"text": "three"}]
    assert [row.line for row in rows_of(path, text_rows="paragraph")] == [1, 5]


def test_arrow_files(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": "a", "name": None}],
        [{"role": "user", "content": "b", "name": "Bo"}],
    ]
    table = pa.table({"messages": messages, "n": [1, None]})
    expected = [
        {"messages": [{"role": "user", "content": "a"}], "n": 1},
        {"messages": [{"role": "user", "content": "b", "name": "Bo"}], "n": None},
    ]
    pq.write_table(table, tmp_path / "x.parquet")
    with pa.ipc.new_file(str(tmp_path / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(str(tmp_path / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("x.parquet", "file.arrow", "stream.arrow"):
        assert values(tmp_path / name) == expected
    (tmp_path / "x.parquet").rename(tmp_path / "renamed.jsonl")
    assert values(tmp_path / "renamed.jsonl") == expected


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columnar_files_may_be_compressed_once_more(suffix: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "x")
    else:
        with pa.ipc.new_file(str(tmp_path / "x"), table.schema) as writer:
            writer.write_table(table)
    raw = (tmp_path / "x").read_bytes()
    expected = [{"text": "a"}, {"text": "b"}]
    assert values(save(tmp_path / f"x.{suffix}.gz", gzip.compress(raw))) == expected
    assert values(save(tmp_path / f"x.{suffix}.zst", pa.compress(raw, "zstd", asbytes=True))) == (
        expected
    )
    with pytest.raises(DataError, match=rf"bad.{suffix}.gz is damaged"):
        values(save(tmp_path / f"bad.{suffix}.gz", gzip.compress(raw[:-20])))


def test_files_compressed_in_parts_are_read_to_their_end(tmp_path: Path) -> None:
    """As `cat a.gz b.gz` and parallel compressors write them."""
    half = LINES.encode()
    parts = {"gz": gzip.compress(half), "zst": pa.compress(half, "zstd", asbytes=True)}
    for suffix, part in parts.items():
        assert len(rows_of(save(tmp_path / f"x.jsonl.{suffix}", part * 3))) == 3 * len(ROWS)


def test_an_array_is_one_whatever_it_is_called(tmp_path: Path) -> None:
    text = "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n"
    assert values(save(tmp_path / "x.jsonl", text)) == ROWS


def test_texts_in_arrow_files_that_are_not_utf8(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", b"more"], pa.binary()).view(pa.utf8())
    table = pa.table({"text": texts})
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    good, bad, more = values(tmp_path / "x.arrow")
    assert (good, bad.code, more) == ({"text": "good"}, "encoding", {"text": "more"})


def test_damaged_offsets_are_not_followed(tmp_path: Path) -> None:
    offsets = pa.array([0, 4, 2**31 - 1, 5], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.utf8(), 3, [None, offsets, pa.py_buffer(b"good.")])
    table = pa.table({"text": texts})
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="damaged"):
        values(tmp_path / "x.arrow")


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(folder)
    assert values(folder) == ROWS[:2]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(
        tmp_path / "splits"
    )
    with pytest.raises(DataError, match="several splits: train"):
        values(tmp_path / "splits")
    assert values(tmp_path / "splits" / "train") == ROWS[:2]


def test_names_of_hub_datasets(tmp_path: Path) -> None:
    assert hub_name("owner/name") == HubName("owner/name")
    assert hub_name("owner/name:config@test") == HubName("owner/name", "config", "test")
    assert str(HubName("owner/name", "config", "test")) == "owner/name:config@test"
    for path in ("data.jsonl", "folder/data.jsonl", "/a/b", "a/b/c", "a/b.csv.gz"):
        assert hub_name(path) is None


def test_datasets_are_streamed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    # `datasets` takes a folder for a dataset's name too, which needs no network.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS[:2])
    save(tmp_path / "owner" / "name" / "train.jsonl", lines)
    monkeypatch.chdir(tmp_path)
    assert list(read_hub(HubName("owner/name"))) == ROWS[:2]
    assert list(read_hub(HubName("owner/name", split="train"))) == ROWS[:2]
    with pytest.raises(DataError, match="owner/name@none can't be read"):
        list(read_hub(HubName("owner/name", split="none")))


def test_damaged_files_are_errors(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"] * 1000})
    pq.write_table(table, tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    for damaged in (data[:-20], data[:4] + b"\0" * 200):
        with pytest.raises(DataError, match="damaged"):
            values(save(tmp_path / "bad.parquet", damaged))
    with pytest.raises(DataError, match="can't be read"):
        values(save(tmp_path / "x.jsonl.gz", gzip.compress(LINES.encode() * 99)[:-9]))
    with pytest.raises(DataError, match="UTF-16"):
        values(save(tmp_path / "x.jsonl", LINES.encode("utf-16")))


def test_globs_and_missing_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        save(tmp_path / name, LINES)
    found = find_sources(f"{tmp_path}/*.jsonl")
    assert [source.path.name for source in found] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(DataError) as caught:
        find_sources([f"{tmp_path}/*.csv", tmp_path / "none.jsonl"])
    assert len(caught.value.problems) == 2


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="can't be read") as caught:
        find_sources(tmp_path / "pipe")
    assert "pipe is not an ordinary file" in caught.value.problems[0]


# -- JSON's own mistakes --------------------------------------------------------------------------

MISTAKES = [
    ('{"a": 1, "a": 2}', "duplicate-key"),
    ('{"b": {"a": 1, "a": 2}}', "duplicate-key"),
    ('{"a": "\\ud83d"}', "encoding"),
    ('{"a": 1', "not-json"),
    ('{"a": 1} x', "not-json"),
    ("{'a': 1}", "not-json"),
    ('{"a": ' + "1" * 5000 + "}", "not-json"),
    ("[1, 2]", "not-object"),
    ("null", "not-object"),
    ('"text"', "not-object"),
]


@pytest.mark.parametrize(("line", "code"), MISTAKES)
def test_lines_with_a_mistake(line: str, code: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.jsonl", f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    before, mistake, after = rows_of(path)
    assert (before.value, after.value) == ({"a": 1}, {"a": 2})
    assert isinstance(mistake.value, RowError)
    assert (mistake.line, mistake.value.code) == (2, code)
    assert mistake.raw.decode().strip() == line


def test_what_json_has_no_word_for_is_noted(tmp_path: Path) -> None:
    for text in ('{"a": NaN}', '{"a": [-Infinity]}'):
        for name, whole in (("x.jsonl", text), ("x.json", f"[{text}, {{}}]")):
            assert rows_of(save(tmp_path / name, whole))[0].notes == ("nan",)
    assert rows_of(save(tmp_path / "y.jsonl", '{"a": "NaN"}'))[0].notes == ()


def test_a_broken_array_keeps_what_came_before(tmp_path: Path) -> None:
    for end in ('{"a": 3', '{"a": 3} {"a": 4}]', '{"a": 3}', "x]", '{"a": 3}] more', "", ","):
        *good, error = values(save(tmp_path / "x.json", '[{"a": 1},\n{"a": 2},\n' + end))
        assert good[:2] == [{"a": 1}, {"a": 2}]
        assert error.code == "not-json"
    one, two, three = values(save(tmp_path / "x.json", '[{"a": 1, "a": 2}, 7, {"a": 3}]'))
    assert (one.code, two.code, three) == ("duplicate-key", "not-object", {"a": 3})


class Dribble:
    """A file that gives a few bytes at a time."""

    def __init__(self, data: bytes, seed: int):
        self._data = data
        self._random = random.Random(seed)

    def read(self, size: int) -> bytes:
        take = self._random.randint(1, min(size, 7))
        part, self._data = self._data[:take], self._data[take:]
        return part


JSON_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    items=st.lists(JSON_VALUES, max_size=5),
    seed=st.integers(0, 99),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_arrays_are_read_whatever_the_chunks(
    items: list[Any], seed: int, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    found = list(array_items(Dribble(text.encode(), seed), JsonParser()))  # type: ignore[arg-type]
    assert [value for _, value in found] == items
    lines = [line for line, _ in found]
    assert lines == sorted(lines)
