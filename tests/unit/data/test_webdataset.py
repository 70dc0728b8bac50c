"""WebDataset shards on this machine: what they yield, what is read, and the one line each fault gives."""

import gzip
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from reading_sources import fault_of, samples_of, source_of

from lpl.base.errors import UserError
from lpl.data.bad_files import BadImageError
from lpl.data.sources import Source


def write_tar(path: Path, members: dict[str, bytes | str], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            content = data.encode() if isinstance(data, str) else data
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def spec(*shards: Path | str) -> str:
    return "::".join(map(str, shards))


def shards_of(*shards: Path | str, **options: Any) -> Source:
    return source_of(webdataset=spec(*shards), **options)


def message(*shards: Path | str, **options: Any) -> str:
    return fault_of(webdataset=spec(*shards), **options)


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Path]:
    one = write_tar(
        tmp_path / "photos-000.tar",
        {"b.jpg": b"image b", "b.txt": "a cat,\non a mat\n", "a.png": b"image a", "a.json": '{"text": ["one", "two"]}'},
    )
    two = write_tar(tmp_path / "photos-001.tar", {"b.jpg": b"other b", "b.txt": "other"})
    return one, two


def test_samples_in_the_order_of_the_tar(shards: tuple[Path, Path]) -> None:
    source = shards_of(*shards)
    samples = samples_of(source)
    assert [sample.id for sample in samples] == ["photos-000/b", "photos-000/a", "photos-001/b"]
    assert [sample.captions for sample in samples] == [("a cat, on a mat",), ("one", "two"), ("other",)]
    assert [sample.group for sample in samples] == ["photos-000", "photos-000", "photos-001"]
    assert [sample.name for sample in samples] == ["photos-000.tar: b", "photos-000.tar: a", "photos-001.tar: b"]
    assert [sample.read() for sample in samples] == [b"image b", b"image a", b"other b"]
    assert [(piece.key, piece.size) for piece in source.pieces] == [("photos-000", None), ("photos-001", None)]
    assert source.size is None
    assert source.name == f"--webdataset {shards[0]}::{shards[1]}"
    assert [s.id for s in samples_of(shards_of(shards[0].parent / "photos-{000..001}.tar"))] == [s.id for s in samples]


def test_identity_is_the_same_from_another_folder(shards: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shards[0].parent)
    assert shards_of("photos-000.tar").identity == shards_of(shards[0]).identity
    assert shards_of(shards[0], caption_column="other").identity != shards_of(shards[0]).identity
    assert shards_of("https://host/x.tar?a=1").identity == shards_of("https://host/x.tar?a=2").identity


def test_keys_and_extensions_as_webdataset_defines_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(
        tmp_path / "x.tar",
        {
            "a/0.seg.png": b"a mask",
            "a/0.JPG": b"0",
            "a/0.TXT": "zero",
            "b.c/0.webp": b"0 of b.c",
            "b.c/0.txt": "",
            "._0.jpg": b"not an image",
            "readme": "no extension",
            "9.npy": b"\x93NUMPY",
            "9.pyd": b"cos\nsystem\n(S'exit 1'\ntR.",
            "8.pth": b"x",
            "1.avif": b"1",
            "a/0.cls": "3",
            "1.txt": "one",
        },
    )
    with caplog.at_level(logging.WARNING, "lpl"):
        samples = samples_of(shards_of(path))
    assert {sample.id: (sample.captions, sample.read()) for sample in samples} == {
        "x/a/0": (("zero",), b"0"),
        "x/b.c/0": (("",), b"0 of b.c"),
        "x/1": (("one",), b"1"),
    }
    assert [record.getMessage() for record in caplog.records] == [
        f"--webdataset {path}: 2 keys have no image and are left out (first: 9); 1 images are left out, as their names "
        "have further dots, and a key ends at the first: rename those that are to be trained on (first: a/0.seg.png); "
        "further shards are not reported"
    ]


def test_keys_without_image_are_mentioned_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", {"a.txt": "x", "b.png": b"", "b.txt": ""}) for n in range(3)]
    with caplog.at_level(logging.WARNING, "lpl"):
        assert len(samples_of(shards_of(*tars))) == 3
    assert len(caplog.records) == 1


def test_images_are_counted_and_not_their_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members: dict[str, bytes | str] = {"ok.png": b"", "ok.txt": "", "ok.mask.png": b"", "x.HEIC": b"", "x.txt": ""}
    for n in range(4):
        members |= {f"img.{n}.png": b"", f"img.{n}.txt": ""}
    assert len(samples_of(shards_of(write_tar(tmp_path / "x.tar", members)))) == 1
    (record,) = caplog.records
    for expected in ("1 pictures are left out", "(first: x.HEIC)", "4 images are left out", "(first: img.0.png)"):
        assert expected in record.getMessage()
    assert "keys" not in record.getMessage()


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_every_format(tmp_path: Path, tar_format: int) -> None:
    key = f"{'d' * 99}/{'k' * 90}" if tar_format == tarfile.USTAR_FORMAT else f"{'d' * 200}/{'k' * 200}"
    path = write_tar(tmp_path / "x.tar", {f"{key}.jpg": b"image", f"{key}.txt": "x"}, tar_format)
    (sample,) = samples_of(shards_of(path))
    assert (sample.id, sample.read()) == (f"x/{key}", b"image")


def test_hard_links_lead_to_their_data(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, link in (("a.jpg", ""), ("a.txt", ""), ("b.jpg", "a.jpg"), ("b.txt", "a.txt")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.LNKTYPE, link) if link else (tarfile.REGTYPE, "")
            member.size = 0 if link else 5
            archive.addfile(member, io.BytesIO(name.encode()))
    samples = samples_of(shards_of(tmp_path / "x.tar"))
    assert [(s.id, s.captions, s.read()) for s in samples] == [
        ("x/a", ("a.txt",), b"a.jpg"),
        ("x/b", ("a.txt",), b"a.jpg"),
    ]


def test_opening_reads_nothing_and_indexing_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = b"i" * 1_000_000
    path = write_tar(tmp_path / "x.tar", {"a.jpg": image, "a.txt": "x", "b.jpg": image, "b.txt": "y"})
    count = [0]
    real = open

    class Counting:
        def __init__(self, file: Any) -> None:
            self._file = file

        def read(self, size: int = -1) -> Any:
            data = self._file.read(size)
            count[0] += len(data)
            return data

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> "Counting":
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

    def note(name: Any, *args: Any, **options: Any) -> Any:
        file = real(name, *args, **options)
        return Counting(file) if str(name) == str(path) else file

    monkeypatch.setattr("builtins.open", note)
    source = shards_of(path)
    assert count == [0]
    samples = samples_of(source)
    assert 0 < count[0] < 30_000
    count[0] = 0
    assert samples[1].read() == image
    assert count == [len(image)]


def test_images_are_read_from_many_threads_and_after_the_end(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {}
    for n in range(200):
        members |= {f"{n}.jpg": b"%d" % n * (n + 1), f"{n}.txt": str(n)}
    samples = samples_of(shards_of(write_tar(tmp_path / "x.tar", members)))
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda sample: sample.read(), samples[::-1]))
    assert read == [b"%d" % n * (n + 1) for n in reversed(range(200))]


def test_stamps_stay_and_follow_the_tar(shards: tuple[Path, Path]) -> None:
    def stamps() -> list[str]:
        source = shards_of(*shards)
        pieces = [piece.stamp for piece in source.pieces]
        assert [sample.stamp for sample in samples_of(source)] == [pieces[0], pieces[0], pieces[1]]
        return pieces

    before = stamps()
    assert stamps() == before
    os.utime(shards[1], ns=(1, 1))
    after = stamps()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_max_train_samples_opens_no_further_shard(shards: tuple[Path, Path]) -> None:
    whole = samples_of(shards_of(*shards))
    shards[1].write_bytes(b"not a tar")
    source = shards_of(*shards, max_train_samples=2)
    (piece,) = source.pieces
    assert next(iter(piece.samples()))._replace(read=bytes) == whole[0]._replace(read=bytes)
    assert [sample.id for sample in piece.samples()] == ["photos-000/b", "photos-000/a"]
    assert piece.stamp == shards_of(*shards, max_train_samples=2).pieces[0].stamp
    assert piece.key != shards_of(*shards, max_train_samples=1).pieces[0].key
    assert "photos-001.tar: damaged" in message(*shards, max_train_samples=3)


def test_an_instance_prompt_serves_images_without_a_caption(tmp_path: Path) -> None:
    members = {"0.jpg": b"", "1.jpg": b"", "1.json": "{}", "2.jpg": b"", "2.json": '{"text": null}', "2.txt": "own"}
    path = write_tar(tmp_path / "x.tar", {**members, "3.jpg": b"", "3.json": '{"text": []}'})
    assert "--instance_prompt" in message(path)
    sources = [shards_of(path, instance_prompt=prompt) for prompt in ("sks", "sks", "other")]
    assert [s.captions for s in samples_of(sources[0])] == [("sks",), ("sks",), ("own",), ("sks",)]
    first, again, other = (source.pieces[0] for source in sources)
    assert first.stamp == again.stamp != other.stamp
    # no image is opened again for another prompt
    assert [s.stamp for s in first.samples()] == [s.stamp for s in other.samples()]


def test_captions_of_json_win_where_it_has_the_key(tmp_path: Path) -> None:
    fields = json.dumps({"caption": "of json", "text": "other"})
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"", "0.json": fields, "0.txt": "of txt"})
    for column, expected in (("caption", "of json"), ("text", "other"), ("title", "of txt")):
        assert samples_of(shards_of(path, caption_column=column))[0].captions == (expected,)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, "key a/0 has no caption: put a .txt beside it"),
        ({"a/0.json": '{"x": 1, "y": 2}'}, "key a/0 has no caption (keys of its .json: x, y): put"),
        ({"a/0.json": '{"text": null}'}, "key a/0.json: a caption must be a string or a list of strings, not 'None'"),
        ({"a/0.json": '{"text": []}'}, "key a/0.json: a caption must be a string"),
        ({"a/0.json": "{"}, "key a/0.json: not JSON ("),
        ({"a/0.json": "[1]"}, "key a/0.json: not a JSON object"),
        ({"a/0.txt": b"caf\xe9"}, "key a/0.txt, line 1: not UTF-8 text (byte 3 of the file)"),
        ({"a/0.txt": "x", "a/0.png": b""}, "two images of the key a/0"),
        ({"a/0.txt": "x", "a/0.Txt": "y"}, "two .txt files of the key a/0"),
    ],
)
def test_faulty_samples_are_named(tmp_path: Path, members: dict[str, bytes | str], expected: str) -> None:
    path = write_tar(tmp_path / "x.tar", {"a/0.jpg": b"", **members})
    assert message(path).startswith(f"--webdataset {path}: {expected.removeprefix('key ')}")


def cut_in_image(data: bytes) -> bytes:
    return data[: 3 * 512 + 700]


def cut_between_members(data: bytes) -> bytes:
    return data[: data.index(b"1.jpg")]


def break_header(data: bytes) -> bytes:
    place = data.index(b"1.jpg")
    return data[: place + 148] + b"9999999\0" + data[place + 156 :]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut_in_image, "unexpected end of data"),
        (cut_between_members, "its end mark is missing"),
        (break_header, "no header of a member at byte 2560"),
        (lambda data: data + data, "no header of a member at byte"),
        (lambda data: b"", "empty file"),
        (lambda data: b"<html>" + bytes(2000), "truncated header|bad checksum|invalid header"),
    ],
)
def test_damaged_tars_give_no_samples(tmp_path: Path, damage: Callable[[bytes], bytes], expected: str) -> None:
    members: dict[str, bytes | str] = {"0.txt": "x", "0.jpg": b"0" * 900, "1.jpg": b"1" * 900, "1.txt": "x"}
    path = write_tar(tmp_path / "x.tar", members)
    path.write_bytes(damage(path.read_bytes()))
    samples = shards_of(path).pieces[0].samples()
    with pytest.raises(UserError) as caught:
        next(samples)
    assert re.match(rf"--webdataset {path}: damaged or cut short \(.*({expected})", str(caught.value))
    assert "leave it out" in str(caught.value)


def test_compressed_tars_are_refused(shards: tuple[Path, Path]) -> None:
    packed = shards[0].with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(shards[0].read_bytes()))
    text = message(packed)
    assert text.startswith(f"--webdataset {packed}: compressed (gzip)")
    assert "unpack it" in text


def test_tar_that_shrinks_or_vanishes(shards: tuple[Path, Path]) -> None:
    source = shards_of(*shards)
    samples = samples_of(source)
    shards[0].write_bytes(shards[0].read_bytes()[:600])
    shards[1].unlink()
    reasons = []
    for sample in (samples[1], samples[2]):
        with pytest.raises(BadImageError) as caught:
            sample.read()
        reasons.append(caught.value.reason)
    assert reasons == ["cannot be read (the shard has become shorter)", "cannot be read (No such file or directory)"]
    with pytest.raises(UserError, match=r"photos-001\.tar: cannot be read \(No such file or directory\)"):
        list(source.pieces[1].samples())
