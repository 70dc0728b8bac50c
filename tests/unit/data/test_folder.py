"""Image folders: what they yield, what they touch, and the one line each fault gives."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reading_sources import samples_of, source_of

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.bad_files import BadImageError
from lpl.data.sources import Source, open_source
from lpl.data.sources import listing as module
from lpl.data.sources.listing import list_images


def folder_source(root: Path, **options: Any) -> Source:
    return source_of(train_data_dir=root, **options)


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    return {sample.id: sample.captions for sample in samples_of(source)}


def stamps(root: Path) -> tuple[list[str], dict[str, str]]:
    source = folder_source(root)
    return [piece.stamp for piece in source.pieces], {sample.id: sample.stamp for sample in samples_of(source)}


def message(root: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        folder_source(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_metadata(root: Path, *lines: str) -> Path:
    for caption in root.rglob("*.txt"):
        caption.unlink()
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def test_samples_are_sorted_nested_and_read_verbatim(folder: Path) -> None:
    source = folder_source(folder)
    samples = samples_of(source)
    assert [sample.id for sample in samples] == ["0.png", "1.png", "2.png", "3.png", "sub/9.png"]
    assert [sample.captions for sample in samples] == [(f"caption {n}",) for n in (0, 1, 2, 3, 9)]
    assert [sample.group for sample in samples] == ["", "", "", "", "sub"]
    assert samples[4].read() == (folder / "sub/9.png").read_bytes()
    assert samples[4].name == str(folder / "sub/9.png")
    assert source.size == 5
    assert source.name == f"--train_data_dir {folder}"
    assert str(folder) in source.identity
    assert len({sample.stamp for sample in samples}) == 5


def test_pieces_are_slices_in_the_order_of_paths(tmp_path: Path) -> None:
    for n in range(257):
        (tmp_path / f"{n:04d}.png").write_bytes(b"")
        (tmp_path / f"{n:04d}.txt").write_bytes(b"")
    pieces = folder_source(tmp_path).pieces
    assert [(piece.key, piece.size) for piece in pieces] == [("0", 256), ("1", 1)]
    assert [sample.id for sample in pieces[1].samples()] == ["0256.png"]
    assert [sample.captions for sample in pieces[1].samples()] == [("",)]


def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / os.fsdecode(b"b\xff.png")).write_bytes(b"")
    with pytest.raises(UserError, match=r"the file name b'b\\xff\.png' is not UTF-8: rename it"):
        list_images(str(tmp_path))


def test_listing_opens_no_image_and_no_caption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_metadata(folder, '{"file_name": "0.png", "text": "x"}')
    for name in ("1", "2", "3", "sub/9"):
        (folder / f"{name}.txt").write_text(name)
    opened: list[str] = []

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(path: Any, *args: Any, **options: Any) -> Any:
            opened.append(os.path.relpath(path, folder))
            return function(path, *args, **options)

        return noted

    monkeypatch.setattr("builtins.open", note(open))
    monkeypatch.setattr(io, "open", note(io.open))
    monkeypatch.setattr(os, "open", note(os.open))
    pieces = folder_source(folder).pieces
    assert opened == ["metadata.jsonl"]
    samples = pieces[0].samples()
    first, second = next(samples), next(samples)
    assert opened == ["metadata.jsonl", "1.txt"]
    first.read()
    assert opened == ["metadata.jsonl", "1.txt", "0.png"]
    assert second.captions == ("1",)


def test_each_file_is_looked_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    status = module.status_of

    def note(file: Any) -> Any:
        seen.append(file if isinstance(file, str) else file.name)
        return status(file)

    monkeypatch.setattr(module, "status_of", note)
    folder_source(folder)
    assert sorted(seen) == sorted(path.name for path in folder.rglob("*.*"))


def test_every_suffix_is_taken_and_hidden_files_are_left(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jpeg", "c.webp", "d.bmp", "e.tif", "f.TIFF", "g.avif", ".h.png", "notes.md"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "i.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [sample.id for sample in samples_of(folder_source(tmp_path))] == [
        "a.JPG", "b.jpeg", "c.webp", "d.bmp", "e.tif", "f.TIFF", "g.avif",
    ]  # fmt: skip


def test_links_are_followed_once_and_not_in_circles(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    for path in (other / "x.png", other / "deep" / "y.png"):
        path.write_bytes(b"")
        path.with_suffix(".txt").write_text("x")
    (folder / "again").symlink_to(folder / "sub")  # comes before sub, which still goes by its own name
    (folder / "linked").symlink_to(other)
    (folder / "linked_too").symlink_to(other / "deep")
    (folder / "self").symlink_to(folder / "self")
    (folder / "sub" / "circle").symlink_to(folder)
    ids = [sample.id for sample in samples_of(folder_source(folder))]
    assert ids[4:] == ["linked/deep/y.png", "linked/x.png", "sub/9.png"]


def test_link_to_no_image_is_kept_and_says_so(folder: Path) -> None:
    (folder / "2.png").unlink()
    (folder / "2.png").symlink_to(folder / "nowhere")
    sample = samples_of(folder_source(folder))[2]
    with pytest.raises(BadImageError) as caught:
        sample.read()
    assert caught.value.reason == "cannot be read (No such file or directory)"


def test_folder_that_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: str) -> Any:
        if path.rstrip("/").endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{folder}/sub/: cannot be listed (Permission denied)" in message(folder)


def test_max_train_samples_needs_no_captions_beyond(folder: Path) -> None:
    (folder / "3.txt").unlink()
    source = open_source(DataConfig(train_data_dir=str(folder), max_train_samples=3), None)
    assert [sample.id for sample in samples_of(source)] == ["0.png", "1.png", "2.png"]
    assert source.size == 3
    assert open_source(DataConfig(train_data_dir=str(folder / "sub"), max_train_samples=9), None).size == 1


def test_max_train_samples_does_not_make_it_another_source(folder: Path) -> None:
    whole = folder_source(folder)
    part = folder_source(folder, max_train_samples=3)
    assert whole.identity == part.identity
    assert whole.pieces[0].stamp != part.pieces[0].stamp
    assert folder_source(folder, caption_column="other").identity != whole.identity


def test_metadata_wins_over_text_and_may_hold_several_captions(folder: Path) -> None:
    lines = [{"file_name": "0.png", "prompt": "from metadata"}, {"file_name": "./1.png", "prompt": ["one", "two"]}]
    (folder / "metadata.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, lines)) + "\r\n\n")
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "9.png", "prompt": ""}')
    assert captions(folder_source(folder, caption_column="prompt")) == {
        "0.png": ("from metadata",),
        "1.png": ("one", "two"),
        "2.png": ("caption 2",),
        "3.png": ("caption 3",),
        "sub/9.png": ("",),
    }


def test_metadata_may_name_what_the_listing_leaves_out(folder: Path) -> None:
    (folder / "x.gif").write_bytes(b"gif")
    (folder / "metadata.jsonl").write_text('{"file_name": "x.gif", "text": "x"}')
    sample = samples_of(folder_source(folder))[-1]
    assert (sample.id, sample.captions, sample.read()) == ("x.gif", ("x",), b"gif")


def test_a_text_file_is_one_caption_on_one_line(folder: Path) -> None:
    (folder / "1.txt").write_text("\ufeff a cat,\n\non a mat \n")
    (folder / "2.txt").write_text("")
    (folder / "3.caption").write_text("not read")
    assert captions(folder_source(folder))["1.png"] == ("a cat, on a mat",)
    assert captions(folder_source(folder))["2.png"] == ("",)
    assert captions(folder_source(folder))["3.png"] == ("caption 3",)


def test_stamps_stay_and_follow_image_and_text(folder: Path) -> None:
    (piece,), samples = stamps(folder)
    assert stamps(folder) == ([piece], samples)
    os.utime(folder / "1.png", ns=(1, 1))
    (touched,), after = stamps(folder)
    assert touched != piece
    assert {name for name in samples if samples[name] != after[name]} == {"1.png"}
    (folder / "2.txt").write_text("another caption")
    (edited,), later = stamps(folder)
    assert edited not in (piece, touched)
    assert {name for name in samples if after[name] != later[name]} == {"2.png"}
    (folder / "0.png").rename(folder / "00.png")
    (folder / "0.txt").rename(folder / "00.txt")
    assert stamps(folder)[0] != [edited]


def test_stamps_follow_captions_in_metadata_but_not_its_other_keys(folder: Path) -> None:
    lines = [json.dumps({"file_name": f"{name}.png", "text": f"x {name}"}) for name in ("0", "1", "2", "3", "sub/9")]
    (piece,), samples = stamps(write_metadata(folder, *lines))
    assert stamps(write_metadata(folder, *reversed(lines))) == ([piece], samples)
    noted = json.dumps({"file_name": "0.png", "text": "x 0", "note": 1})
    assert stamps(write_metadata(folder, noted, *lines[1:])) == ([piece], samples)
    changed = json.dumps({"file_name": "0.png", "text": ["x 0", "y"]})
    (edited,), after = stamps(write_metadata(folder, changed, *lines[1:]))
    assert edited != piece
    assert {name for name in samples if samples[name] != after[name]} == {"0.png"}


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    text = message(tmp_path / "nowhere")
    assert f"--train_data_dir {tmp_path / 'nowhere'}: no such folder" in text
    (tmp_path / "file").write_text("")
    assert "not a folder" in message(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "no images" in message(tmp_path / "empty")


def test_images_without_caption_are_counted_and_named(folder: Path) -> None:
    (folder / "1.txt").unlink()
    (folder / "3.txt").unlink()
    text = message(folder)
    assert "2 of 5 images have no caption, first 1.png" in text
    assert "metadata.jsonl" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{file_name: 1.png", "line 2: not JSON"),
        ("[1, 2]", "line 2: not a JSON object"),
        ('{"text": "x"}', "line 2: no key file_name; its keys: text"),
        (
            '{"file_name": "gone.png", "text": "x"}\n{"file_name": "too.png", "text": "x"}',
            "line 2: gone.png does not exist (2 such in all)",
        ),
        (
            '{"file_name": "1.png", "prompt": "x", "tags": "y"}',
            "line 2: no key text; its keys: file_name, prompt, tags",
        ),
        ('{"file_name": "0.png", "text": "x"}', "line 2: 0.png is listed a second time (1 such in all)"),
        ('{"file_name": "1.png", "text": null}', "line 2: a caption must be a string"),
        ('{"file_name": "1.png", "text": []}', "line 2: a caption must be a string"),
    ],
)
def test_faulty_metadata_lines(folder: Path, line: str, expected: str) -> None:
    text = message(write_metadata(folder, '{"file_name": "0.png", "text": "x"}', line))
    assert f"{folder / 'metadata.jsonl'}, {expected}" in text


def test_two_metadata_files_may_not_name_one_image(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "sub/9.png", "text": "x"}')
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "y"}')
    assert f"{folder / 'sub' / 'metadata.jsonl'}, line 1: 9.png is listed a second time" in message(folder)


def test_missing_metadata_key_names_the_flag(folder: Path) -> None:
    assert "--caption_column" in message(write_metadata(folder, '{"file_name": "0.png", "prompt": "x"}'))


def test_captions_that_are_not_utf8(folder: Path) -> None:
    (folder / "1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"1\.txt, line 1: not UTF-8 text \(byte 3 of the file\): save it as UTF-8"):
        captions(folder_source(folder))
    (folder / "metadata.jsonl").write_bytes(b'\n{"\xe9')
    assert "metadata.jsonl, line 2: not UTF-8 text (byte 3 of the file)" in message(folder)


def test_image_and_caption_that_vanish(folder: Path) -> None:
    source = folder_source(folder)
    samples = source.pieces[0].samples()
    os.remove(folder / "0.png")
    os.remove(folder / "1.txt")
    sample = next(samples)
    with pytest.raises(BadImageError):
        sample.read()
    with pytest.raises(UserError, match=r"1\.txt: cannot be read \(No such file or directory\)"):
        next(samples)


def test_a_suffix_alone_is_no_image(tmp_path: Path) -> None:
    for name in ("a.png", "a.txt", "png", "txt", "tif", "b.png.zip", "c.TXT"):
        (tmp_path / name).write_text("x")
    assert list(list_images(str(tmp_path))[0]) == ["a.png"]
