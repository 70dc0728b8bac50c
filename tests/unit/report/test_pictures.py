"""Pictures of sheets, found again, embedded within a budget."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpl.base.text import Prompt
from lpl.data.sheets import KEY, Cell, cells_note, read_cells
from lpl.report.pictures import ImagePart, RowKey, build_gallery, embed_all, encode, gather_pictures
from lpl.report.runs import RunFolder
from lpl.report.sources import Group, Inputs, Result
from lpl.training.validation_images import label_grid


def noise(seed: int, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).convert("RGB")


def test_every_validation_image_is_found_in_its_sheet(tmp_path: Path) -> None:
    """Two prompts, two images each, of two kinds of weights: the cell's pixels are the image's."""
    prompts = [Prompt("a fox"), Prompt("a very long prompt " * 9, "blur")]
    drawn = {kind: [noise(10 * k + i) for i in range(4)] for k, kind in enumerate(("raw", "ema"))}
    grid = label_grid(drawn, prompts, "step 3", [7, 8, 30, 31])
    grid.save(tmp_path / "sheet.png", pnginfo=cells_note(grid.info[KEY]))
    cells = read_cells(tmp_path / "sheet.png")
    assert len(cells) == 8
    order = {(kind, seed): i for kind in drawn for i, seed in enumerate([7, 8, 30, 31])}
    for cell in cells:
        assert cell.seed is not None
        found = ImagePart(tmp_path / "sheet.png", cell.box).read()
        assert np.array_equal(found, drawn[cell.kind][order[cell.kind, cell.seed]])
        assert cell.prompt == ("a fox" if cell.seed < 10 else f"{prompts[1].text} (without: blur)")


@pytest.mark.parametrize("note", ["no json", "[]", '[{"kind": "raw"}]', "3"])
def test_notes_that_are_none_are_passed_over(tmp_path: Path, note: str) -> None:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, note)
    noise(0).save(tmp_path / "a.png", pnginfo=info)
    assert read_cells(tmp_path / "a.png") == []


def test_cells_beyond_the_picture_are_none(tmp_path: Path) -> None:
    noise(0).save(tmp_path / "a.png", pnginfo=cells_note([Cell("raw", "x", 1, (0, 0, 33, 32))]))
    assert read_cells(tmp_path / "a.png") == []


def test_small_pictures_are_kept_exactly() -> None:
    picture = noise(1, 64)
    found = encode(picture, 1024, 80)
    assert np.array_equal(decoded(found.uri), picture)
    assert (found.width, found.height) == (64, 64)


def test_pictures_shrink_until_they_fit(tmp_path: Path) -> None:
    for i in range(4):
        noise(i, 800).save(tmp_path / f"{i}.png")
    pictures = [ImagePart(tmp_path / f"{i}.png", (0, 0, 800, 800)) for i in range(4)]
    large, notes = embed_all(pictures, 10**8)
    assert [e.width for e in large if e] == [800] * 4
    assert notes == []
    budget = 300_000
    small, notes = embed_all(pictures, budget)
    widths = {e.width for e in small if e}
    assert len(widths) == 1
    assert widths < {640, 512, 384, 256, 160}
    assert sum(len(e.uri) for e in small if e) <= budget
    assert notes == [f"4 pictures are shown smaller than they are, at most {widths.pop()} pixels a side"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    noise(0).save(tmp_path / "good.png")
    found, notes = embed_all([ImagePart(tmp_path / "bad.png"), ImagePart(tmp_path / "good.png")], 10**6)
    assert found[0] is None
    assert found[1] is not None
    assert len(notes) == 1
    assert str(tmp_path / "bad.png") in notes[0]


def test_a_damaged_sheet_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    noise(0).save(folder / "step-0000000.png", pnginfo=cells_note([Cell("raw", "x", 1, (0, 0, 8, 8))]))
    damaged = [folder / "step-0000005.png", folder / "demo.png"]
    for file in damaged:
        file.write_bytes(b"")
    run = RunFolder(tmp_path, {}, {}, 5, "raw", [], {})
    table = gather_pictures(Inputs([Group("a", "1", [run])]))
    assert table.columns == ["before (step 0)"]
    assert table.rows == {RowKey("x", 1): {"before (step 0)": ImagePart(folder / "step-0000000.png", (0, 0, 8, 8))}}
    assert len(table.notes) == 2
    for file in damaged:
        assert len([note for note in table.notes if note.startswith(f"{file}: cannot be shown (")]) == 1


def test_a_sheet_cut_short_is_named_once(tmp_path: Path) -> None:
    noise(0, 64).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    found, notes = embed_all([ImagePart(tmp_path / "a.png", (0, 0, i, i)) for i in (8, 16, 24)], 10**6)
    assert found == [None] * 3
    assert len(notes) == 1


def test_pictures_of_two_comparisons_are_side_by_side(tmp_path: Path) -> None:
    """The slider begins within a comparison: the first baseline beside its own arm."""
    noise(1).save(tmp_path / "0.png")
    images = [{"prompt": "x", "seed": 0, "index": 0, "file": "0.png"}]
    groups = []
    for name in ("base", "lpl", "cmp2/base", "cmp2/lpl"):
        one = Group(name, "1", evals=[Result(tmp_path / "eval.json", {"images": images})], baseline="base" in name)
        one.comparison = Path("cmp2" if "cmp2" in name else "cmp")
        groups.append(one)
    groups.insert(0, Group("alone", "1", evals=groups[0].evals))
    gallery = build_gallery(Inputs(groups), 10**6)
    assert gallery.columns == ["alone", "base", "lpl", "cmp2/base", "cmp2/lpl"]
    assert (gallery.left, gallery.right) == (1, 2)


def test_transparent_pictures_stand_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert ImagePart(tmp_path / "a.png").read().getpixel((0, 0)) == (255, 255, 255)


def test_pictures_are_what_is_measured(tmp_path: Path) -> None:
    """16-bit grey is not cut off at 255, floats are 0..1, and a camera's image stands upright."""
    grey = np.array([[0, 256, 32768], [65535, 128, 65280]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray((grey / 65535).astype(np.float32)).save(tmp_path / "float.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6
    colour = noise(3, 16).crop((0, 0, 16, 8))
    colour.save(tmp_path / "turned.png", exif=exif)
    for name in ("grey.png", "float.tiff"):
        found = np.asarray(ImagePart(tmp_path / name).read())
        assert found.shape == (2, 3, 3)
        assert np.abs(found[..., 0] - grey / 257).max() <= 0.51
    assert np.array_equal(ImagePart(tmp_path / "turned.png").read(), np.rot90(np.asarray(colour), -1))


def test_images_are_taken_from_below_what_names_them(tmp_path: Path) -> None:
    """What is gone is said; a page shows nothing from beyond the folder of the eval.json, however it is named."""
    for folder in ("drawn", "above/there", "elsewhere"):
        (tmp_path / folder / "a").mkdir(parents=True)
        noise(1).save(tmp_path / folder / "a" / "0.png")
    (tmp_path / "drawn" / "a" / "out.png").symlink_to(tmp_path / "elsewhere" / "a" / "0.png")
    outside = [str(tmp_path / "elsewhere" / "a" / "0.png"), "../elsewhere/a/0.png", "a/out.png", "x" * 300, "a\0"]
    names = ["a/0.png", "a/1.png", *outside]
    images = [{"prompt": "x", "seed": None, "index": i, "file": name} for i, name in enumerate(names)]
    roots = {"drawn": None, "above": str(tmp_path / "above" / "there"), "elsewhere": str(tmp_path / "elsewhere")}
    files = {name: tmp_path / name / "eval.json" for name in ("drawn", "above")}
    files["elsewhere"] = tmp_path / "drawn" / "eval.json"
    groups = [
        Group(name, "1", evals=[Result(files[name], {"images": images, "image_root": root})])
        for name, root in roots.items()
    ]
    table = gather_pictures(Inputs(groups))
    picture = Path("a") / "0.png"
    assert table.rows == {
        RowKey("x", None, 0): {
            "drawn": ImagePart(tmp_path / "drawn" / picture),
            "above": ImagePart(tmp_path / "above" / "there" / picture),
        },
    }
    assert table.notes == [
        f"{files['drawn']}: 6 of its 7 images are gone from {tmp_path / 'drawn'}",
        f"{files['above']}: 6 of its 7 images are gone from {tmp_path / 'above' / 'there'}",
        f"{files['elsewhere']}: its images are not in its own folder but in {tmp_path / 'elsewhere'}: write eval.json "
        "to a folder above them to see them here",
    ]


def test_sheets_and_checks_do_not_lead_out_of_their_folder(tmp_path: Path) -> None:
    """A link among a run's samples, and a check.json that names a picture elsewhere: noted, not embedded."""
    (tmp_path / "run" / "samples").mkdir(parents=True)
    (tmp_path / "check").mkdir()
    noise(1).save(tmp_path / "secret.png")
    (tmp_path / "run" / "samples" / "step-0000001.png").symlink_to(tmp_path / "secret.png")
    run = RunFolder(tmp_path / "run", {}, {}, None, None, [], {})
    check = Result(tmp_path / "check" / "check.json", {"estimates": {"file": "../secret.png"}})
    gallery = build_gallery(Inputs([Group("run", "1", [run])], checks=[check]), 10**6)
    assert (gallery.rows, gallery.of_checks) == ([], [])
    assert any("step-0000001.png: leads out of" in note for note in gallery.notes)
    assert any("secret.png: the picture is gone" in note for note in gallery.notes)
