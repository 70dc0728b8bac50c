"""Image folders and data sets: what they yield, and the one line each fault gives."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lpl.config import DataConfig
from lpl.data.sources import HubDataset, ImageFolder, open_source
from lpl.errors import UserError


def message(config: DataConfig) -> str:
    with pytest.raises(UserError) as caught:
        open_source(config, None)
    text = str(caught.value)
    assert "\n" not in text
    return text


def metadata(root: Path, *lines: str) -> DataConfig:
    for caption in root.rglob("*.txt"):
        caption.unlink()
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return DataConfig(train_data_dir=str(root))


def test_folder_is_sorted_nested_and_read_verbatim(folder: Path) -> None:
    source = ImageFolder(folder)
    assert [r.id for r in source.records] == ["0.png", "1.png", "2.png", "3.png", "sub/9.png"]
    assert [r.caption for r in source.records] == ["caption 0", "caption 1", "caption 2", "caption 3", "caption 9"]
    assert len(source) == 5
    assert source.read(4) == (folder / "sub/9.png").read_bytes()
    assert source.describe(4) == str(folder / "sub/9.png")


def test_folder_takes_every_suffix_and_leaves_hidden_files(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jpeg", "c.webp", "d.bmp", "e.tif", "f.TIFF", "g.avif", ".h.png", "notes.md"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text("x")
    assert [r.id for r in ImageFolder(tmp_path).records] == [
        "a.JPG", "b.jpeg", "c.webp", "d.bmp", "e.tif", "f.TIFF", "g.avif",
    ]  # fmt: skip


def test_folder_follows_links_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (8, 8)).save(other / "x.png")
    (other / "x.txt").write_text("x")
    (folder / "linked").symlink_to(other)
    (folder / "sub" / "circle").symlink_to(folder)
    assert [r.id for r in ImageFolder(folder).records][-2:] == ["linked/x.png", "sub/9.png"]
    assert len(ImageFolder(folder)) == 6


def test_max_train_samples_needs_no_captions_beyond(folder: Path) -> None:
    (folder / "3.txt").unlink()
    source = open_source(DataConfig(train_data_dir=str(folder), max_train_samples=3), None)
    assert [r.id for r in source.records] == ["0.png", "1.png", "2.png"]
    assert len(open_source(DataConfig(train_data_dir=str(folder / "sub"), max_train_samples=9), None)) == 1


def test_metadata_wins_over_text_and_takes_the_first_of_a_list(folder: Path) -> None:
    lines = [{"file_name": "0.png", "prompt": "from metadata"}, {"file_name": "./1.png", "prompt": ["one", "two"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "9.png", "prompt": "nested"}')
    captions = [r.caption for r in ImageFolder(folder, "prompt").records]
    assert captions == ["from metadata", "one", "caption 2", "caption 3", "nested"]


def test_nothing_given() -> None:
    text = message(DataConfig())
    assert "--train_data_dir" in text
    assert "--dataset_name" in text


def test_missing_and_empty_folder(tmp_path: Path) -> None:
    text = message(DataConfig(train_data_dir=str(tmp_path / "nowhere")))
    assert "--train_data_dir" in text
    assert "nowhere: no such folder" in text
    (tmp_path / "file").write_text("")
    assert "not a folder" in message(DataConfig(train_data_dir=str(tmp_path / "file")))
    (tmp_path / "empty").mkdir()
    assert "no images" in message(DataConfig(train_data_dir=str(tmp_path / "empty")))


def test_images_without_caption_are_counted_and_named(folder: Path) -> None:
    (folder / "1.txt").unlink()
    (folder / "3.txt").unlink()
    text = message(DataConfig(train_data_dir=str(folder)))
    assert "2 of 5 images have no caption, first 1.png" in text
    assert "metadata.jsonl" in text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{file_name: 1.png", "line 2: not JSON"),
        ("[1, 2]", "line 2: not a JSON object"),
        ('{"text": "x"}', "line 2: no key file_name; its keys: text"),
        ('{"file_name": "gone.png", "text": "x"}', "line 2: gone.png does not exist"),
        (
            '{"file_name": "1.png", "prompt": "x", "tags": "y"}',
            "line 2: no key text; its keys: file_name, prompt, tags",
        ),
        ('{"file_name": "0.png", "text": "x"}', "line 2: 0.png is listed a second time"),
        ('{"file_name": "1.png", "text": null}', "line 2: a caption must be a string"),
        ('{"file_name": "1.png", "text": []}', "line 2: a caption must be a string"),
    ],
)
def test_faulty_metadata_lines(folder: Path, line: str, expected: str) -> None:
    text = message(metadata(folder, '{"file_name": "0.png", "text": "x"}', line))
    assert f"{folder / 'metadata.jsonl'}, {expected}" in text


def test_missing_metadata_key_names_the_flag(folder: Path) -> None:
    assert "--caption_column" in message(metadata(folder, '{"file_name": "0.png", "prompt": "x"}'))


def test_caption_that_is_not_utf8(folder: Path) -> None:
    (folder / "1.txt").write_bytes(b"caf\xe9")
    assert "1.txt: not UTF-8 text (byte 3)" in message(DataConfig(train_data_dir=str(folder)))


def test_image_that_vanishes(folder: Path) -> None:
    source = ImageFolder(folder)
    os.remove(folder / "2.png")
    with pytest.raises(UserError, match=r"2\.png: cannot be read"):
        source.read(2)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A DatasetDict on disk: one image in place, one by path; captions as lists."""
    import datasets

    (tmp_path / "outside.png").write_bytes(png(20))
    rows = {
        "picture": [{"bytes": png(10), "path": None}, {"bytes": None, "path": str(tmp_path / "outside.png")}],
        "words": [["first", "second"], ["only"]],
        "id": [7, 8],
    }
    features = datasets.Features(
        {"picture": datasets.Image(), "words": datasets.List(datasets.Value("string")), "id": datasets.Value("int64")}
    )
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "saved"))
    split.save_to_disk(str(tmp_path / "single"))
    datasets.DatasetDict({"test": split}).save_to_disk(str(tmp_path / "test_only"))
    return tmp_path / "saved"


def hub(path: Path, **options: Any) -> DataConfig:
    return DataConfig(dataset_name=str(path), **{"image_column": "picture", "caption_column": "words"} | options)


def test_saved_dataset_gives_encoded_bytes_and_first_captions(saved: Path) -> None:
    for path in (saved, saved.parent / "single"):
        source = open_source(hub(path), None)
        assert [(r.id, r.caption) for r in source.records] == [("0", "first"), ("1", "only")]
        assert [source.read(0), source.read(1)] == [png(10), png(20)]
        assert source.describe(1) == f"row 1 of {path}"
        assert len(open_source(hub(path, max_train_samples=1), None)) == 1
    assert pickle.loads(pickle.dumps(source)).read(1) == png(20)


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_images_may_be_paths_or_plain_bytes(tmp_path: Path, kind: str) -> None:
    import datasets

    (tmp_path / "a.png").write_bytes(png(3))
    rows = {"image": [str(tmp_path / "a.png") if kind == "string" else png(3)], "text": ["x"]}
    features = datasets.Features({"image": datasets.Value(kind), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    assert open_source(DataConfig(dataset_name=str(tmp_path / "saved")), None).read(0) == png(3)


def test_row_without_image_is_named(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": png(1), "path": None}, None], "text": ["x", "y"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    source = open_source(DataConfig(dataset_name=str(tmp_path / "saved")), None)
    with pytest.raises(UserError, match=r"row 1 of .* holds no image in --image_column image"):
        source.read(1)


def test_folders_are_checked_before_anything_heavy_loads() -> None:
    code = "import sys, lpl.data.sources; sys.exit(bool({'datasets', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dataset_folder_is_loaded(folder: Path, tmp_path: Path) -> None:
    lines = [{"file_name": f"{n}.png", "text": f"caption {n}"} for n in range(4)]
    metadata(folder, *map(json.dumps, lines))
    (folder / "sub" / "9.png").unlink()
    source = HubDataset(DataConfig(dataset_name=str(folder)), str(tmp_path / "hf"))
    assert [r.caption for r in source.records] == [f"caption {n}" for n in range(4)]
    assert source.read(2) == (folder / "2.png").read_bytes()


def test_missing_columns_are_listed(saved: Path) -> None:
    text = message(hub(saved, image_column="image"))
    assert "--image_column image" in text
    assert "it has: picture, words, id" in text
    assert "--caption_column text" in message(hub(saved, caption_column="text"))


def test_columns_of_the_wrong_kind(saved: Path) -> None:
    assert "--image_column id" in message(hub(saved, image_column="id"))
    assert "--caption_column id, row 0" in message(hub(saved, caption_column="id"))


def test_data_set_without_train_split_or_with_needless_configuration(saved: Path) -> None:
    assert "no split train; it has: test" in message(hub(saved.parent / "test_only"))
    assert "--dataset_config_name large" in message(hub(saved, dataset_config_name="large"))


def test_data_set_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    text = message(DataConfig(dataset_name="nobody/nothing"))
    assert "--dataset_name nobody/nothing: cannot be opened" in text
    (tmp_path / "empty").mkdir()
    assert "--dataset_name" in message(DataConfig(dataset_name=str(tmp_path / "empty")))
