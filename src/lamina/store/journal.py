"""Which files of a store are finished: kept while a preparation is under way, and after it.

While it is under way the record is a journal, one JSON line a finished file, forced to disk; a last
line cut off by a crash is ignored. Of a file that is written in parts, a line says which files of
the source it has all that it needs of. Afterwards the record is `store.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina.errors import StoreError
from lamina.store.files import LOCK, TEMPORARY, Writer
from lamina.store.layout import JOURNAL, MANIFEST, read_manifest, seal, size_problem

__all__ = ["ORIGIN", "PART", "Record", "read_origin", "write_origin"]

#: Which repository and commit of the hub a store is made of.
ORIGIN = "origin.json"
#: What follows the name of a file of which only some tensors are there.
PART = ".part"


class Record:
    """The finished files of the store in `root`.

    Args:
        identity: what is being made: the entries of store.json that are known beforehand.

    Raises:
        StoreError: the folder holds something else.
    """

    def __init__(self, root: Path, identity: dict[str, Any]):
        self._root = root
        self._identity = identity
        self._entries: dict[str, Any] = {}
        self._parts: dict[str, list[str]] = {}
        self._whole = (root / MANIFEST).exists()  # the store was finished before: only mend it
        if self._whole:
            manifest = read_manifest(root)
            _check_same(root, manifest, identity)
            for entry in manifest["blocks"]:
                self._entries[entry["file"]] = entry
            for entry in manifest["extra"]:
                self._entries[entry[0]] = entry
            (root / JOURNAL).unlink(missing_ok=True)
        elif (root / JOURNAL).exists():
            first, *lines = _lines(root / JOURNAL)
            _check_same(root, first, identity)
            for line in lines:
                if "part" in line:
                    self._parts.setdefault(line["part"], []).append(line["source"])
                else:
                    self._entries[line["file"]] = line["entry"]
            self._parts = {f: p for f, p in self._parts.items() if (root / (f + PART)).exists()}
            self._write_journal()
        else:
            _check_empty(root)
            self._write_journal()
        for leftover in (*root.glob(f"*{TEMPORARY}"), *root.glob(f"blocks/*{TEMPORARY}")):
            leftover.unlink()
        for leftover in (*root.glob(f"*{PART}"), *root.glob(f"blocks/*{PART}")):
            if str(leftover.relative_to(root)).removesuffix(PART) not in self._parts:
                leftover.unlink()

    def has(self, file: str, nbytes: int) -> bool:
        """Whether that file is finished and still has its size."""
        return file in self._entries and size_problem(self._root / file, nbytes) is None

    def check(self, file: str, entry: Any) -> None:
        """Sees that a file made anew for a finished store is what it was.

        Raises:
            StoreError: it isn't.
        """
        if self._whole and self._entries.get(file) != json.loads(json.dumps(entry)):
            raise StoreError(
                f"{self._root / file} came out differently from what the store had.",
                hint="The checkpoint or a library has changed: delete the folder and prepare anew.",
            )

    def add(self, file: str, entry: Any) -> None:
        """Records a finished file."""
        self._entries[file] = entry
        self._parts.pop(file, None)
        self._append({"file": file, "entry": entry})

    def parts(self, file: str) -> Sequence[str]:
        """The files of the source of which an unfinished file has all that it needs."""
        return self._parts.get(file, ())

    def add_part(self, file: str, source: str) -> None:
        """Records that an unfinished file has all that it needs of a file of the source."""
        self._parts.setdefault(file, []).append(source)
        self._append({"part": file, "source": source})

    def _append(self, line: Any) -> None:
        if not self._whole:
            with (self._root / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(_line(line))
                journal.flush()
                os.fsync(journal.fileno())

    def finish(self, blocks: Sequence[str], extra: Sequence[str], notes: Sequence[str]) -> None:
        """Writes store.json, unless it is there; the files are given in the store's order."""
        if self._whole:
            return
        manifest = {
            **self._identity,
            "notes": list(notes),
            "blocks": [self._entries[file] for file in blocks],
            "extra": [self._entries[file] for file in extra],
        }
        manifest["fingerprint"] = seal(manifest)
        with Writer(self._root / MANIFEST) as writer:
            writer.write(memoryview(_line(manifest).encode()))
        (self._root / JOURNAL).unlink()

    def _write_journal(self) -> None:
        lines = [{"file": file, "entry": entry} for file, entry in self._entries.items()]
        lines += [{"part": f, "source": s} for f, parts in self._parts.items() for s in parts]
        text = "".join(_line(line) for line in [self._identity, *lines])
        with Writer(self._root / JOURNAL) as writer:
            writer.write(memoryview(text.encode()))


def read_origin(root: Path) -> dict[str, str]:
    """What a store on the hub was made of, or nothing."""
    try:
        origin = json.loads((root / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return origin if isinstance(origin, dict) else {}


def write_origin(root: Path, origin: dict[str, str]) -> None:
    """Keeps what a store is made of, so that a preparation goes on with the same."""
    if read_origin(root) != origin:
        with Writer(root / ORIGIN) as writer:
            writer.write(memoryview(_line(origin).encode()))


def _line(value: Any) -> str:
    return json.dumps(value) + "\n"


def _lines(file: Path) -> list[Any]:
    """The whole lines of a journal."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines or [{}]


def _check_same(root: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    differing = [key for key in asked if found.get(key) != asked[key]]
    if not differing:
        return
    problems = []
    for key in differing:
        if key == "source":
            problems.append("It was made from another checkpoint, or from another version of it.")
        elif key == "config":
            problems.append("The config of the model differs.")
        else:
            problems.append(f"Its {key} is {found.get(key)!r}; asked for is {asked[key]!r}.")
    raise StoreError(
        f"{root} is a store of something else.",
        hint="Prepare into another folder, or delete this one.",
        problems=problems,
    )


def _check_empty(root: Path) -> None:
    others = sorted(path.name for path in root.iterdir() if path.name != LOCK)
    if others:
        raise StoreError(
            f"{root} isn't empty and isn't a store: it holds {', '.join(others[:3])}.",
            hint="Prepare into a new folder.",
        )
