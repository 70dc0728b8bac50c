"""Data sets read as streams, shard by shard."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from reading_sources import png, samples_of

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.bad_files import BadImageError
from lpl.data.sources import Source, open_source


def stream(tmp_path: Path, name: Path | str, **options: Any) -> Source:
    return open_source(DataConfig(dataset_name=str(name), streaming=True, **options), str(tmp_path / "hf"))


def write_parquet(path: Path, start: int, captions: list[Any] | None = None) -> None:
    texts = captions or [[f"caption {n}", "second"] for n in (start, start + 1)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    rows = {"image": [{"bytes": png(start + n), "path": None} for n in range(len(texts))], "text": texts}
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    for n in range(3):
        write_parquet(tmp_path / "tables" / f"{n}.parquet", 2 * n)
    return tmp_path / "tables"


def test_pieces_are_the_shards(tmp_path: Path, tables: Path) -> None:
    source = stream(tmp_path, tables / "*.parquet")
    assert [(piece.key, piece.size) for piece in source.pieces] == [("0", None), ("1", None), ("2", None)]
    samples = samples_of(source)
    assert [sample.id for sample in samples] == ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]
    assert [sample.captions for sample in samples] == [(f"caption {n}", "second") for n in range(6)]
    assert [sample.read() for sample in samples] == [png(n) for n in range(6)]
    assert {sample.group for sample in samples} == {""}
    assert samples[3].name == f"row 1 of shard 1 of {tables}/*.parquet"
    assert (source.name, source.size) == (f"--dataset_name {tables}/*.parquet", None)
    assert [sample.id for sample in source.pieces[1].samples()] == ["1/0", "1/1"]


def test_a_shard_is_opened_when_its_turn_comes_and_bytes_are_in_hand(tmp_path: Path, tables: Path) -> None:
    source = stream(tmp_path, tables)
    samples = list(source.pieces[0].samples())
    for n in range(3):
        (tables / f"{n}.parquet").unlink()
    assert [sample.read() for sample in samples] == [png(0), png(1)]
    with pytest.raises(UserError, match=r"--dataset_name .*: shard 1 cannot be read \(.*1.parquet"):
        list(source.pieces[1].samples())


def test_stamps_stay_and_follow_the_files(tmp_path: Path, tables: Path) -> None:
    def stamps() -> list[str]:
        return [piece.stamp for piece in stream(tmp_path, tables).pieces]

    before = stamps()
    assert stamps() == before
    assert len(set(before)) == 3
    os.utime(tables / "1.parquet", ns=(10**9, 10**9))
    touched = stamps()
    assert touched != before
    write_parquet(tables / "1.parquet", 9, [["longer " * 9]] * 2)
    os.utime(tables / "1.parquet", ns=(10**9, 10**9))
    assert stamps() != touched


def test_stream_and_rows_are_different_sources(tmp_path: Path, tables: Path) -> None:
    rows = open_source(DataConfig(dataset_name=str(tables)), str(tmp_path / "hf"))
    assert rows.identity != stream(tmp_path, tables).identity


def test_max_train_samples_takes_the_first_shards(tmp_path: Path, tables: Path) -> None:
    source = stream(tmp_path, tables, max_train_samples=3)
    (tables / "2.parquet").unlink()
    for _ in range(2):
        assert [sample.id for sample in samples_of(source)] == ["0/0", "0/1", "1/0"]


def test_images_by_path_are_read_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3))
    rows = [{"image": str(tmp_path / name), "text": "x"} for name in ("a.png", "gone.png")]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    there, gone = samples_of(stream(tmp_path, tmp_path / "rows"))
    assert there.read() == png(3)
    with pytest.raises(BadImageError, match=r"gone.png, which cannot be read"):
        gone.read()


def test_image_folder_as_a_stream(tmp_path: Path, folder: Path) -> None:
    for caption in folder.rglob("*.txt"):
        caption.unlink()
    (folder / "sub" / "9.png").unlink()
    lines = [{"file_name": f"{n}.png", "text": f"caption {n}"} for n in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = samples_of(stream(tmp_path, folder))
    assert [sample.captions for sample in samples] == [(f"caption {n}",) for n in range(4)]
    assert samples[2].read() == (folder / "2.png").read_bytes()


@pytest.mark.parametrize("value", [None, []])
def test_row_without_caption_is_named(tmp_path: Path, value: Any) -> None:
    write_parquet(tmp_path / "x.parquet", 0, [["x"], value])
    with pytest.raises(UserError) as caught:
        samples_of(stream(tmp_path, tmp_path / "x.parquet"))
    assert str(caught.value).startswith(f"--caption_column text, row 1 of shard 0 of {tmp_path}/x.parquet: a caption")


def test_columns_and_splits_are_checked_at_once(tmp_path: Path, tables: Path) -> None:
    with pytest.raises(UserError, match=r"--image_column picture: .* has no such column; it has: image, text"):
        stream(tmp_path, tables, image_column="picture")
    with pytest.raises(UserError, match=r"--caption_column image: .* not strings"):
        stream(tmp_path, tables, caption_column="image")
    (tables / "0.parquet").rename(tmp_path / "test.parquet")
    for n in (1, 2):
        (tables / f"{n}.parquet").unlink()
    (tmp_path / "test.parquet").rename(tables / "test.parquet")
    with pytest.raises(UserError, match=r"cannot be opened .*Bad split: train"):
        stream(tmp_path, tables)


def test_saved_data_sets_need_no_stream(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"image": ["a"], "text": ["x"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"--streaming: .* was saved by save_to_disk.*: drop --streaming"):
        stream(tmp_path, tmp_path / "saved")
