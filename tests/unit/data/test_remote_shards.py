"""WebDataset shards at URLs: fetched, tried again, read, and nothing left behind."""

import io
import itertools
import os
import tarfile
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.prepare import prepare_data
from lpl.data.sources import Source, open_source, remote


def tar_of(*keys: str, image: Callable[[str], bytes] = lambda key: b"image " + key.encode()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key in keys:
            for name, data in ((f"{key}.jpg", image(key)), (f"{key}.txt", b"caption " + key.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves self.files; the first self.failures requests of a path go wrong in the way that its name says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"/{n}.tar": tar_of(f"{n}a", f"{n}b") for n in range(3)}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.etags: dict[str, str] = {}
        self.dates: dict[str, str] = {}
        self.failures: dict[str, list[str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        part = self.headers.get("Range")
        (self.server.requests if part is None else self.server.ranges).append(self.path)
        failure = (self.server.failures.get(path) or [""]).pop(0)
        if failure == "busy":
            return self.send_error(503)
        if path not in self.server.files:
            return self.send_error(404)
        data = self.server.files[path]
        self.send_response(200 if part is None else 206)
        for name, values in (("ETag", self.server.etags), ("Last-Modified", self.server.dates)):
            if path in values:
                self.send_header(name, values[path])
        if part is not None:
            total = "*" if failure == "no length" else len(data)
            self.send_header("Content-Range", f"bytes 0-0/{total}")
            data = data[:1]
        if failure != "no length":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:2000] if failure == "cut" else data)
        return None

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    assert list((tmp_path / "temporary").iterdir()) == []


def source_of(spec: str, **options: Any) -> Source:
    return open_source(DataConfig(webdataset=spec, **options), None)


def message(source: Source) -> str:
    with pytest.raises(UserError) as caught:
        deque(itertools.chain.from_iterable(piece.samples() for piece in source.pieces))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_shards_are_fetched_when_their_turn_comes(server: Server) -> None:
    source = source_of(f"{server.url}/{{0..1}}.tar?signature=secret")
    first, second = source.pieces
    assert server.requests == []
    samples = list(first.samples())
    assert server.requests == ["/0.tar?signature=secret"]
    assert [(s.id, s.captions, s.group) for s in samples] == [
        ("0/0a", ("caption 0a",), "0"),
        ("0/0b", ("caption 0b",), "0"),
    ]
    assert [sample.read() for sample in samples] == [b"image 0a", b"image 0b"]
    assert samples[0].name == "0.tar: 0a"
    assert (first.stamp, samples[0].stamp) == (f"{server.url}/0.tar",) * 2
    assert (second.key, second.stamp, second.size) == ("1", f"{server.url}/1.tar", None)
    assert "secret" not in source.name + source.identity
    assert first.stamp == source_of(f"{server.url}/0.tar?signature=other").pieces[0].stamp


@pytest.mark.parametrize("failure", ["cut", "busy"])
def test_what_goes_wrong_once_is_tried_again(server: Server, failure: str) -> None:
    server.failures["/0.tar"] = [failure, failure]
    samples = list(source_of(f"{server.url}/0.tar").pieces[0].samples())
    assert [sample.read() for sample in samples] == [b"image 0a", b"image 0b"]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("failure", "expected"),
    [("cut", "the connection ended after 2000 of 10240 bytes"), ("busy", "HTTP 503 Service Unavailable")],
)
def test_what_goes_wrong_always_is_given_up(server: Server, failure: str, expected: str) -> None:
    server.failures["/1.tar"] = [failure] * 9
    text = message(source_of(f"{server.url}/{{0..1}}.tar?signature=secret"))
    assert text.startswith(f"--webdataset {server.url}/1.tar: cannot be fetched ({expected}): check the URL")
    assert len(server.requests) == 1 + 3


def test_pauses_grow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    monkeypatch.setattr(remote, "PAUSE", 1.0)
    server.failures["/0.tar"] = ["busy"] * 9
    message(source_of(f"{server.url}/0.tar"))
    assert pauses == [1.0, 2.0]


def test_what_is_not_there_is_asked_for_once(server: Server) -> None:
    assert "(HTTP 404 Not Found)" in message(source_of(f"{server.url}/9.tar"))
    assert len(server.requests) == 1


def test_server_that_does_not_answer(server: Server) -> None:
    assert "http://127.0.0.1:1/0.tar: cannot be fetched ([Errno" in message(source_of("http://127.0.0.1:1/0.tar"))


def test_cut_short_where_no_length_was_said(server: Server) -> None:
    server.files["/0.tar"] = server.files["/0.tar"][:2000]
    server.failures["/0.tar"] = ["no length"]
    assert f"--webdataset {server.url}/0.tar: damaged or cut short" in message(source_of(f"{server.url}/0.tar"))


def test_closing_early_frees_the_file(server: Server) -> None:
    before = open_files()
    samples = source_of(f"{server.url}/0.tar").pieces[0].samples()
    sample = next(samples)
    assert open_files() >= before
    samples.close()  # type: ignore[attr-defined]
    assert open_files() == before
    assert sample.read() == b"image 0a"


def test_max_train_samples_fetches_no_further_shard(server: Server) -> None:
    (piece,) = source_of(f"{server.url}/{{0..2}}.tar", max_train_samples=3).pieces
    assert [sample.id for sample in piece.samples()] == ["0/0a", "0/0b", "1/1a"]
    assert server.requests == ["/0.tar", "/1.tar"]


def picture_tar(*colors: str) -> bytes:
    """A shard of plain images, of which no two kinds of 16 x 16 BMP differ in length."""
    return tar_of(*colors, image=bmp)


def bmp(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.fixture
def fill(tmp_path: Path, encoder: Any, caplog: pytest.LogCaptureFixture) -> Callable[..., int]:
    """One run on some data; returns how many crops it has encoded."""

    def run(**options: Any) -> int:
        caplog.clear()
        config = DataConfig(resolution=16, latent_cache_dir=str(tmp_path / "c"), **options)
        before = encoder.images
        prepare_data(open_source(config, str(tmp_path / "hf")), None, config, encoder, 0, tmp_path / "bad.jsonl")
        return int(encoder.images - before)

    return run


@pytest.mark.parametrize("told", ["length", "etags", "dates"])
def test_a_shard_that_was_replaced_is_fetched_again(server: Server, fill: Callable[..., int], told: str) -> None:
    server.files |= {"/0.tar": picture_tar("red", "blue"), "/1.tar": picture_tar("gold")}
    spec = f"{server.url}/{{0..1}}.tar"
    if told != "length":
        getattr(server, told).update({"/0.tar": "one", "/1.tar": "one"})
    assert fill(webdataset=spec) == 3
    assert fill(webdataset=spec) == 0
    assert server.requests == ["/0.tar", "/1.tar"]
    if told == "length":
        server.files["/0.tar"] = picture_tar("red", *("navy", "pink", "cyan", "lime", "teal"))
    else:
        server.files["/0.tar"] = picture_tar("red", "pink")
        getattr(server, told)["/0.tar"] = "two"
    assert fill(webdataset=spec) == (5 if told == "length" else 1)
    assert server.requests == ["/0.tar", "/1.tar", "/0.tar"]
    assert fill(webdataset=spec) == 0


def test_without_its_server_a_cached_shard_serves(
    server: Server, fill: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    server.files["/0.tar"] = picture_tar("red", "blue")
    assert fill(webdataset=f"{server.url}/0.tar?signature=one") == 2
    server.failures["/0.tar"] = ["busy"]
    assert fill(webdataset=f"{server.url}/0.tar?signature=two") == 0
    (said,) = [r.getMessage() for r in caplog.records if "do not say whether they have changed" in r.getMessage()]
    assert "1 of its files" in said
    assert "HTTP 503" in said
    assert "signature" not in said
    assert server.ranges == ["/0.tar?signature=two"]


def test_a_server_that_tells_no_version_is_named(
    server: Server, fill: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    server.files["/0.tar"] = picture_tar("red")
    server.failures["/0.tar"] = ["no length"] * 9
    for encoded in (1, 0):
        assert fill(webdataset=f"{server.url}/0.tar") == encoded
        assert "send no length, ETag or date, first" in caplog.text
        assert "--rehash" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["path", "url"])
def test_files_that_rows_name_are_followed(
    server: Server, fill: Callable[..., int], tmp_path: Path, kind: str, streaming: bool
) -> None:
    """The parquet stays as it is: what its rows name is replaced, goes away, and comes back."""

    def put(name: str, content: bytes | None) -> None:
        if kind == "path":
            (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
        elif content is None:
            del server.files[f"/{name}"]
        else:
            server.files[f"/{name}"], server.etags[f"/{name}"] = content, content[54:57].hex()

    colors = ["red", "blue", "gold"]
    for color in colors:
        put(f"{color}.bmp", bmp(color))
    root = str(tmp_path) if kind == "path" else server.url
    rows = {"image": [f"{root}/{color}.bmp" for color in colors], "text": colors}
    features = datasets.Features({"image": datasets.Value("string"), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    options = {"dataset_name": str(tmp_path / "rows.parquet"), "streaming": streaming, "max_bad_fraction": 0.4}
    assert fill(**options) == 3
    assert fill(**options) == 0
    put("blue.bmp", bmp("navy"))
    assert fill(**options) == 1
    assert fill(**options) == 0
    put("gold.bmp", None)
    assert fill(**options) == 0
    assert (tmp_path / "bad.jsonl").exists() is (kind == "path")  # of a URL that fails, what is cached is used
    put("gold.bmp", bmp("lime"))
    assert fill(**options) == 1
    assert not (tmp_path / "bad.jsonl").exists()


def test_no_room_for_a_shard(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Full())
    text = message(source_of(f"{server.url}/0.tar"))
    assert "no room for it in the folder for temporary files (No space left on device)" in text
    assert "TMPDIR" in text
    assert len(server.requests) == 1


def test_other_schemes_go_through_fsspec(server: Server) -> None:
    import fsspec

    with fsspec.open("memory://shards/7.tar", "wb") as file:
        file.write(tar_of("x"))
    (sample,) = source_of("memory://shards/7.tar").pieces[0].samples()
    assert (sample.id, sample.captions, sample.read()) == ("7/x", ("caption x",), b"image x")
    assert "memory://shards/8.tar: cannot be fetched (" in message(source_of("memory://shards/8.tar"))
    assert "foo://shards/8.tar: cannot be opened (" in message(source_of("foo://shards/8.tar"))
