"""`lpl report --serve`: on this machine alone, and always what the folder holds now."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from lpl.base.errors import UserError
from lpl.config import RunConfig, TrainConfig
from lpl.config.commands import ReportConfig
from lpl.config.files import write_config
from lpl.report.serve import folder_state, make_server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has just begun."""
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(TrainConfig(run=RunConfig(output_dir=str(folder))), folder)
    return folder


@pytest.fixture
def port(run: Path) -> Iterator[int]:
    """Where its page is served."""
    with make_server(ReportConfig((str(run),), serve=True, port=0)) as server:
        assert server.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def ask(port: int, path: str = "/", host: str | None = None) -> tuple[int, str]:
    """Status and body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def test_the_page_is_of_now(run: Path, port: int) -> None:
    status, before = ask(port)
    state = ask(port, "/state")[1]
    assert status == 200
    assert f'data-live="{state}"' in before
    assert "connect-src 'self'" in before
    assert "not finished" in before
    (run / "finished.json").write_text('{"step": 7, "weights": "raw"}')
    assert ask(port, "/state")[1] != state
    assert "finished, of" in ask(port)[1] or ">finished" in ask(port)[1]
    assert not (run / "report.html").exists()  # nothing is written


def test_a_fault_is_a_line_and_passes(run: Path, port: int) -> None:
    text = (run / "config.yaml").read_bytes()
    (run / "config.yaml").unlink()
    status, page = ask(port)
    assert status == 503
    assert "no config.yaml of a run in it" in page
    (run / "config.yaml").write_bytes(text)
    assert ask(port)[0] == 200


def test_no_other_site_may_ask(port: int) -> None:
    assert ask(port, host="example.org")[0] == 403
    assert ask(port, host=f"localhost:{port}")[0] == 200
    assert ask(port, "/config.yaml")[0] == 404


def test_state_is_of_what_the_page_shows(run: Path) -> None:
    before = folder_state([run])
    (run / "checkpoint-5").mkdir()
    (run / "checkpoint-5" / "model.safetensors").write_bytes(b"x")
    assert folder_state([run]) == before
    (run / "samples").mkdir()
    (run / "samples" / "step-0000001.png").write_bytes(b"x")
    assert folder_state([run]) != before


def test_what_cannot_be_served_is_refused(run: Path, port: int) -> None:
    with pytest.raises(UserError, match=rf"--port {port}: cannot be listened on \(.*\); name another"):
        make_server(ReportConfig((str(run),), serve=True, port=port))
    with pytest.raises(UserError, match="no such folder"):
        make_server(ReportConfig((str(run / "x"),), serve=True, port=0))
    with pytest.raises(UserError, match="--serve writes nothing: drop --output and --export"):
        ReportConfig((str(run),), output="a.html", export="b", serve=True)
