"""Pictures of what a run draws: crops with their captions, and what cropping leaves out of whole images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from lpl.data.crops import Crop, render
from lpl.data.prepare import REGULARISATION
from lpl.data.sheets import Color, shorten, wrap, write
from lpl.data.survey import Draw, Survey, look_again

CELL = 256
"""Side of the square that a picture is put into, in pixels."""
GAP, MARGIN, SPACE = 24, 28, 8
COLUMNS = 6
LETTERS, TITLE_LETTERS = 13, 20
LINE, TITLE_LINE = 17, 30
CAPTION_LINES = 12

GROUND, MAT, EDGE = (252, 252, 250), (232, 232, 228), (200, 200, 196)
INK, GREY = (24, 24, 24), (100, 100, 100)
BLUE, RED = (0, 70, 160), (176, 32, 16)

Line = tuple[str, Color]


class Cell(NamedTuple):
    """A picture of at most CELL x CELL, and the lines below it; an empty line is a small space."""

    picture: Image.Image
    lines: list[Line]


def draw_sheet(survey: Survey, draws: Sequence[Draw]) -> Image.Image:
    """The crops of some draws with captions and size conditioning.

    Raises:
        UserError: an image that is no longer what it was when the survey was made.
    """
    jobs = {draw.index: _renders(survey, [d for d in draws if d.index == draw.index]) for draw in draws}
    pictures = look_again(survey, jobs)
    cells = []
    for draw in draws:
        picture, counted = pictures[draw.index][draw.crop]
        lines = _draw_lines(survey, draw)
        if counted is not None:
            lines.insert(2, (f"mask: {counted:.0%} counts", BLUE) if counted else ("mask: nothing in this crop", RED))
        cells.append(Cell(picture, lines))
    per_step = "one draw a step" if survey.batch_size == 1 else f"{survey.batch_size} draws a step"
    about = (
        f"{_sources(survey)}; seed {survey.config.run.seed}, {per_step}. "
        "Sizes are width x height in pixels. Below each caption is the size conditioning that the model gets: "
        "(height, width), and (top, left) of the crop in the resized image."
    )
    if any(counted is not None for shown in pictures.values() for _, counted in shown.values()):
        weight = survey.config.data.unmasked_weight
        about += f" Blue is what the mask leaves out: its weight in the loss is {weight:g}."
    return compose(f"What the model will see: the first {len(draws)} draws", about, cells)


def crop_sheet(survey: Survey, indices: Sequence[int]) -> Image.Image:
    """Whole images, veiled where no cached crop lies, each crop outlined.

    Raises:
        UserError: as draw_sheet.
    """
    pictures = look_again(survey, {index: _outlines(survey, index) for index in indices})
    cells = [Cell(pictures[index], _crop_lines(survey, index)) for index in indices]
    variants = survey.config.data.crop_variants
    which = "the crop" if variants == 1 else f"each of the {variants} crops that draws choose from"
    about = f"{_sources(survey)}. Outlined: {which}."
    return compose("What cropping leaves out, where it is most", about, cells)


def compose(title: str, about: str, cells: Sequence[Cell], columns: int | None = None) -> Image.Image:
    """Cells in rows below a title, from left to right; `columns` in a row, or as many as fit."""
    columns = columns or max(3, min(COLUMNS, len(cells)))
    width = 2 * MARGIN + columns * CELL + (columns - 1) * GAP
    about_lines = wrap(about, width - 2 * MARGIN, LETTERS, 4)
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [CELL + SPACE + max(sum(map(_height, cell.lines)) for cell in row) + GAP for row in rows]
    top = MARGIN + TITLE_LINE + LINE * len(about_lines) + GAP
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN - GAP), GROUND)
    pen = ImageDraw.Draw(sheet)
    write(pen, (MARGIN, MARGIN), title, INK, TITLE_LETTERS)
    for number, line in enumerate(about_lines):
        write(pen, (MARGIN, MARGIN + TITLE_LINE + number * LINE), line, GREY, LETTERS)
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = MARGIN + column * (CELL + GAP)
            pen.rectangle((left - 1, top - 1, left + CELL, top + CELL), MAT, EDGE)
            sheet.paste(
                cell.picture, (left + (CELL - cell.picture.width) // 2, top + (CELL - cell.picture.height) // 2)
            )
            below = top + CELL + SPACE
            for text, color in cell.lines:
                write(pen, (left, below), text, color, LETTERS)
                below += _height((text, color))
        top += height
    return sheet


def fit(image: Image.Image) -> Image.Image:
    """Scales a picture down to a cell; a small one is magnified by a whole number, each pixel a square."""
    width, height = image.size
    longest = max(width, height)
    if longest > CELL:
        size = max(1, round(width * CELL / longest)), max(1, round(height * CELL / longest))
        return image.resize(size, Image.Resampling.LANCZOS)
    times = CELL // longest
    return image.resize((width * times, height * times), Image.Resampling.NEAREST)


Shown = dict[Crop, tuple[Image.Image, float | None]]
"""For each crop its picture, and the share of it that counts; None: there is no mask."""


def _renders(survey: Survey, draws: Sequence[Draw]) -> Callable[[Image.Image, Image.Image | None], Shown]:
    """A function that makes the crops, ready for cells, from an image and its mask."""
    interpolation = survey.config.data.image_interpolation_mode

    def make(image: Image.Image, mask: Image.Image | None) -> Shown:
        shown: Shown = {}
        for crop in {draw.crop for draw in draws}:
            picture = fit(Image.fromarray(render(image, crop, interpolation).permute(1, 2, 0).numpy()))
            counted = None
            if mask is not None:
                picture, counted = _veil(picture, render(mask, crop, "bilinear")[0].numpy())
            shown[crop] = picture, counted
        return shown

    return make


def _veil(picture: Image.Image, mask: np.ndarray) -> tuple[Image.Image, float]:
    """Turns blue what a mask (H, W), 0..255, leaves out; also gives the share that it marks."""
    out = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, BLUE), 0.45)
    out.paste(picture, mask=Image.fromarray(mask).resize(picture.size, Image.Resampling.BILINEAR))
    return out, float(mask.mean() / 255)


def _draw_lines(survey: Survey, draw: Draw) -> list[Line]:
    crop = draw.crop
    height, width = crop.target_size
    lines = [(f"step {draw.step:,}, {width} x {height}", GREY), (_name(survey, draw.index), GREY)]
    if crop.flip:
        lines.append(("mirrored", BLUE))
    if crop.upscaled:
        lines.append((f"scaled up {crop.scale:.2f} x", RED))
    caption = [(line, INK) for line in wrap(draw.caption, CELL, LETTERS, CAPTION_LINES)]
    lines += caption if draw.caption.strip() else [("(empty)", RED)]
    return [
        *lines,
        ("", INK),
        (f"original_size {crop.original_size}", GREY),
        (f"crop_top_left {crop.top_left}", GREY),
        (f"target_size {crop.target_size}", GREY),
    ]


def _outlines(survey: Survey, index: int) -> Callable[[Image.Image, Image.Image | None], Image.Image]:
    row, views = survey.samples[index], survey.views
    variants = range(survey.config.data.crop_variants)
    crops = [views.crop(row.id, row.width, row.height, variant, False) for variant in variants]

    def make(image: Image.Image, _mask: Image.Image | None) -> Image.Image:
        whole = fit(image)
        boxes = []
        for crop in crops:
            (y, x), (height, width) = crop.top_left, crop.target_size
            down, across = whole.height / crop.resized_size[0], whole.width / crop.resized_size[1]
            right, bottom = math.ceil((x + width) * across) - 1, math.ceil((y + height) * down) - 1
            boxes.append((int(x * across), int(y * down), min(right, whole.width - 1), min(bottom, whole.height - 1)))
        veiled = Image.blend(whole, Image.new("RGB", whole.size, GROUND), 0.6)
        for box in boxes:
            inner = (box[0], box[1], box[2] + 1, box[3] + 1)
            veiled.paste(whole.crop(inner), inner[:2])
        pen = ImageDraw.Draw(veiled)
        for box in boxes:
            pen.rectangle(box, outline=RED, width=2)
        return veiled

    return make


def _crop_lines(survey: Survey, index: int) -> list[Line]:
    row = survey.samples[index]
    crop = survey.views.crop(row.id, row.width, row.height, 0, False)
    height, width = crop.target_size
    return [
        (f"{crop.cropped_away:.0%} cropped away", INK),
        (_name(survey, index), GREY),
        (f"{row.width} x {row.height}, cropped to {width} x {height}", GREY),
    ]


def _sources(survey: Survey) -> str:
    return " and ".join(part.source.name for part in survey.parts)


def _name(survey: Survey, index: int) -> str:
    """The id of an image in a folder, which is its path there; for any other, its name in messages."""
    row = survey.samples[index]
    is_path = row.name.endswith("/" + row.id.removeprefix(REGULARISATION))
    return shorten(row.id if is_path else row.name, CELL, LETTERS)


def _height(line: Line) -> int:
    return LINE if line[0] else SPACE
