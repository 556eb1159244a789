"""Make a small chat dataset out of the docstrings of Python's standard library.

Each row asks about one function, method or class by its help text, and is answered by one line of
JSON with the keys module, name, signature and summary. Every machine with Python has this text.

    python examples/docstrings/make_dataset.py [FOLDER]

writes `train.jsonl` and `held-out.jsonl` into the folder. No module is in both, so what is held out
asks for the skill and not for memory. One version of Python always gives the same files.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

KEYS = ("module", "name", "signature", "summary")
SYSTEM = "Answer in JSON."

#: Documented modules whose import does nothing else, as words. Those that a machine lacks are left
#: out.
MODULES = """
    abc argparse array ast asyncio.events asyncio.locks asyncio.queues asyncio.streams
    asyncio.subprocess asyncio.tasks base64 bdb binascii bisect bz2 calendar cmath cmd code codecs
    codeop collections collections.abc colorsys compileall concurrent.futures configparser
    contextlib contextvars copy copyreg csv ctypes.util curses.ascii curses.textpad dataclasses
    datetime dbm.dumb decimal difflib dis doctest email.charset email.contentmanager email.encoders
    email.feedparser email.generator email.header email.headerregistry email.message email.parser
    email.policy email.utils enum faulthandler filecmp fileinput fnmatch fractions ftplib functools
    gc getopt getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client
    http.cookiejar http.cookies http.server imaplib importlib.abc importlib.metadata
    importlib.resources importlib.util inspect io ipaddress itertools json json.decoder json.encoder
    keyword linecache locale logging logging.config logging.handlers lzma mailbox marshal math
    mimetypes modulefinder multiprocessing.connection multiprocessing.managers multiprocessing.pool
    multiprocessing.shared_memory netrc ntpath numbers operator optparse os pathlib pdb pickle
    pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr
    pydoc queue quopri random re reprlib rlcompleter runpy sched secrets select selectors shelve
    shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics string
    stringprep struct subprocess symtable sysconfig tabnanny tarfile tempfile textwrap threading
    time timeit token tokenize trace traceback tracemalloc tty types typing unicodedata
    unittest.case unittest.loader unittest.mock unittest.suite urllib.error urllib.parse
    urllib.request urllib.response urllib.robotparser uuid venv warnings wave weakref webbrowser
    wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util wsgiref.validate
    xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax.handler xml.sax.saxutils
    xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""

#: Characters: rows stay short, so that a small model sees many of them in a few minutes.
MAX_SIGNATURE = 56
MAX_SUMMARY = 80
MAX_BODY = 200
#: Rows of one module, so that no large module drowns the others.
MAX_TRAIN_ROWS = 16
MAX_HELD_OUT_ROWS = 3
#: Held-out rows in all: as many as are soon answered.
HELD_OUT_ROWS = 48


@dataclass(frozen=True)
class Entry:
    """One documented thing.

    Args:
        kind: function, method or class.
        name: with its class before it, if it is a method.
        body: the start of its docstring, flush left.
    """

    module: str
    kind: str
    name: str
    signature: str
    summary: str
    body: str

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The conversation, as a chat row."""
        indented = "\n".join(f"    {line}".rstrip() for line in self.body.splitlines())
        question = (
            f'Help on {self.kind} "{self.name}" in module "{self.module}":\n\n'
            f"{self.signature}\n{indented}"
        )
        answer = json.dumps({key: getattr(self, key) for key in KEYS})
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }


def entries() -> Iterator[Entry]:
    """All entries of the modules that this Python has, without repetitions."""
    seen: set[tuple[str, str]] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some modules say, when looked at, that they will go
        for name in MODULES.split():
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            for entry in _of_module(module):
                key = (entry.signature, entry.summary)
                if key not in seen:
                    seen.add(key)
                    yield entry


def held_out(module: str) -> bool:
    """Whether the module's rows are kept from training: about one module in nine."""
    return zlib.crc32(module.encode()) % 9 == 0


def make_dataset(folder: Path) -> dict[str, int]:
    """Write `train.jsonl` and `held-out.jsonl`.

    Returns:
        The rows and modules of each: `train`, `train_modules`, `held_out`, `held_out_modules`.
    """
    by_module: dict[str, list[Entry]] = {}
    for entry in entries():
        by_module.setdefault(entry.module, []).append(entry)
    train: list[Entry] = []
    kept: list[Entry] = []
    for name, found in by_module.items():
        # Chosen and ordered by a checksum: neighbours in a module are often alike.
        found.sort(key=_shuffled)
        if held_out(name):
            kept += found[:MAX_HELD_OUT_ROWS]
        else:
            train += found[:MAX_TRAIN_ROWS]
    train.sort(key=_shuffled)
    kept = sorted(kept, key=_shuffled)[:HELD_OUT_ROWS]
    folder.mkdir(parents=True, exist_ok=True)
    for rows, file in ((train, "train.jsonl"), (kept, "held-out.jsonl")):
        lines = [json.dumps(entry.row()) + "\n" for entry in rows]
        (folder / file).write_text("".join(lines), encoding="utf-8")
    return {
        "train": len(train),
        "train_modules": len({entry.module for entry in train}),
        "held_out": len(kept),
        "held_out_modules": len({entry.module for entry in kept}),
    }


def _shuffled(entry: Entry) -> tuple[int, str]:
    key = f"{entry.module}.{entry.name}"
    return zlib.crc32(key.encode()), key


def _of_module(module: ModuleType) -> Iterator[Entry]:
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not _defined_in(value, module.__name__):
            continue
        if inspect.isclass(value):
            if entry := _entry(module.__name__, "class", name, name, value):
                yield entry
            for method, raw in sorted(vars(value).items()):
                if method.startswith("_") or not callable(getattr(value, method, None)):
                    continue
                if inspect.isclass(raw):
                    continue
                function = getattr(value, method)
                full = f"{name}.{method}"
                if entry := _entry(module.__name__, "method", full, method, function):
                    yield entry
        elif inspect.isroutine(value) and (
            entry := _entry(module.__name__, "function", name, name, value)
        ):
            yield entry


def _defined_in(value: Any, module: str) -> bool:
    """Whether it is the module's own, be it through its accelerator in C or a private part."""
    home = getattr(value, "__module__", None)
    return isinstance(home, str) and (
        home in (module, f"_{module}") or home.startswith(f"{module}._")
    )


def _entry(module: str, kind: str, full: str, name: str, value: Any) -> Entry | None:
    """The entry, or None where there is no text of its own or it is too long or odd."""
    if not isinstance(getattr(value, "__doc__", None), str):
        return None
    try:
        signature = f"{name}{inspect.signature(value)}"
    except Exception:  # a signature is evaluated code: some raise what nobody foresaw
        return None
    lines = inspect.cleandoc(value.__doc__).splitlines()
    first = _flat(itertools.takewhile(str.strip, lines))
    end = first.find(". ")
    summary = first if end < 0 else first[: end + 1]
    body = _trimmed(lines, summary)
    text = signature + summary + body
    if (
        len(signature) > MAX_SIGNATURE
        or not 12 <= len(summary) <= MAX_SUMMARY
        or not summary[0].isalpha()
        or not (text.isascii() and text.replace("\n", " ").isprintable())
        # What would be escaped in JSON, or shows where an object lies in memory.
        or any(mark in signature + summary for mark in ('"', "\\", "<"))
    ):
        return None
    return Entry(module, kind, full, signature, summary, body)


def _trimmed(lines: list[str], summary: str) -> str:
    """The first lines: up to `MAX_BODY` characters, and as many as the summary takes."""
    kept: list[str] = []
    for line in lines:
        if len("\n".join([*kept, line])) > MAX_BODY and summary in _flat(kept):
            break
        kept.append(line)
    return "\n".join(kept).strip()


def _flat(lines: Iterable[str]) -> str:
    """The words of the lines, in one line."""
    return " ".join(" ".join(lines).split())


def main() -> None:
    """The command line."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo/data")
    counts = make_dataset(folder)
    print(
        f"{folder}: {counts['train']} rows of {counts['train_modules']} modules to train, "
        f"{counts['held_out']} rows of {counts['held_out_modules']} others held out"
    )


if __name__ == "__main__":
    main()
