"""A stand-in of the Hub's HTTP interface on this machine, as far as downloads ask for it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """A request."""

    method: str
    path: str
    range: str | None
    """Its header Range."""
    token: str | None


class Hub:
    """Repositories of models, by name and revision.

    Attributes:
        folders: (name, branch) -> what is there.
        gated: names that want a token.
        breaks: file names; the first download of each ends half-way.
        asked: every request so far.
        address: of the server.
    """

    def __init__(self, folders: dict[tuple[str, str], Path], gated: set[str], breaks: set[str]) -> None:
        self.folders, self.gated, self.breaks = folders, gated, set(breaks)
        self.asked: list[Asked] = []
        self.address = ""

    def find(self, name: str, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a branch or commit."""
        for (known, branch), folder in self.folders.items():
            commit = hashlib.sha1(f"{known}@{branch}".encode()).hexdigest()
            if known == name and revision in (branch, commit):
                return commit, folder
        return None


@contextmanager
def serve_hub(hub: Hub) -> Iterator[Hub]:
    """The hub, while it answers."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.respond(False)

        def do_GET(self) -> None:
            self.respond(True)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

        def respond(self, whole: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(Asked(self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if not (api or file):
                return self.refuse(404, "RepoNotFound")
            name, revision = (api[1], api[3] or "main") if api else (file[1], file[2])  # type: ignore[index]
            if name in hub.gated and not self.headers.get("Authorization"):
                return self.refuse(401, "GatedRepo")
            if (found := hub.find(name, revision)) is None:
                known = any(name == each for each, _ in hub.folders)
                return self.refuse(404 if known else 401, "RevisionNotFound" if known else "RepoNotFound")
            if api:
                return self.describe(name, api[2] == "tree", *found)
            return self.send(found[0], found[1] / file[3], whole)  # type: ignore[index]

        def describe(self, name: str, tree: bool, commit: str, folder: Path) -> None:
            files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
            names = [f.relative_to(folder).as_posix() for f in files]
            answer: Any = {"id": name, "sha": commit, "private": False, "gated": False, "tags": [], "downloads": 0}
            answer |= {"siblings": [{"rfilename": each} for each in names]}
            if tree:
                answer = [
                    {
                        "type": "file",
                        "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                        "size": f.stat().st_size,
                        "path": n,
                    }
                    for f, n in zip(files, names, strict=True)
                ]
            self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def send(self, commit: str, file: Path, whole: bool) -> None:
            if not file.is_file():
                return self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            content = file.read_bytes()
            headers = {
                "X-Repo-Commit": commit,
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "Accept-Ranges": "bytes",
            }
            asked, start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""), 0
            if asked:
                start = int(asked[1])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            end = len(content)
            if whole and file.name in hub.breaks:
                hub.breaks.remove(file.name)
                end //= 2
            self.answer(206 if asked else 200, content[start:end] if whole else b"", headers, len(content) - start)
            self.close_connection = end != len(content)

        def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
            self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

        def answer(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content) if length is None else length)}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        server.shutdown()
