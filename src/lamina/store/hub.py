"""A checkpoint on the hub: read without downloading it, then brought file by file.

The commit is fixed before anything else, and kept beside the store (`origin.json`), so that a
preparation that goes on days later takes the files of the same version. Headers are read by byte
range: what can't be converted is known before anything big is downloaded.

Files come through huggingface_hub, which goes on with a dropped connection where it broke off;
where it gives up, the file is asked for again a few times. They land in the hub's own cache or,
where they are to be discarded, in a folder beside the store.
"""

from __future__ import annotations

import inspect
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub import try_to_load_from_cache as cached
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but made lazily
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    tqdm,
)

from lamina.errors import CheckpointError, StoreError
from lamina.store.checkpoint import Checkpoint
from lamina.store.convert import COPY_LIMIT, is_copied
from lamina.store.files import Meter
from lamina.store.headers import INDEX, SINGLE, Header, indexed_files, read_header, read_on_disk
from lamina.store.hub_errors import hub_errors, is_transient
from lamina.store.journal import read_origin
from lamina.store.layout import MANIFEST, Store

__all__ = ["Hub", "cached_checkpoint", "finished_store"]

#: Seconds before a file is asked for again that huggingface_hub has given up.
_WAITS = (2.0, 10.0, 30.0, 60.0)
#: Most headers are smaller than this, so that one request brings them.
_HEADER_BYTES = 256 << 10
_CONNECTIONS = 8
_TIMEOUT = 30.0


class Hub:
    """A model on the hub, and the files of it that are here.

    Args:
        repo: its name, `owner/model`.
        out: the store that is made of it.
        discard: whether a file goes as soon as all that it holds is in the store.

    Raises:
        CheckpointError: the hub can't be reached, or doesn't give the model, or the model has no
            safetensors.
        StoreError: `out` was begun with a version that the hub has no more.
    """

    def __init__(self, repo: str, out: Path, *, discard: bool):
        self.repo = repo
        self._out = out
        self._discard = discard
        self._source = out.with_name(f"{out.name}.source")
        begun = read_origin(out)
        fixed = begun.get("revision") if begun.get("repo") == repo else None
        with hub_errors(repo, fixed):
            info = HfApi().model_info(repo, revision=fixed, files_metadata=True, timeout=_TIMEOUT)
            if fixed is None:  # by its branch, so that the cache knows which commit that is
                hf_hub_download(repo, "config.json")
            self.revision = str(info.sha)
            self._sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
            #: Where the small files are: config, tokenizer, index.
            self.folder = self._small_files()
        self._files = self._weight_files()
        self._headers: dict[Path, Header] = {}

    @property
    def origin(self) -> dict[str, str]:
        """What `origin.json` says."""
        return {"repo": self.repo, "revision": self.revision}

    def checkpoint(self) -> Checkpoint:
        """The checkpoint, of which only the headers have been read.

        Raises:
            CheckpointError: headers can't be read.
        """
        files, names = self._files
        with hub_errors(self.repo), ThreadPoolExecutor(_CONNECTIONS) as pool:
            found = dict(zip(files, pool.map(self._header, files), strict=True))

        def header(file: Path) -> Header:
            read = found[file]
            if isinstance(read, ValueError):
                raise read
            self._headers[file] = read
            return read

        return Checkpoint.read(self.folder, files, names, header)

    # Bringing the files

    def nbytes(self, file: Path) -> int:
        return self._sizes[file.name]

    def check_space(self, root: Path, store_bytes: int, files: Sequence[Path]) -> None:
        away = [self._sizes[file.name] for file in files if not file.exists()]
        largest, everything = max(away, default=0), sum(away)
        if self._discard:
            _check_room(root, {"the store": store_bytes, "the largest file": largest}, "")
            return
        less = store_bytes + largest
        hint = f", or use --discard-source, which needs {less / 1e9:.2f} GB in all"
        cache = Path(constants.HF_HUB_CACHE)
        if _existing(cache).stat().st_dev == root.stat().st_dev:
            _check_room(root, {"the store": store_bytes, "the download": everything}, hint)
        else:
            _check_room(root, {"the store": store_bytes}, "")
            _check_room(cache, {"the download": everything}, hint)

    def fetch(self, file: Path, meter: Meter) -> None:
        count = _Count(meter)
        if not file.exists():
            for left_by_a_kill in self._source.glob(".cache/huggingface/download/*.incomplete"):
                left_by_a_kill.unlink()
            with hub_errors(self.repo):
                self._download(file.name, count)
        count.reach(self._sizes[file.name])
        try:
            same = read_on_disk(file) == self._headers[file]
        except (OSError, ValueError):
            same = False
        if not same:
            file.resolve().unlink(missing_ok=True)  # in the cache it is a link
            file.unlink(missing_ok=True)
            raise CheckpointError(
                f"{file.name} of {self.repo} came out differently from what the hub said it is.",
                hint="Run the same command again: it downloads this file anew.",
            )

    def _download(self, name: str, count: _Count) -> None:
        where: dict[str, Any] = {"local_dir": self._source} if self._discard else {}
        if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
            where["tqdm_class"] = count.bar()
        for wait in (*_WAITS, None):
            try:
                hf_hub_download(self.repo, name, revision=self.revision, **where)
                return
            except Exception as error:  # a download ends in exceptions of four libraries
                if wait is None or not is_transient(error):
                    raise
            time.sleep(wait)

    def release(self, file: Path) -> None:
        if self._discard and file.parent == self._source:
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """The store is whole: what was kept to make it can go."""
        if self._discard:
            shutil.rmtree(self._source, ignore_errors=True)

    # Reading what is small

    def _small_files(self) -> Path:
        """Brings config, tokenizer, licences and index into the cache."""
        names = [
            name
            for name, size in self._sizes.items()
            if (is_copied(name) or name == INDEX) and "/" not in name and size <= COPY_LIMIT
        ]
        for name in names:
            hf_hub_download(self.repo, name, revision=self.revision)
        return Path(hf_hub_download(self.repo, "config.json", revision=self.revision)).parent

    def _weight_files(self) -> tuple[list[Path], set[str]]:
        """The files with weights, where they are or will be, and the tensors that the index says
        are in them."""
        if (self.folder / INDEX).is_file():
            names, tensors = indexed_files(self.folder / INDEX)
        else:
            names, tensors = [SINGLE], set()
        if lost := [name for name in names if name not in self._sizes]:
            raise CheckpointError(
                f"{self.repo} has no {lost[0]}"
                + (f", which its {INDEX} names." if tensors else f" and no {INDEX}."),
                hint="Only weights in safetensors can be prepared: pickled ones can run any code.",
            )
        return [self._place(name) for name in names], tensors

    def _place(self, name: str) -> Path:
        here = cached(self.repo, name, revision=self.revision)
        if isinstance(here, str):
            return Path(here)
        return (self._source if self._discard else self.folder) / name

    def _header(self, file: Path) -> Header | ValueError:
        try:
            if file.exists():
                return read_on_disk(file)
            size = self._sizes[file.name]
            first = self._range(file.name, 0, min(size, _HEADER_BYTES))

            def read(start: int, nbytes: int) -> bytes:
                if start + nbytes <= len(first):
                    return first[start : start + nbytes]
                return self._range(file.name, start, nbytes)

            return read_header(file, size, read)
        except ValueError as error:
            return error

    def _range(self, name: str, start: int, nbytes: int) -> bytes:
        """Bytes of a file on the hub."""
        nbytes = min(nbytes, self._sizes[name] - start)
        if nbytes <= 0:
            return b""
        headers = build_hf_headers() | {
            "Range": f"bytes={start}-{start + nbytes - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.repo, name, revision=self.revision)
        with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code != 206 and start > 0:
                raise CheckpointError(f"{url} can't be read in part, so it can't be looked into.")
            content = bytearray()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) >= nbytes:
                    break
        return bytes(content[:nbytes])


class _Count:
    """Tells a meter how much of a file is there; what is downloaded again isn't counted twice."""

    def __init__(self, meter: Meter):
        self._meter = meter
        self._told = 0

    def reach(self, nbytes: int) -> None:
        if nbytes > self._told:
            self._meter.add(nbytes - self._told)
            self._told = nbytes

    def bar(self) -> type[tqdm]:
        """A progress bar for huggingface_hub that shows nothing itself."""
        reach = self.reach

        class Bar(tqdm):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
                self._at = int(kwargs.get("initial") or 0)

            def update(self, n: float | None = 1) -> bool | None:
                self._at += int(n or 0)
                reach(self._at)
                return None

        return Bar


# What is here already


def finished_store(repo: str, out: Path, codec: str) -> Store | None:
    """The store in `out`, if it is whole and was made of `repo` with that codec: then there is
    nothing to ask the hub for."""
    if not (out / MANIFEST).is_file() or read_origin(out).get("repo") != repo:
        return None
    try:
        store = Store.open(out)
    except StoreError:
        return None  # to be mended
    return store if store.codec == codec else None


def cached_checkpoint(repo: str, out: Path) -> Path | None:
    """The folder in the hub's cache, if all of a model is there: of the version with which the
    store in `out` was begun, or else of the last one that was asked for."""
    begun = read_origin(out)
    for revision in (begun.get("revision") if begun.get("repo") == repo else None, None):
        config = cached(repo, "config.json", revision=revision)
        if not isinstance(config, str):
            continue
        with suppress(CheckpointError):
            Checkpoint.open(Path(config).parent)
            return Path(config).parent
    return None


# Room


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _check_room(folder: Path, needs: dict[str, int], instead: str) -> None:
    """Raises StoreError if the disk of `folder` hasn't room for all that is needed."""
    needed, free = sum(needs.values()), shutil.disk_usage(_existing(folder)).free
    if free < needed:
        parts = " and ".join(f"{nbytes / 1e9:.2f} GB for {what}" for what, nbytes in needs.items())
        raise StoreError(
            f"The disk of {folder} has {free / 1e9:.2f} GB free; needed are {parts}.",
            hint=f"Free {(needed - free) / 1e9:.2f} GB, or choose another disk with "
            f"{'HF_HOME' if 'the store' not in needs else '--store'}{instead}.",
        )
