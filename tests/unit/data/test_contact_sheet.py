"""The pictures of `lpl data`: cells hold the very pixels of the crops, and nothing overlaps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from lpl.base.errors import UserError
from lpl.config import DataConfig, RunConfig, TrainConfig
from lpl.data.contact_sheet import (
    CELL,
    COLUMNS,
    EDGE,
    GAP,
    GROUND,
    MARGIN,
    MAT,
    RED,
    Cell,
    compose,
    crop_sheet,
    draw_sheet,
    fit,
)
from lpl.data.crops import render
from lpl.data.report_numbers import most_cropped
from lpl.data.sheets import font_for, fonts, printable, shorten, wrap
from lpl.data.sources import open_source
from lpl.data.survey import Survey, first_draws, read_through

Picture = Callable[[int, int, int], Image.Image]


@pytest.fixture
def survey(tmp_path: Path, picture: Picture) -> Callable[..., Survey]:
    """Reads three images of 300 x 200 and more; keywords are options of the data."""
    for number, (width, height) in enumerate([(300, 200), (200, 420), (230, 230)]):
        picture(number, width, height).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")

    def run(**options: Any) -> Survey:
        data = DataConfig(**{"train_data_dir": str(tmp_path), "resolution": 200} | options)
        config = TrainConfig(data=data, run=RunConfig(train_batch_size=3))
        return read_through(config, open_source(data, None), None, tmp_path / "bad_files.jsonl")

    return run


def cells_of(sheet: Image.Image) -> list[tuple[int, int]]:
    """Upper left corners of the cells of a sheet, found by their frames of EDGE around a mat."""
    pixels = np.asarray(sheet)
    corner = np.full((CELL + 2, CELL + 2), True)
    corner[1:-1, 1:-1] = False
    framed = (pixels == EDGE).all(-1)
    found = []
    for y, x in zip(*np.nonzero(framed), strict=True):
        window = framed[y : y + CELL + 2, x : x + CELL + 2]
        if window.shape == corner.shape and window[corner].all():
            found.append((int(y) + 1, int(x) + 1))
    return found


def picture_in(sheet: Image.Image, cell: tuple[int, int], width: int, height: int) -> np.ndarray:
    y, x = cell[0] + (CELL - height) // 2, cell[1] + (CELL - width) // 2
    return np.asarray(sheet)[y : y + height, x : x + width]


def test_cells_hold_the_pixels_that_are_encoded(survey: Any, tmp_path: Path) -> None:
    found = survey(random_flip=True, crop_variants=2)
    draws = first_draws(found, 9)
    assert {draw.crop.flip for draw in draws} == {True, False}
    assert len({(draw.index, draw.crop) for draw in draws}) > 4  # of an image, several crops
    sheet = draw_sheet(found, draws)
    cells = cells_of(sheet)
    assert len(cells) == 9
    for cell, draw in zip(cells, draws, strict=True):
        with Image.open(tmp_path / draw.row.id) as image:
            expected = render(image, draw.crop, "lanczos").permute(1, 2, 0).numpy()
        assert np.array_equal(picture_in(sheet, cell, 200, 200), expected)


def test_what_a_mask_leaves_out_is_blue(survey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[tuple[str, list[Cell]]] = []
    monkeypatch.setattr("lpl.data.contact_sheet.compose", lambda _, about, cells: composed.append((about, list(cells))))
    mask = Image.new("L", (230, 230), 0)
    mask.paste(255, (0, 0, 115, 230))
    mask.save(tmp_path / "2-masklabel.png")
    gone = Image.new("L", (200, 420), 0)
    gone.paste(255, (0, 0, 200, 50))
    gone.save(tmp_path / "1-masklabel.png")
    found = survey(random_flip=True, center_crop=True, masked_loss="files", unmasked_weight=0.1)
    draws = first_draws(found, 12)
    draw_sheet(found, draws)
    ((about, cells),) = composed
    assert about.endswith("Blue is what the mask leaves out: its weight in the loss is 0.1.")
    assert {draw.crop.flip for draw in draws if draw.row.id == "2.png"} == {True, False}
    for cell, draw in zip(cells, draws, strict=True):
        texts = [text for text, _ in cell.lines]
        shown = np.asarray(cell.picture).astype(float)
        with Image.open(tmp_path / draw.row.id) as image:
            pixels = render(image, draw.crop, "lanczos").permute(1, 2, 0).numpy()
        blue = 0.55 * np.asarray(Image.fromarray(pixels).convert("L"))[..., None] + 0.45 * np.array((0, 70, 160))
        if draw.row.id == "0.png":
            assert np.array_equal(shown, pixels)
            assert not any(text.startswith("mask") for text in texts)
        elif draw.row.id == "1.png":
            assert ("mask: nothing in this crop", RED) in cell.lines
            assert np.abs(shown - blue).max() <= 1.5
        else:
            assert "mask: 50% counts" in texts
            marked, rest = (slice(102, None), slice(98)) if draw.crop.flip else (slice(98), slice(102, None))
            assert np.array_equal(shown[:, marked], pixels[:, marked])
            assert np.abs(shown[:, rest] - blue[:, rest]).max() <= 1.5


def test_crops_of_a_bucket_keep_their_shape(survey: Any, tmp_path: Path) -> None:
    found = survey(resolution=192, buckets=True, center_crop=True)
    draws = first_draws(found, 3)
    sheet = draw_sheet(found, draws)
    for cell, draw in zip(cells_of(sheet), draws, strict=True):
        height, width = draw.crop.target_size
        with Image.open(tmp_path / draw.row.id) as image:
            expected = render(image, draw.crop, "lanczos").permute(1, 2, 0).numpy()
        assert np.array_equal(picture_in(sheet, cell, width, height), expected)
        if width < CELL:
            assert tuple(np.asarray(sheet)[cell[0] + CELL // 2, cell[1] + 2]) == MAT


def test_marks_and_conditioning_stand_below_the_cell(
    survey: Any, picture: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[list[Cell]] = []
    monkeypatch.setattr(
        "lpl.data.contact_sheet.compose", lambda title, about, cells: composed.append(list(cells)) or title
    )
    (tmp_path / "2.txt").write_text("")
    picture(3, 80, 100).save(tmp_path / "sub.png")
    (tmp_path / "sub.txt").write_text("small")
    found = survey(random_flip=True, caption_prefix="")
    draws = first_draws(found, 12)
    assert draw_sheet(found, draws) == "What the model will see: the first 12 draws"
    for cell, draw in zip(composed[0], draws, strict=True):
        texts = [text for text, _ in cell.lines]
        assert texts[:2] == [f"step {draw.step}, 200 x 200", draw.row.id]
        assert ("mirrored" in texts) == draw.crop.flip
        assert ("scaled up 2.50 x" in texts) == (draw.row.id == "sub.png")
        assert (draw.caption or "(empty)") in texts
        (height, width), (y, x) = draw.crop.original_size, draw.crop.top_left
        assert texts[-4:] == [
            "", f"original_size ({height}, {width})", f"crop_top_left ({y}, {x})", "target_size (200, 200)",
        ]  # fmt: skip


def test_crops_are_outlined_in_the_whole_image(survey: Any, tmp_path: Path) -> None:
    found = survey(center_crop=True, train_data_dir=str(tmp_path))
    assert most_cropped(found, 6) == [1, 0]  # 200 x 420 loses more than 300 x 200; 230 x 230 loses nothing
    assert most_cropped(found, 1) == [1]
    sheet = crop_sheet(found, [0])
    (cell,) = cells_of(sheet)
    with Image.open(tmp_path / "0.png") as image:
        whole = np.asarray(fit(image.copy()))
    assert whole.shape == (171, 256, 3)
    shown = picture_in(sheet, cell, 256, 171)
    left, right = int(50 * 256 / 300), int(np.ceil(250 * 256 / 300)) - 1  # the middle 200 of 300 columns
    assert (shown[:, [left, left + 1, right - 1, right]] == RED).all()
    assert (shown[[0, 1, -2, -1], left : right + 1] == RED).all()
    assert np.array_equal(shown[2:-2, left + 2 : right - 1], whole[2:-2, left + 2 : right - 1])
    veil = np.array(GROUND)
    for columns in (slice(0, left), slice(right + 1, None)):
        assert np.abs(shown[:, columns] - (0.4 * whole[:, columns] + 0.6 * veil)).max() <= 1


def test_text_never_covers_a_picture() -> None:
    colors = [(200, 10 * n, 255 - 10 * n) for n in range(COLUMNS + 2)]
    lines = [[(f"line {k}" * 9, RED) for k in range(n + 1)] for n in range(len(colors))]
    cells = [Cell(Image.new("RGB", (CELL, CELL), color), own) for color, own in zip(colors, lines, strict=True)]
    sheet = compose("title", "about " * 200, cells)
    pixels = np.asarray(sheet)
    corners = cells_of(sheet)
    assert len(corners) == len(colors)
    for (y, x), color in zip(corners, colors, strict=True):
        assert (pixels[y : y + CELL, x : x + CELL] == color).all()
    assert [x for _, x in corners[:COLUMNS]] == [MARGIN + n * (CELL + GAP) for n in range(COLUMNS)]
    # Between the text of the first row, which its last cell has most of, and the second row there is a gap.
    y = corners[COLUMNS][0]
    assert (pixels[y - GAP // 2 : y - 1] == GROUND).all()
    assert sheet.width == 2 * MARGIN + COLUMNS * CELL + (COLUMNS - 1) * GAP


@pytest.mark.parametrize(
    ("size", "shown"),
    [((1024, 512), (256, 128)), ((64, 60), (256, 240)), ((129, 200), (129, 200)), ((5000, 2), (256, 1))],
)
def test_sizes_in_a_cell(size: tuple[int, int], shown: tuple[int, int], picture: Picture) -> None:
    image = picture(0, *size)
    fitted = fit(image)
    assert fitted.size == shown
    if shown > size:
        assert np.array_equal(np.asarray(fitted)[::4, ::4], np.asarray(image))


def test_lines_fit_and_say_it_all() -> None:
    text = "an old castle, " + "x" * 90 + ", by the sea"
    lines = wrap(text, 120, 13, 99)
    font = font_for(text, 13)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap("one two", 500, 13, 9) == ["one two"]
    cut = wrap("word " * 100, 120, 13, 3)
    assert len(cut) == 3
    assert cut[-1].endswith("...")
    assert font.getlength(cut[-1]) <= 120
    assert wrap("", 120, 13, 3) == [""]


def test_long_names_keep_both_ends() -> None:
    short = shorten("a/very/long/path/to/some/image_0001.png", 200, 13)
    assert short.startswith("a/")
    assert short.endswith("image_0001.png")
    assert "..." in short
    assert font_for(short, 13).getlength(short) <= 200
    assert shorten("short.png", 150, 13) == "short.png"
    assert shorten("x" * 500, 2, 13) == "..."


def test_texts_of_any_length_are_cut_in_time() -> None:
    """A word of 200,000 letters: what is not shown is not measured."""
    started = time.monotonic()
    for text in ("w" * 200_000, "w" * 50 + " " + "w" * 200_000, "\u0301" * 20_000, "w " * 100_000):
        lines = wrap(text, 256, 13, 12)
        assert len(lines) <= 12
        assert shorten(text, 256, 13).count("...") == 1
    assert wrap("w" * 200_000, 256, 13, 12)[-1].endswith("...")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "text",
    ["日本語のキャプション " * 20, "مرحبا بالعالم", "🐈‍⬛ cat", "\x00\x1b[31m\n\r\t\u2028a", "\udcff\ud800", "ů" * 300],
)
def test_any_text_can_be_written(text: str) -> None:
    lines = wrap(text, 200, 13, 5)
    assert 1 <= len(lines) <= 5
    sheet = compose(shorten(text, 200, 13), text, [Cell(Image.new("RGB", (9, 9)), [(line, RED) for line in lines])])
    assert (np.asarray(sheet) == GROUND).all(-1).any()


def test_what_is_no_letter_becomes_a_space() -> None:
    assert printable("a\x00\n\tb \udcff c") == "a b c"


def test_a_font_with_the_letters_is_preferred() -> None:
    assert font_for("plain", 13) is fonts(13)[0]
    others = [font.getname()[0] for font in fonts(13)]
    if "DejaVu Sans" in others:
        assert font_for("Кошка", 13).getname()[0] == "DejaVu Sans"


def test_a_pillow_that_cannot_write_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda _: False)
    fonts.cache_clear()
    with pytest.raises(UserError, match="without FreeType"):
        fonts(13)
    monkeypatch.undo()
    fonts.cache_clear()
