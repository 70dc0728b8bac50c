"""Data sets read row by row: what they yield, and the one line each fault gives."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pytest
from reading_sources import png, samples_of

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.bad_files import BadImageError
from lpl.data.sources import open_source


def message(config: DataConfig, cache: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        samples_of(open_source(config, None if cache is None else str(cache)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A DatasetDict on disk: one image in place, one by path; captions as lists."""
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


def write_parquet(path: Path, start: int, count: int = 2) -> Path:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    numbers = range(start, start + count)
    rows = {"image": [{"bytes": png(n), "path": None} for n in numbers], "text": [f"caption {n}" for n in numbers]}
    path.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def test_saved_dataset_gives_encoded_bytes_and_all_captions(saved: Path) -> None:
    for path in (saved, saved.parent / "single"):
        source = open_source(hub(path), None)
        samples = samples_of(source)
        assert [(s.id, s.captions, s.group) for s in samples] == [("0", ("first", "second"), ""), ("1", ("only",), "")]
        assert [sample.read() for sample in samples] == [png(10), png(20)]
        assert samples[1].name == f"row 1 of {path}"
        assert (source.name, source.size) == (f"--dataset_name {path}", 2)
        assert open_source(hub(path, max_train_samples=1), None).size == 1
        assert [s.id for s in samples_of(open_source(hub(path, max_train_samples=1), None))] == ["0"]


def test_stamps_of_saved_data_sets_stay_and_follow_the_data(saved: Path) -> None:
    def stamps(**options: Any) -> list[str]:
        source = open_source(hub(saved, **options), None)
        return [piece.stamp for piece in source.pieces] + [sample.stamp for sample in samples_of(source)]

    before = stamps()
    assert stamps() == before
    assert stamps(max_train_samples=1)[0] != before[0]
    assert stamps(max_train_samples=1)[1] == before[1]
    (file,) = saved.rglob("*.arrow")
    os.utime(file, ns=(1, 1))
    assert not set(stamps()) & set(before)


def test_pieces_are_slices_of_rows(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": b"%d" % n, "path": None} for n in range(1030)], "text": [str(n) for n in range(1030)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    source = open_source(DataConfig(dataset_name=str(tmp_path / "saved")), None)
    assert [(piece.key, piece.size) for piece in source.pieces] == [
        ("0", 256),
        ("256", 256),
        ("512", 256),
        ("768", 256),
        ("1024", 6),
    ]
    assert source.pieces[0].stamp != source.pieces[1].stamp
    last = list(source.pieces[-1].samples())[-1]
    assert (last.id, last.captions, last.read()) == ("1029", ("1029",), b"1029")
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda sample: sample.read(), samples_of(source)))
    assert read == [b"%d" % n for n in range(1030)]


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_images_may_be_paths_or_plain_bytes(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(png(3))
    rows = {"image": [str(tmp_path / "a.png") if kind == "string" else png(3)], "text": ["x"]}
    features = datasets.Features({"image": datasets.Value(kind), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    (sample,) = samples_of(open_source(DataConfig(dataset_name=str(tmp_path / "saved")), None))
    assert sample.read() == png(3)


def test_rows_whose_image_cannot_be_read(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Value("string"), "text": datasets.Value("string")})
    rows = {"image": [None, str(tmp_path / "gone.png"), "foo://bar/x.png"], "text": ["x", "y", "z"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    reasons = []
    for sample in samples_of(open_source(DataConfig(dataset_name=str(tmp_path / "saved")), None)):
        with pytest.raises(BadImageError) as caught:
            sample.read()
        reasons.append(caught.value.reason)
    assert reasons[0] == "holds no image in --image_column image"
    assert reasons[1] == f"names the file {tmp_path / 'gone.png'}, which cannot be read (No such file or directory)"
    assert reasons[2].startswith("names the file foo://bar/x.png, which cannot be read (")


def test_dataset_folder_is_loaded(folder: Path, tmp_path: Path) -> None:
    for caption in folder.rglob("*.txt"):
        caption.unlink()
    (folder / "sub" / "9.png").unlink()
    lines = [{"file_name": f"{n}.png", "text": f"caption {n}"} for n in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = samples_of(open_source(DataConfig(dataset_name=str(folder)), str(tmp_path / "hf")))
    assert [sample.captions for sample in samples] == [(f"caption {n}",) for n in range(4)]
    assert samples[2].read() == (folder / "2.png").read_bytes()


def test_parquet_file_folder_and_pattern(tmp_path: Path) -> None:
    write_parquet(tmp_path / "tables" / "b-test.parquet", 2)
    write_parquet(tmp_path / "tables" / "a[1].parquet", 0)
    for name, expected in (("tables/a[1].parquet", [0, 1]), ("tables/*.parquet", [0, 1, 2, 3])):
        samples = samples_of(open_source(DataConfig(dataset_name=str(tmp_path / name)), str(tmp_path / "hf")))
        assert [sample.captions for sample in samples] == [(f"caption {n}",) for n in expected]
        assert [sample.read() for sample in samples] == [png(n) for n in expected]
    (tmp_path / "tables" / "b-test.parquet").unlink()
    assert open_source(DataConfig(dataset_name=str(tmp_path / "tables")), str(tmp_path / "hf")).size == 2


def test_parquet_stamps_are_equal_in_another_process_and_follow_the_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", 0)

    def stamp(cache: str) -> str:
        return open_source(DataConfig(dataset_name=str(path)), str(tmp_path / cache)).pieces[0].stamp

    code = (
        "import sys; from lpl.config import DataConfig; from lpl.data.sources import open_source; "
        "print(open_source(DataConfig(dataset_name=sys.argv[1]), sys.argv[2]).pieces[0].stamp)"
    )
    argv = [sys.executable, "-c", code, str(path), str(tmp_path / "other")]
    other = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    before = stamp("hf")
    assert other == before
    assert stamp("hf") == before
    write_parquet(path, 5)
    assert stamp("hf") != before


def test_parquet_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    assert "x.parquet: no such file" in message(DataConfig(dataset_name=str(tmp_path / "x.parquet")))
    assert "*.parquet: no such file" in message(DataConfig(dataset_name=str(tmp_path / "*.parquet")))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 cut short")
    config = DataConfig(dataset_name=str(tmp_path / "x.parquet"))
    assert "x.parquet: cannot be opened (" in message(config, tmp_path / "hf")
    config = DataConfig(dataset_name=str(tmp_path / "x.parquet"), dataset_config_name="large")
    assert "--dataset_config_name large: parquet files have no configurations" in message(config)


def test_missing_columns_are_listed(saved: Path) -> None:
    text = message(hub(saved, image_column="image"))
    assert "--image_column image" in text
    assert "it has: picture, words, id" in text
    assert "--caption_column text" in message(hub(saved, caption_column="text"))


def test_columns_of_the_wrong_kind(saved: Path) -> None:
    assert "--image_column id" in message(hub(saved, image_column="id"))
    text = message(hub(saved, caption_column="id"))
    assert text.startswith(f"--caption_column id: --dataset_name {saved} holds Value('int64') there, not strings")


@pytest.mark.parametrize("value", [None, []])
def test_row_without_caption_is_named(tmp_path: Path, value: Any) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))})
    rows = {"image": [{"bytes": png(1), "path": None}] * 2, "text": [["x"], value]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    text = message(DataConfig(dataset_name=str(tmp_path / "saved")))
    assert text.startswith(f"--caption_column text, row 1 of {tmp_path / 'saved'}: a caption must be a string")


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


def test_an_instance_prompt_serves_rows_and_tables_without_captions(tmp_path: Path) -> None:
    def parquet(**columns: Any) -> Path:
        images = {"image": [{"bytes": png(n), "path": None} for n in range(3)]}
        datasets.Dataset.from_dict(images | columns).to_parquet(tmp_path / f"{len(columns)}.parquet")
        return tmp_path / f"{len(columns)}.parquet"

    captioned, bare = parquet(text=["own", None, ""]), parquet()
    assert "--instance_prompt" in message(DataConfig(dataset_name=str(captioned)), tmp_path / "hf")
    assert "--instance_prompt" in message(DataConfig(dataset_name=str(bare)), tmp_path / "hf")
    for streaming in (False, True):
        stamps = []
        for prompt in ("sks", "other"):
            for path, expected in ((captioned, ["own", prompt, ""]), (bare, [prompt] * 3)):
                config = DataConfig(dataset_name=str(path), streaming=streaming, instance_prompt=prompt)
                source = open_source(config, str(tmp_path / "hf"))
                assert [sample.captions for sample in samples_of(source)] == [(text,) for text in expected]
            stamps.append((source.pieces[0].stamp, samples_of(source)[0].stamp))
        assert stamps[0][0] != stamps[1][0]  # the captions are read anew
        assert stamps[0][1] == stamps[1][1]  # and no image
    misspelt = DataConfig(dataset_name=str(captioned), caption_column="txet", instance_prompt="sks")
    assert message(misspelt, tmp_path / "hf").startswith("--caption_column txet: ")
