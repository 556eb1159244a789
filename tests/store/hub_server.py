"""A server on this machine that speaks as much of the hub's protocol as huggingface_hub needs: the
model's description, `/resolve/` with metadata in its headers, byte ranges; and its failures. And
what tests of it share."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lamina.store.convert import convert
from lamina.store.hub import Hub
from lamina.store.journal import ORIGIN
from lamina.store.layout import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """The repository `owner/model`, made of the files of a folder.

    Args:
        drops: for a file, after how many bytes of each of its next downloads the connection breaks.
        hard: it breaks with a reset, not with an end.
        refuse: a status and a code of the hub for files, such as (403, "GatedRepo").
        redirect: weights are sent from another host, as the hub's storage does.
        served: (file, first byte, bytes sent) of each download.
        tokens: (whether it was sent from the other host, the token that came with the request).
    """

    folder: Path
    repo: str = "owner/model"
    commit: str = COMMIT
    drops: dict[str, list[int]] = field(default_factory=dict)
    hard: bool = False
    refuse: tuple[int, str] | None = None
    ranges: bool = True
    redirect: bool = False
    served: list[tuple[str, int, int]] = field(default_factory=list)
    tokens: set[tuple[bool, str | None]] = field(default_factory=set)
    on_request: Callable[[str], None] = lambda path: None
    url: str = ""

    def downloads(self, file: str) -> list[tuple[int, int]]:
        """(first byte, bytes sent) of the downloads of a file; not those of a header alone."""
        return [(start, n) for name, start, n in self.served if name == file]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        hub.on_request(path)
        elsewhere = path.startswith("/storage/")
        path = path.removeprefix("/storage")
        hub.tokens.add((elsewhere, self.headers.get("Authorization")))
        if re.fullmatch(rf"/api/models/{hub.repo}(/revision/.+)?", path):
            revision = path.partition("/revision/")[2] or "main"
            if revision not in ("main", hub.commit):
                self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
                return
            files = sorted(file for file in hub.folder.iterdir() if file.is_file())
            siblings = [{"rfilename": f.name, "size": f.stat().st_size} for f in files]
            info = {"id": hub.repo, "sha": hub.commit, "siblings": siblings, "private": False}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode(), body)
            return
        match = re.fullmatch(rf"/{hub.repo}/resolve/([^/]+)/([^/]+)", path)
        if match is None:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"", body)
        elif hub.refuse is not None:
            status, code = hub.refuse
            self._send(status, {"X-Error-Code": code} if code else {}, b"no", body)
        elif not (hub.folder / match[2]).is_file():
            self._send(
                404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit}, b"", body
            )
        elif hub.redirect and not elsewhere and match[2].endswith(".safetensors"):
            content = (hub.folder / match[2]).read_bytes()
            headers = {
                "Location": f"{hub.url.replace('127.0.0.1', 'localhost')}/storage{path}",
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                "X-Repo-Commit": hub.commit,
            }
            self._send(302, headers, b"", body)
        else:
            self._file(hub.folder / match[2], body)

    def _file(self, file: Path, body: bool) -> None:
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.hub.commit,
            "Accept-Ranges": "bytes",
        }
        start, stop, status = 0, len(content), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.hub.ranges:
            start, status = int(asked[1]), 206
            stop = min(stop, int(asked[2]) + 1) if asked[2] else stop
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        drops = self.hub.drops.get(file.name, [])
        whole = asked is None or not asked[2]  # a download, or the rest of one
        if body and whole and drops and drops[0] < stop - start:
            self._break_off(status, headers, content[start:stop], drops.pop(0), file.name, start)
            return
        if body and whole:
            self.hub.served.append((file.name, start, stop - start))
        self._send(status, headers, content[start:stop], body)

    def _break_off(
        self,
        status: int,
        headers: dict[str, str],
        content: bytes,
        after: int,
        name: str,
        start: int,
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:after])
        self.wfile.flush()
        self.hub.served.append((name, start, after))
        if self.hub.hard:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())  # at once: the server would end it in order first
        self.close_connection = True

    def _send(self, status: int, headers: dict[str, str], content: bytes, body: bool) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def serving(hub: HubServer) -> Iterator[HubServer]:
    """Runs the server; its address is `hub.url`."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


REPO = "owner/model"


def prepare_from_hub(
    sample: Any, out: Path, *, discard: bool = True, codec: str = "nf4", **more: Any
) -> Store:
    hub = Hub(REPO, out, discard=discard)
    store = convert(
        hub.checkpoint(),
        out,
        model_type="sample",
        config=sample.config,
        blocks=sample.blocks,
        codec=codec,
        prefixes=("language_model.", ""),
        supplier=hub,
        origin=hub.origin,
        **more,
    )
    hub.close()
    return store


def contents(root: Path) -> dict[str, bytes]:
    """The files of a store but for `origin.json`."""
    files = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ORIGIN}


def shards(server: HubServer) -> list[str]:
    return sorted(p.name for p in server.folder.glob("*.safetensors"))
