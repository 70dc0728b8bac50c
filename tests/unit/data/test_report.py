"""The numbers, the text and the files of `lpl data`, against folders counted by hand."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lpl.base.errors import UserError
from lpl.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lpl.config.run_folder import BAD_FILES
from lpl.data.report import make_report
from lpl.data.sources import open_regularisation, open_source
from lpl.data.survey import first_draws, look_again, read_through

Picture = Callable[[int, int, int], Image.Image]


class Report(NamedTuple):
    text: str
    fault: UserError | None
    found: dict[str, Any]
    files: set[str]


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., Report]:
    """Reports on tmp_path/images at 32 pixels; keywords are options of data, run or model, and num_shown."""

    def run(num_shown: int = 0, **options: Any) -> Report:
        config = config_of(tmp_path / "images", **options)
        sources = open_source(config.data, None), open_regularisation(config.data)
        folder = tmp_path / "report"
        text, fault = make_report(config, *sources, folder, num_shown)
        files = {p.name for p in folder.glob("[!.]*")}
        return Report(text, fault, json.loads((folder / "data.json").read_text()), files)

    return run


def config_of(images: Path, **options: Any) -> TrainConfig:
    kinds: dict[str, Any] = {"data": DataConfig, "run": RunConfig, "model": ModelConfig}
    if not {"dataset_name", "webdataset"} & set(options):
        options = {"train_data_dir": str(images)} | options
    options = {"resolution": 32} | options
    groups = {
        group: kind(**{name: value for name, value in options.items() if name in kind.__dataclass_fields__})
        for group, kind in kinds.items()
    }
    return TrainConfig(**groups)


def save(path: Path, image: Image.Image, caption: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def counted(tmp_path: Path, picture: Picture) -> Path:
    """Seven images in two folders, one of them a copy and one of them broken."""
    root = tmp_path / "images"
    save(root / "dogs" / "a.png", picture(0, 64, 32), "one, two")  # half is cropped away
    save(root / "dogs" / "b.png", picture(1, 32, 32), "")
    save(root / "dogs" / "b again.png", picture(1, 32, 32), "one, two")
    save(root / "cats" / "small.png", picture(2, 16, 16), "a much longer caption")  # scaled up 2 x
    save(root / "cats" / "tall.png", picture(3, 40, 60), "tall")  # to 32 x 48: a third is cropped away
    save(root / "cats" / "large.png", picture(4, 96, 96), "large")
    (root / "cats" / "broken.png").write_bytes(b"none")
    (root / "cats" / "broken.txt").write_text("broken")
    return root


def test_numbers_are_those_counted_by_hand(counted: Path, report: Any) -> None:
    options = {"repeats": "dogs=2.5", "train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 8}
    found = report(**options, max_bad_fraction=0.5).found
    assert found["resolution"] == 32
    assert (found["batch_size"], found["bad_files"], found["fault"]) == (4, 1, None)
    assert found["epoch"] == {"draws": 11, "steps": 2.75}  # 3 x 1 + 3 x 2.5 = 10.5 draws, rounded to a whole epoch
    assert (found["run"]["steps"], found["run"]["epochs"]) == (22, 8.0)
    assert found["run"]["draws_per_image"] == pytest.approx(8 * (3 + 7.5) / 6)
    assert found["environment"]["torch"]
    (part,) = found["parts"]
    assert (part["seen"], part["images"], part["regularisation"]) == (7, 6, False)
    assert part["groups"] == [
        {"group": "cats", "images": 3, "repeats": 1.0, "draws": 3.0},
        {"group": "dogs", "images": 3, "repeats": 2.5, "draws": 7.5},
    ]
    assert part["captions"] == {
        "captions": 6, "different": 5, "several": 0, "empty": 1, "longest": 21,
        "longest_of": str(counted / "cats" / "small.png"), "too_long": 0, "with_tags": 2,
    }  # fmt: skip
    small = {"name": str(counted / "cats" / "small.png"), "factor": 2.0}
    assert part["scaled_up"] == {"images": 1, "share": pytest.approx(1 / 6), "worst": [small]}
    assert part["cropped_away"]["mean"] == pytest.approx((1 / 2 + 1 / 3) / 6)
    assert part["cropped_away"]["worst"] == [
        {"name": str(counted / "dogs" / "a.png"), "share": 0.5},
        {"name": str(counted / "cats" / "tall.png"), "share": pytest.approx(1 / 3)},
    ]
    assert part["bad_files"] == [
        {
            "reason": "not a PNG, JPEG, WebP, AVIF, BMP, TIFF, GIF file (begins with b'none')",
            "images": 1,
            "first": str(counted / "cats" / "broken.png"),
        }
    ]
    assert found["buckets"] == [{"width": 32, "height": 32, "images": 6, "share": 1.0, "draws": 11, "steps": 2.75}]
    copies = [str(counted / "dogs" / name) for name in ("b again.png", "b.png")]
    assert found["duplicates"] == {"images": 1, "sets": [copies]}


def test_buckets_share_the_draws(counted: Path, report: Any) -> None:
    # Sides of 8 up to 1,024 pixels in all: 24 x 40, 32 x 32, 40 x 24.
    options = {"buckets": True, "bucket_step": 8, "repeats": "dogs=4", "train_batch_size": 3}
    found = report(**options, max_bad_fraction=1.0).found
    keys = ("width", "height", "images", "draws")
    assert [tuple(bucket[key] for key in keys) for bucket in found["buckets"]] == [
        (24, 40, 1, 1),
        (32, 32, 4, 10),
        (40, 24, 1, 4),
    ]
    assert [bucket["share"] for bucket in found["buckets"]] == pytest.approx([1 / 6, 4 / 6, 1 / 6])
    assert [bucket["steps"] for bucket in found["buckets"]] == pytest.approx([1 / 3, 10 / 3, 4 / 3])
    assert found["epoch"]["draws"] == 15
    repeated = [warning for warning in found["warnings"] if "repeat in it" in warning]
    assert repeated == ["a batch of 3 takes more than the 1 draw that an epoch has at 24 x 40: images repeat in it"]
    # a.png becomes 48 x 24 and loses 8 of its 48 columns; tall.png 27 x 40 and loses 3 of 27.
    worst = found["parts"][0]["cropped_away"]["worst"]
    assert [entry["share"] for entry in worst] == [pytest.approx(8 / 48), pytest.approx(3 / 27)]


def test_buckets_without_an_image_are_left_out(tmp_path: Path, report: Any, picture: Picture) -> None:
    for number, width in enumerate((32, 64, 64)):
        save(tmp_path / "images" / f"{number}.png", picture(number, width, 32), "x")
    found = report(buckets=True, bucket_step=8).found["buckets"]
    assert [(b["width"], b["height"], b["images"], b["draws"]) for b in found] == [(32, 32, 1, 1), (40, 24, 2, 2)]


def test_several_captions_of_an_image(tmp_path: Path, report: Any, picture: Picture) -> None:
    root = tmp_path / "images"
    root.mkdir()
    lines = []
    for number, captions in enumerate((["one", "two, three"], "one", ["", "four"])):
        picture(number, 32, 32).save(root / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": captions}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    result = report()
    captions = result.found["parts"][0]["captions"]
    keys = ("captions", "different", "several", "empty", "longest", "with_tags")
    assert [captions[key] for key in keys] == [5, 4, 2, 1, 10, 1]
    assert "captions     5, 4 different, 2 images with several, 1 empty\n" in result.text
    captions = report(caption_choice="first").found["parts"][0]["captions"]
    assert [captions[key] for key in keys] == [3, 2, 2, 1, 3, 0]


def test_regularisation_images_are_a_part_of_their_own(
    counted: Path, report: Any, tmp_path: Path, picture: Picture
) -> None:
    for number in range(9):
        save(tmp_path / "reg" / "any" / f"{number}.png", picture(20 + number, 16, 16), "an animal")
    save(tmp_path / "reg" / "b.png", picture(1, 32, 32), "an animal")
    result = report(reg_data_dir=str(tmp_path / "reg"), max_bad_fraction=1.0, num_shown=16)
    assert {draw["sample"] for draw in result.found["shown"]} >= {"reg/b.png", "dogs/b.png", "reg/any/8.png"}
    first, second = result.found["parts"]
    assert (first["images"], second["images"]) == (6, 10)
    assert [group["group"] for group in second["groups"]] == ["reg/", "reg/any"]
    assert second["scaled_up"]["images"] == 9
    assert second["scaled_up"]["worst"][0]["name"] == str(tmp_path / "reg" / "any" / "0.png")
    assert result.found["epoch"]["draws"] == 16
    assert result.found["duplicates"]["images"] == 2
    for warning in (
        "regularisation: 90% of the images are scaled up",
        "regularisation: every image has the same caption",
        "62% of all draws are of regularisation images",
    ):
        assert any(found.startswith(warning) for found in result.found["warnings"]), warning
    assert "\nreg images   10 in --reg_data_dir " in result.text


def test_too_many_bad_files_are_reported_and_then_the_fault(counted: Path, report: Any) -> None:
    result = report(num_shown=3, max_bad_fraction=0)
    assert result.fault is not None
    assert "1 of 7 images cannot be used" in str(result.fault)
    assert result.found["fault"] == str(result.fault)
    assert result.found["parts"][0]["images"] == 6
    assert result.files == {"data.json", "draws.png", "cropped.png", BAD_FILES}
    assert "images       6 of 7 in --train_data_dir" in result.text
    assert "bad files    1, listed in " in result.text


def test_a_report_without_a_usable_image(counted: Path, report: Any) -> None:
    report(num_shown=3, max_bad_fraction=1.0)
    for image in counted.rglob("*.png"):
        image.write_bytes(b"none")
    result = report(num_shown=3, max_bad_fraction=1.0)
    assert "no image in it can be used" in str(result.fault)
    assert result.files == {"data.json", BAD_FILES}  # and no pictures of before
    assert result.found["buckets"] == []
    assert "images       0 of 7" in result.text
    assert "7 x not a PNG" in result.text
    assert result.text.startswith("verdict      no run would start: ")


def test_nothing_is_said_of_what_is_not_there(tmp_path: Path, report: Any, picture: Picture) -> None:
    for number in range(4):
        save(tmp_path / "images" / f"{number}.png", picture(number, 32, 32), f"caption {number}")
    result = report(num_shown=2)
    assert result.text.splitlines() == [
        "verdict      ready to train",
        f"images       4 in --train_data_dir {tmp_path / 'images'}",
        "captions     4, 4 different",
        f"             longest 9 characters: {tmp_path / 'images' / '0.png'}",
        "epoch        4 draws, 4 steps of 1",
        "run          400 steps of 1 sample, which draw each of 4 images 100 times on average "
        "(by --num_train_epochs 100)",
        "saves        the result at the end",
        "validates    nothing (--validation_prompt draws images)",
        "mirrors      no image",
        "crops        32 x 32",
        f"written      {tmp_path / 'report' / 'data.json'}",
        f"             {tmp_path / 'report' / 'draws.png'}",
    ]
    assert result.files == {"data.json", "draws.png"}


def test_tables_are_aligned(counted: Path, report: Any) -> None:
    lines = report(max_bad_fraction=1.0, repeats="dogs=12.5", buckets=True, bucket_step=8).text.splitlines()
    start = next(n for n, line in enumerate(lines) if "folder" in line)
    assert lines[start : start + 3] == [
        "             folder  images  repeats  draws an epoch",
        "             cats         3        1               3",
        "             dogs         3     12.5            37.5",
    ]
    start = next(n for n, line in enumerate(lines) if "width x height" in line)
    assert [line.index("x") for line in lines[start + 1 : start + 4]] == [19] * 3
    assert len({len(line) for line in lines[start : start + 4]}) == 1


def test_many_folders_are_summed_up(tmp_path: Path, report: Any, picture: Picture) -> None:
    for number in range(23):
        save(tmp_path / "images" / f"f{number:02}" / "x.png", picture(number, 32, 32), "same")
    save(tmp_path / "images" / "f22" / "y.png", picture(99, 32, 32), "same")
    result = report()
    lines = result.text.splitlines()
    assert lines[0] == "verdict      ready to train, after a look at 1 warning below"
    assert lines[3].split() == ["f22", "2", "1", "2"]
    assert lines[23].split() == ["3", "more", "3", "3"]
    assert len(result.found["parts"][0]["groups"]) == 23


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (
            {"train_batch_size": 7},
            "a batch of 7 takes more than the 6 draws that an epoch has at 32 x 32: images repeat",
        ),
        ({"max_train_steps": 2}, "the run of 2 steps makes 0.33 epochs: some images are never drawn"),
        ({"num_train_epochs": 301}, "each image is drawn 301 times, and above 300"),
        ({"repeats": "dogs=0"}, "never drawn, as their repeats are 0: dogs"),
        ({"shuffle_caption": True, "caption_separator": ";"}, "--shuffle_caption has no effect: no caption has a ';'"),
        ({}, "17% of the images are scaled up: they train blur"),
        ({}, "1 image has an empty caption"),
        ({}, "1 copy of other images"),
    ],
)
def test_warnings(options: dict[str, Any], warning: str, counted: Path, report: Any) -> None:
    warnings = report(**options, max_bad_fraction=1.0).found["warnings"]
    assert [found for found in warnings if found.startswith(warning)] != []
    plain = report(max_bad_fraction=1.0).found["warnings"]
    assert any(found.startswith(warning) for found in plain) == (not options)


def test_warns_of_one_caption_for_all_long_ones_and_much_cropping(
    tmp_path: Path, report: Any, picture: Picture
) -> None:
    for number in range(2):
        save(tmp_path / "images" / f"{number}.png", picture(number, 384, 192), "a," * 38)  # 76 tokens
    assert report(resolution=192).found["warnings"] == [
        "50% of the images' area is cropped away; --buckets would make that 0%",
        "every image has the same caption",
        "2 captions or more exceed --max_token_length 75: the model does not see how they end",
    ]
    assert report(resolution=192, buckets=True, max_token_length=150).found["warnings"] == [
        "every image has the same caption",
        "--buckets: all images are of one bucket",
    ]


def test_draws_are_those_of_training(folder: Path, encode: Any, encoder: Any) -> None:
    options: dict[str, Any] = {
        "train_data_dir": str(folder), "random_flip": True, "crop_variants": 3, "shuffle_caption": True,
        "caption_separator": " ", "caption_prefix": "sks", "proportion_empty_prompts": 0.3, "buckets": True,
        "bucket_step": 8, "repeats": "sub=2",
    }  # fmt: skip
    trained = encode(seed=5, **options)
    config = config_of(folder, **options, seed=5, train_batch_size=2, max_train_steps=8)
    survey = read_through(config, open_source(config.data, None), None, folder.parent / "bad.jsonl")
    assert survey.order is not None
    draws = first_draws(survey, 99)
    assert len(draws) == 16  # as long as the run
    assert {draw.crop.flip for draw in draws} == {True, False}
    assert "" in {draw.caption for draw in draws}
    for step in range(8):
        batch, own = trained.batch(survey.order.batch(step)), [draw for draw in draws if draw.step == step]
        assert [(draw.row.id, draw.count) for draw in own] == list(zip(batch.sample_ids, batch.counts, strict=True))
        assert [list(draw.crop.size_conditioning) for draw in own] == batch.extra["sizes"].tolist()
        text = encoder.encode_text([draw.caption for draw in own])
        assert torch.equal(batch.text["prompt_embeds"], text["prompt_embeds"])


def test_what_is_shown_is_read_no_further_than_needed(folder: Path) -> None:
    config = config_of(folder)
    survey = read_through(config, open_source(config.data, None), None, folder.parent / "bad.jsonl")
    (piece,) = survey.parts[0].source.pieces
    seen = []

    def counting() -> Any:
        for sample in piece.samples():
            seen.append(sample.id)
            yield sample

    survey.parts[0].source.pieces[:] = [replace(piece, samples=counting)]
    look_again(survey, {0: lambda image, _: image.size, 2: lambda image, _: image.size})
    assert seen == ["0.png", "1.png", "2.png"]


def test_an_image_that_changes_meanwhile_is_an_error(folder: Path) -> None:
    config = config_of(folder)
    survey = read_through(config, open_source(config.data, None), None, folder.parent / "bad.jsonl")
    assert look_again(survey, {1: lambda image, _: image.size, 4: lambda image, _: image.size}) == {
        1: (32, 32),
        4: (70, 33),
    }
    Image.new("RGB", (32, 32)).save(folder / "1.png")
    with pytest.raises(UserError, match=r"1\.png has changed while the data were read: run again"):
        look_again(survey, {1: lambda image, _: image.size})
    (folder / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png has changed"):
        look_again(survey, {1: lambda image, _: image.size})


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["rows", "stream", "shards", "first shards"])
def test_every_source_can_be_shown(kind: str, tmp_path: Path, report: Any, picture: Picture) -> None:
    images = [encoded(picture(number, 32 + number, 40)) for number in range(6)]
    rows: dict[str, Any]
    if "shards" in kind:
        for shard in range(2):
            with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
                for number in range(3 * shard, 3 * shard + 3):
                    for name, content in ((f"{number}.png", images[number]), (f"{number}.txt", b"text %d" % number)):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        options: dict[str, Any] = {"webdataset": str(tmp_path / "{0..1}.tar")}
        if kind == "first shards":
            options["max_train_samples"] = 5
    else:
        rows = {"image": [{"bytes": data, "path": None} for data in images], "text": [f"text {n}" for n in range(6)]}
        pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
        options = {"dataset_name": str(tmp_path / "rows.parquet"), "streaming": kind == "stream"}
    count = 5 if kind == "first shards" else 6
    result = report(num_shown=count, **options)
    assert result.found["parts"][0]["images"] == count
    assert {draw["caption"] for draw in result.found["shown"]} == {f"text {n}" for n in range(count)}
    # The k-th image is 32 + k wide: every crop is of the image that the caption belongs to.
    assert {(d["caption"], d["original_size"][1]) for d in result.found["shown"]} == {
        (f"text {n}", 32 + n) for n in range(count)
    }
    with Image.open(tmp_path / "report" / "draws.png") as sheet:
        assert np.asarray(sheet).std() > 20


def test_a_folder_that_cannot_be_written(counted: Path, tmp_path: Path) -> None:
    config = config_of(counted)
    (tmp_path / "report").write_text("a file")
    with pytest.raises(UserError, match=r"^--output_dir .*report: cannot be written \(File exists\)"):
        make_report(config, open_source(config.data, None), None, tmp_path / "report", 0)
