"""`lpl report --serve RUN`: the page on this machine's loopback address, updated while the runs go on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from jinja2 import Template

from lpl.base.errors import UserError
from lpl.base.terminal import one_line
from lpl.config.commands import ReportConfig
from lpl.config.run_folder import CHECKPOINT
from lpl.report.page import as_html, encoded, gather
from lpl.report.sources import read_inputs

ADDRESS = "127.0.0.1"
WAITING = Template(
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="3">'
    "<title>lpl report</title><p>{{ line|e }}</p><p>This page tries again by itself.</p></html>"
)


class LivePage:
    """The page of some folders, made again when their content has changed."""

    def __init__(self, options: ReportConfig) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._made: tuple[str, int, bytes] = ("", 0, b"")

    def state(self) -> str:
        """A digest of the folders' content, from names, sizes and times of their files."""
        return folder_state([Path(name) for name in self.options.runs])

    def page(self) -> tuple[int, bytes]:
        """HTTP status and the page; one line instead while there is nothing to show."""
        with self._lock:
            state = self.state()
            if self._made[0] != state:
                try:
                    found = gather(read_inputs(self.options.runs), self.options.most_bytes)
                    self._made = state, 200, encoded(as_html(found, state))
                except UserError as error:
                    self._made = state, 503, encoded(WAITING.render(line=one_line(str(error))))
            return self._made[1:]


def folder_state(folders: Sequence[Path]) -> str:
    """A digest of the files in folders, without checkpoints, which the page does not show."""
    digest = hashlib.sha256()
    for folder in folders:
        waiting = [folder]
        while waiting:
            at = waiting.pop()
            try:
                entries = sorted(at.iterdir())
            except OSError:  # gone since, or a file
                entries = [at] if at.is_file() else []
            for entry in entries:
                if entry.is_dir() and not entry.is_symlink():
                    waiting += [] if entry.name.startswith(CHECKPOINT) else [entry]
                    continue
                try:
                    known = entry.stat()
                except OSError:
                    continue
                digest.update(f"{entry}\0{known.st_size}\0{known.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def make_server(options: ReportConfig) -> ThreadingHTTPServer:
    """A listening server of the page.

    Raises:
        UserError: a folder does not exist, or the port is taken.
    """
    read_inputs(options.runs)
    live = LivePage(options)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site may point its name to this address; its pages must not read this one.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in (ADDRESS, "localhost"):
                self.answer(403, b"ask by 127.0.0.1 or localhost\n", "text/plain")
            elif self.path == "/":
                self.answer(*live.page(), "text/html")
            elif self.path == "/state":
                self.answer(200, live.state().encode(), "text/plain")
            else:
                self.answer(404, b"there is one page here: /\n", "text/plain")

        def answer(self, status: int, content: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            try:
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):  # the window was closed
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Logs nothing: an open page sends many requests."""

    try:
        return ThreadingHTTPServer((ADDRESS, options.port), Handler)
    except OSError as error:
        raise UserError(f"--port {options.port}: cannot be listened on ({error.strerror}); name another") from error


def serve(options: ReportConfig) -> None:
    """Shows the page until Ctrl-C.

    Raises:
        UserError: see make_server.
    """
    with make_server(options) as server:
        print(f"the report is at http://{ADDRESS}:{server.server_address[1]}/ until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nno longer served")
