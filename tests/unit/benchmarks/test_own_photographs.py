"""The quality benchmark on photographs of one's own (--images)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.quality.fetch import Counts, fetch, parts_of, stems_of
from benchmarks.quality.photographs import own_photographs
from lpl.errors import UserError


def noise(file: Path, size: tuple[int, int] = (120, 100), spread: float = 60.0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, spread).convert("RGB").save(file)


def subjects(folder: Path) -> dict[str, str]:
    return {p.name: p.subject for p in own_photographs(folder)}


@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_photographs_are_upright(tmp_path: Path, ending: str) -> None:
    image = Image.new("RGB", (200, 100), "black")
    image.paste("white", (0, 0, 100, 100))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right: what is left comes up
    image.save(tmp_path / f"a.{ending}", exif=exif)
    (photograph,) = own_photographs(tmp_path)
    upright, opaque = photograph.load()
    assert upright.size == opaque.size == (100, 200)
    assert upright.getpixel((50, 50)) == (255, 255, 255)
    assert upright.getpixel((50, 150)) == (0, 0, 0)


def test_captions_need_no_article(tmp_path: Path) -> None:
    texts = {"a": "portrait of my dog Rex\n", "b": "A red barn.", "c": "\ufeffRex", "d_e": "\n", "f": None}
    for name, text in texts.items():
        noise(tmp_path / f"{name}.png")
        if text is not None:
            (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    assert subjects(tmp_path) == {
        "own/a.png": "portrait of my dog Rex",
        "own/b.png": "a red barn",
        "own/c.png": "Rex",
        "own/d_e.png": "d e",
        "own/f.png": "f",
    }


def test_no_photograph_is_enlarged(tmp_path: Path) -> None:
    noise(tmp_path / "flat.png", (400, 50))
    noise(tmp_path / "panorama.png", (1000, 100))  # 64 pixels high once it is 640 wide
    noise(tmp_path / "enough.png", (400, 96))
    Image.new("RGBA", (400, 50), (255, 0, 0, 128)).save(tmp_path / "transparent.png")  # lies on a square of 400
    assert list(subjects(tmp_path)) == ["own/enough.png", "own/transparent.png"]


def test_crops_of_one_name_do_not_meet(tmp_path: Path) -> None:
    images = tmp_path / "images"
    names = [f"{i}.png" for i in range(16)]
    for one, other in (("x{}.png", "x{}.jpg"), ("a/b{}.png", "a_b{}.png")):
        pairs = ((one.format(i), other.format(i)) for i in range(100))
        names += next(pair for pair in pairs if parts_of(f"own/{pair[0]}") == parts_of(f"own/{pair[1]}"))
    for i, name in enumerate(names):
        noise(images / name, spread=20.0 + i)
    fetch(tmp_path / "made", [64], images=images, counts=Counts(2, 20))
    found = []
    for part in ("all", "held-out"):
        folder = tmp_path / "made" / "data" / "64" / part
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
        assert sorted(row["file_name"] for row in rows) == sorted(p.name for p in folder.glob("*.png"))
        found += [row["photograph"] for row in rows]
    assert {name: found.count(f"own/{name}") for name in names} == {
        name: 20 if parts_of(f"own/{name}") == ["held-out"] else 2 for name in names
    }


def test_only_what_would_be_called_the_same_is_called_otherwise() -> None:
    found = stems_of(["demo/china", "stamps/a/b.png", "own/x.png", "own/x.jpg", "own/y.jpg"])
    plain = {"demo/china": "demo_china", "stamps/a/b.png": "stamps_a_b", "own/y.jpg": "own_y"}
    assert {name: found[name] for name in plain} == plain
    assert len(set(found.values())) == 5
    assert found["own/x.png"] == stems_of(["own/x.jpg", "own/x.png"])["own/x.png"]


def test_broken_images_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-2000])
    (tmp_path / "page.png").write_text("<html>", encoding="utf-8")
    (tmp_path / "empty.png").touch()
    assert list(subjects(tmp_path)) == ["own/whole.jpg"]
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" is left out, as it cannot be read (")[0] for line in said] == [
        f"--images: {tmp_path / name}" for name in ("cut.jpg", "empty.png", "page.png")
    ]
    (tmp_path / "whole.jpg").unlink()
    with pytest.raises(UserError, match="no images in it that can be read and are 96 pixels across"):
        own_photographs(tmp_path)


def test_too_few_photographs_are_refused(tmp_path: Path) -> None:
    images = tmp_path / "images"
    of: dict[tuple[str, ...], list[str]] = {}
    for i in range(100):
        of.setdefault(tuple(parts_of(f"own/{i}.png")), []).append(f"{i}.png")
    held_out, quarter, rest = of["held-out",], of["all", "quarter"], of["all",]
    for name in [*held_out[:2], rest[0], quarter[0]]:
        noise(images / name)
    said = (
        f"^--images {images}: 4 photographs are too few: by a hash of their names 2 are held out, 2 trained on and 1 "
        "of those in the smaller set; needed are 3, 1, 1: add more$"
    )
    with pytest.raises(UserError, match=said):
        fetch(tmp_path / "made", [64], images=images, counts=Counts(1, 20))
    assert not (tmp_path / "made").exists()
    noise(images / held_out[2])
    fetch(tmp_path / "made", [64], images=images, counts=Counts(1, 20))
    assert len(list((tmp_path / "made/data/64/held-out").glob("*.png"))) == 60
    (images / quarter[0]).unlink()
    with pytest.raises(UserError, match="trained on and 0 of those in the smaller set"):
        fetch(tmp_path / "other", [64], images=images, counts=Counts(1, 20))
    with pytest.raises(UserError, match="needed are 2, 1, 1"):  # of one photograph there are no halves
        fetch(tmp_path / "other", [64], images=images, counts=Counts(1, 60))
