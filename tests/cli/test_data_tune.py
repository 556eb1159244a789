"""`lamina tune --data` takes whatever `lamina data detect` knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cli.rows import chat
from tests.reference import save, tiny_mixtral

from lamina.cli.main import main
from lamina.data.shapes import SHAPES

#: A file for each container that can be written, but for text.
CONTAINERS = ("a.jsonl.gz", "b.json", "c.csv", "d.tsv.zst", "e.parquet", "f.arrow")


@pytest.fixture
def recipe(work: Path, byte_tokenizer: Path, tmp_path: Path) -> Path:
    """Of a tiny random Mixtral, prepared."""
    model = save(tiny_mixtral(vocab_size=272), tmp_path / "tiny")
    shutil.copytree(byte_tokenizer, model, dirs_exist_ok=True)
    assert main(["prepare", str(model), "--codec", "bf16", "--store", f"{work}/store"]) == 0
    settings = "dtype: float32\ncodec: bf16\ntokens_per_step: 512\nmax_length: 512\nr: 2\n"
    path = work / "tiny.yaml"
    path.write_text(f"model: {model}\nstore: {work}/store\nmax_steps: 1\n{settings}")
    return path


def write_all(folder: Path) -> dict[str, int]:
    """A file in every format and one in every container; how many rows each has."""
    datasets = pytest.importorskip("datasets")
    files = {}
    for shape in SHAPES:
        row = {"input_ids": [1, 2], "labels": [-100, 2]} if shape.name == "tokens" else shape.row
        (folder / f"{shape.name}.jsonl").write_text(json.dumps(row) + "\n")
        files[f"{shape.name}.jsonl"] = 1
    rows = [chat(f"{n} + 1?", f"{n + 1}") for n in range(3)]
    (folder / "chat.ndjson").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in CONTAINERS:
        assert main(["data", "convert", "chat.ndjson", "--out", name]) == 0
        files[name] = 3
    (folder / "notes.txt").write_text("One.\nTwo.\n\nThree.\n")
    files["notes.txt"] = 2
    for name in ("part-1.jsonl", "part-2.jsonl"):
        (folder / name).write_text(json.dumps(rows[0]) + "\n")
    files["part-*.jsonl"] = 2
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    files["saved"] = 3
    # `datasets` takes a folder for a dataset's name too, which needs no network.
    (folder / "owner" / "name-1.5").mkdir(parents=True)
    shutil.copy(folder / "chat.ndjson", folder / "owner" / "name-1.5" / "train.jsonl")
    files["owner/name-1.5@train"] = 3
    return files


def test_tune_takes_every_format_and_container(
    recipe: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_all(work)
    data = [word for file in files for word in ("--data", file)]
    assert main(["data", "detect", *files]) == 0
    capsys.readouterr()

    assert main(["tune", str(recipe), *data, "--out", "run", "text_rows=paragraph"]) == 0

    out, err = capsys.readouterr()
    assert "steps          1 in" in out
    assert "3 rows have a pair of answers, of which the chosen one is trained.\n" in err
    assert main(["eval", "run", *data, "--json"]) == 0  # the run remembers what a row is
    assert json.loads(capsys.readouterr().out)["rows"] == sum(files.values())


def test_a_run_tells_what_became_of_long_rows(
    recipe: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("a?", "b"), chat("a?", "b" * 600)]
    (work / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["tune", str(recipe), "--data", "a.jsonl", "--out"]
    capsys.readouterr()

    assert main([*words, "one"]) == 0
    assert "left out       1 row, longer than max_length\n" in capsys.readouterr().out
    assert main([*words, "two", "too_long=truncate"]) == 0
    out = capsys.readouterr().out
    assert "left out" not in out
    assert "shortened      1 row, longer than max_length\n" in out
    assert json.loads((work / "two" / "summary.json").read_text())["shortened_rows"] == 1
