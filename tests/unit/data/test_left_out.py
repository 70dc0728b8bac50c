"""What of a folder is not used is counted in one line, and each file is one sample however it is named."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.sources import Sample, open_regularisation, open_source, open_validation
from lpl.data.sources.listing import list_images
from lpl.evaluation.images import list_pictures

Told = Callable[[Path], str]


def samples_of(root: Path, prompt: str | None = None) -> dict[str, Sample]:
    source = open_source(DataConfig(train_data_dir=str(root), instance_prompt=prompt), None)
    return {sample.id: sample for piece in source.pieces for sample in piece.samples()}


def captions(root: Path, prompt: str | None = None) -> dict[str, str]:
    return {name: "|".join(sample.captions) for name, sample in samples_of(root, prompt).items()}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_text(f"from {name}")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    def call(root: Path) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lpl"):
            open_source(DataConfig(train_data_dir=str(root)), None)
        assert len(caplog.records) <= 1
        return caplog.text

    return call


def test_every_spelling_of_jpeg_is_read(folder: Path, told: Told) -> None:
    for ending in ("jfif", "jpe", "jif", "JFI"):
        touch(folder, f"x.{ending}")
    touch(folder, "x.txt")
    assert told(folder) == ""
    assert len(samples_of(folder)) == 5 + 4


def test_pictures_and_captioned_files_that_are_not_read_are_counted(folder: Path, told: Told) -> None:
    assert told(folder) == ""
    # with a caption, with one of either name, and without one; beside an image of its name
    touch(folder, "a.heic", "a.txt", "b.HEIC", "b.HEIC.caption", "c.jxl", "notes.md", "notes.txt", "0.heic")
    touch(folder, "0.json", "plain.npz", ".hidden.heic")
    line = told(folder)
    assert f"--train_data_dir {folder}: 5 files are left out, as .heic, .jxl, .md is not read" in line
    assert "first 0.heic" in line
    assert "caption" not in line.partition(str(folder))[2].replace(".caption", "")
    assert len(samples_of(folder)) == 5


def test_captions_that_nobody_reads_are_counted(folder: Path, told: Told) -> None:
    touch(folder, "orphan.txt", "sub/other.caption", "0.caption", "1.png.txt", "metadata.csv")
    (folder / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "x"}')
    line = told(folder)
    assert "2 caption files are not read, as no image beside has that name (first orphan.txt)" in line
    assert "3 caption files are not read, as the image has another caption (first 0.caption)" in line
    assert "1 table is not read: write it as metadata.jsonl (metadata.csv)" in line


def test_what_metadata_names_is_not_left_out(folder: Path, told: Told) -> None:
    touch(folder, "a.heic")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.heic", "text": "x"}')
    assert told(folder) == ""
    assert "a.heic" in samples_of(folder)


def test_evaluations_count_pictures_too(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(folder, "a.heic", "orphan.txt")
    with caplog.at_level(logging.WARNING, "lpl"):
        assert len(list_pictures(folder, "--images")) == 5
    assert f"--images {folder}: 1 file is left out, as .heic is not read" in caplog.text
    assert "orphan" not in caplog.text


def test_caption_files_in_their_order(tmp_path: Path) -> None:
    for number, names in enumerate([("{}.txt", "{}.caption", "{}.png.txt"), ("{}.caption", "{}.png.txt"), ("{}.TXT",)]):
        (tmp_path / f"{number}.png").write_bytes(b"")
        touch(tmp_path, *(name.format(number) for name in names))
    for name in ("3.png", "4.x.png"):
        touch(tmp_path, name, f"{name}.txt")
    assert captions(tmp_path) == {
        "0.png": "from 0.txt", "1.png": "from 1.caption", "2.png": "from 2.TXT", "3.png": "from 3.png.txt",
        "4.x.png": "from 4.x.png.txt",
    }  # fmt: skip


def test_another_caption_file_is_another_stamp(folder: Path) -> None:
    before = samples_of(folder)["0.png"].stamp
    status = (folder / "0.txt").stat()
    (folder / "0.txt").rename(folder / "0.caption")
    os.utime(folder / "0.caption", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert samples_of(folder)["0.png"].stamp != before
    assert captions(folder)["0.png"] == "caption 0"


def test_separators_stay_within_a_caption(folder: Path) -> None:
    (folder / "0.txt").write_bytes("one\u2028two\x0bthree\r\n\r\n four\n".encode("utf-16"))
    assert captions(folder)["0.png"] == "one\u2028two\x0bthree four"


@pytest.mark.parametrize("spelling", ["absolute", "upward", "linked root", "linked folder", "odd"])
def test_a_file_is_one_sample_however_metadata_names_it(folder: Path, tmp_path: Path, spelling: str) -> None:
    (tmp_path / "link").symlink_to(folder)
    (folder / "again").symlink_to(folder / "sub")
    root = folder
    if spelling == "linked root":
        root = tmp_path / "link"
    names = {
        "absolute": f"{folder}/sub/9.png",
        "upward": f"../{folder.name}/sub/9.png",
        "linked root": f"{folder}/sub/9.png",
        "linked folder": "again/9.png",
        "odd": "./sub//../sub/9.png",
    }
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": names[spelling], "text": "new"}))
    found = captions(root)
    assert len(found) == 5
    assert found["sub/9.png"] == "new"
    with (root / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "sub/9.png", "text": "contradicts"}')
    with pytest.raises(UserError, match=r"line 2: sub/9\.png is listed a second time"):
        captions(root)


def test_links_to_files_and_files_elsewhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes(b"outside")
    (tmp_path / "far").symlink_to(tmp_path)
    (folder / "4.png").symlink_to(tmp_path / "outside.png")
    rows = [{"file_name": str(tmp_path / "outside.png"), "text": "x"}]
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0]))
    assert captions(folder)["4.png"] == "x"
    (folder / "4.png").unlink()
    assert captions(folder)[str(tmp_path / "outside.png")] == "x"
    rows.append({"file_name": str(tmp_path / "far" / "outside.png"), "text": "y"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="is listed a second time"):
        captions(folder)


def test_backslashes_get_a_hint(folder: Path) -> None:
    row = {"file_name": "sub\\9.png", "text": "x"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"sub\\9\.png \(write sub/9\.png: / separates folders\) does not exist"):
        captions(folder)
    (folder / "metadata.jsonl").write_text(json.dumps(row | {"file_name": "a\0b.png"}))
    with pytest.raises(UserError, match=r"line 1: holds \\u0000, which is no character of a text: take it out"):
        captions(folder)


def test_an_instance_prompt_serves_images_without_a_caption(folder: Path) -> None:
    (folder / "1.txt").unlink()
    (folder / "2.txt").write_text("")
    lines = [{"file_name": "0.png", "text": None}, {"file_name": "3.png"}, {"file_name": "sub/9.png", "text": "own"}]
    (folder / "3.txt").unlink()
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match="--instance_prompt"):
        captions(folder)
    expected = {"0.png": "caption 0", "1.png": "sks", "2.png": "", "3.png": "sks", "sub/9.png": "own"}
    assert captions(folder, "sks") == expected
    first, second = samples_of(folder, "sks"), samples_of(folder, "other")
    assert {name for name in first if first[name].stamp != second[name].stamp} == {"1.png", "3.png"}


def test_regularisation_images_have_captions_of_their_own(folder: Path) -> None:
    (folder / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1 of 5 images have no caption.*the same with --instance_prompt"):
        open_source(DataConfig(train_data_dir=str(folder)), None)
    with pytest.raises(UserError, match=r"1 of 5 images have no caption.*beside each$"):
        open_regularisation(DataConfig(reg_data_dir=str(folder), instance_prompt="sks"))
    for row in ({"file_name": "0.png"}, {"file_name": "0.png", "text": None}):
        (folder / "metadata.jsonl").write_text(json.dumps(row))
        with pytest.raises(UserError, match=r"--caption_column$"):
            open_regularisation(DataConfig(reg_data_dir=str(folder), instance_prompt="sks"))
    source = open_validation(DataConfig(validation_data_dir=str(folder), instance_prompt="sks"))
    assert source is not None
    assert source.size == 5
    with pytest.raises(UserError, match="--instance_prompt is empty"):
        DataConfig(instance_prompt=" ")


def test_the_listing_keeps_apart_what_it_finds(folder: Path) -> None:
    (folder / "sub" / "folder.heic").mkdir()
    found = list_images(str(folder))
    assert (found.unread, found.orphans, found.doubled, found.tables) == ([], [], [], [])
    assert found.folders == {
        os.path.realpath(folder): "", os.path.realpath(folder / "sub"): "sub/",
        os.path.realpath(folder / "sub" / "folder.heic"): "sub/folder.heic/",
    }  # fmt: skip
