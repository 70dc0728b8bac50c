"""The pictures of the page: found, put in rows by prompt and seed, and embedded within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lpl.config.run_folder import SAMPLES
from lpl.data.bad_files import BadImageError
from lpl.data.decode import decode_image
from lpl.data.sheets import Cell, read_cells
from lpl.report.runs import RunFolder, inside
from lpl.report.sources import Group, Inputs, Result

TRIES = ((1024, 88), (768, 86), (640, 84), (512, 82), (384, 80), (256, 78), (160, 70))
"""(longest side in pixels, WebP quality), tried until all fit."""
LOSSLESS_BELOW = 128 * 128 + 1
"""Pixels; small pictures are kept exactly."""
SHEET = 2
"""A whole sheet's side may be so many times as long as a single picture's."""


MOST_ROWS = 16
BEFORE = "before"
LONG = 10**7
"""Larger seeds were drawn, not given."""
SMALL = 160
"""Pictures up to so many pixels wide are shown enlarged, pixel by pixel."""


class Embedded(NamedTuple):
    """A picture within the page."""

    uri: str
    width: int
    height: int
    """In pixels, as embedded."""
    original: tuple[int, int]
    """Its size in the file."""


class ImagePart(NamedTuple):
    """One picture: a file, or a part of one."""

    file: Path
    """Checked to lie in the folder of the file that names it: see inside."""
    box: tuple[int, int, int, int] | None = None
    """None: all of it."""

    def read(self) -> Image.Image:
        """The pixels as lpl eval reads them: upright, sRGB, 8 bits, on white.

        Raises:
            OSError: it is gone.
            BadImageError: it is no picture.
        """
        image = decode_image(self.file.read_bytes())
        return image.crop(self.box) if self.box else image


def embed_all(pictures: Sequence[ImagePart], budget: int) -> tuple[list[Embedded | None], list[str]]:
    """Encodes all pictures at the largest size at which they fit the budget.

    Args:
        pictures: to encode.
        budget: bytes of all data URIs together.

    Returns:
        Each picture (None: it cannot be read), and lines on what was left out or made smaller.
    """
    read: list[Image.Image | None] = []
    notes = []
    for picture in pictures:
        try:
            read.append(picture.read())
        except (OSError, BadImageError) as error:
            read.append(None)
            if (note := f"{picture.file}: cannot be shown ({error})") not in notes:
                notes.append(note)
    for side, quality in TRIES:
        found: list[Embedded | None] = []
        left = budget
        for picture, image in zip(pictures, read, strict=True):
            whole = SHEET if picture.box is None else 1
            found.append(None if image is None else encode(image, side * whole, quality))
            left -= len(found[-1].uri) if found[-1] else 0
            if left < 0:
                break
        if left >= 0:
            smaller = sum(e is not None and (e.width, e.height) != e.original for e in found)
            if smaller:
                notes.append(f"{smaller} pictures are shown smaller than they are, at most {side} pixels a side")
            return found, notes
    notes.append(f"{len(pictures)} pictures are left out: they do not fit the page's size (--max_megabytes)")
    return [None] * len(pictures), notes


def encode(picture: Image.Image, side: int, quality: int) -> Embedded:
    """One picture as WebP, at most side pixels wide and high; small ones without loss."""
    original = picture.size
    if max(original) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    if picture.width * picture.height < LOSSLESS_BELOW:
        picture.save(content, "WEBP", lossless=True)
    else:
        picture.save(content, "WEBP", quality=quality, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    return Embedded(uri, picture.width, picture.height, original)


class RowKey(NamedTuple):
    """What a row shows."""

    prompt: str
    seed: int | None
    number: int | None = None
    """Number of a sample that shares its seed with others."""


@dataclass
class PictureTable:
    """A table of pictures."""

    columns: list[str] = field(default_factory=list)
    """Names, from left to right."""
    rows: dict[RowKey, dict[str, ImagePart]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Lines on pictures that are not shown."""

    def add(self, key: RowKey, column: str, picture: ImagePart) -> None:
        """Adds a picture, unless its place has one already."""
        if column not in self.columns:
            self.columns.append(column)
        self.rows.setdefault(key, {}).setdefault(column, picture)


def gather_pictures(inputs: Inputs) -> PictureTable:
    """The pictures of all runs and evaluations.

    From a run, the first sheet (before) and the last; from an arm with several seeds, those of its first run. Rows that
    most columns share come first.
    """
    table = PictureTable()
    places = {group.comparison or group.name: place for place, group in reversed([*enumerate(inputs.groups)])}
    groups = sorted(inputs.groups, key=lambda g: (places[g.comparison or g.name], not g.baseline))
    alone = sum(not group.further for group in groups) == 1
    for group in groups:
        if group.runs:
            _add_run(table, group, alone)
        for result in group.evals[:1]:
            _add_eval(table, group, result)
    several = [group.name for group in groups if len(group.runs) > 1]
    if several and table.rows:
        table.notes.append(f"pictures of {', '.join(several)} are those of their first seeds")
    first = [name for name in table.columns if name == "real" or name.startswith(BEFORE)]
    table.columns = first + [name for name in table.columns if name not in first]
    order = sorted(table.rows, key=lambda key: -len(table.rows[key]))
    if len(order) > MOST_ROWS:
        table.notes.append(
            f"{len(order) - MOST_ROWS} of {len(order)} prompts and seeds are not shown, for the page's size"
        )
    table.rows = {key: table.rows[key] for key in order[:MOST_ROWS]}
    shown = {column for row in table.rows.values() for column in row}
    table.columns = [column for column in table.columns if column in shown]
    return table


def _add_run(table: PictureTable, group: Group, alone: bool) -> None:
    run = group.runs[0]
    sheets = set()
    for file in (run.path / SAMPLES).glob("*.png"):
        if inside(run.path, f"{SAMPLES}/{file.name}") is None:
            table.notes.append(f"{file}: leads out of {run.path} and is not shown")
        else:
            sheets.add(file)
    numbers = {file: file.stem[5:] for file in sheets if file.stem.startswith("step-")}
    steps = sorted((int(n), file) for file, n in numbers.items() if n.isascii() and n.isdigit() and len(n) <= 18)
    for file in sorted(sheets - {file for _, file in steps}):
        for cell in _cells(table, file) or []:
            column = cell.kind if alone or cell.kind == "real" else f"{group.name}: {cell.kind}"
            table.add(RowKey(cell.prompt, cell.seed), column, ImagePart(file, cell.box))
    if not steps:
        return
    (first, before), (last, after) = steps[0], steps[-1]
    if first == 0 and last > 0 and not any(c.startswith(BEFORE) for c in table.columns):
        _add_sheet(table, run, before, f"{BEFORE} (step 0)")
    elif alone and last > first:
        _add_sheet(table, run, before, f"step {first}")
    _add_sheet(table, run, after, f"after (step {last})" if alone else group.name)


def _add_sheet(table: PictureTable, run: RunFolder, file: Path, column: str) -> None:
    cells = _cells(table, file)
    if cells is None:
        return
    if not cells:
        table.add(RowKey("all validation images", None), column, ImagePart(file))
        return
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    kind = run.final_weights if run.final_weights in kinds else kinds[-1]
    for cell in cells:
        if cell.kind == kind:
            table.add(RowKey(cell.prompt, cell.seed), column, ImagePart(file, cell.box))


def _cells(table: PictureTable, file: Path) -> list[Cell] | None:
    """A sheet's cells; None where it is damaged, which is noted."""
    try:
        return read_cells(file)
    except BadImageError as error:
        table.notes.append(f"{file}: cannot be shown ({error})")
        return None


def _add_eval(table: PictureTable, group: Group, result: Result) -> None:
    """Adds an evaluation's images: next to eval.json if it drew them, else from the folder given by --images."""
    images, home = result.content.get("images") or [], result.file.parent
    root, gone = Path(result.content.get("image_root") or home), 0
    if result.content.get("points"):
        table.notes.append(f"{result.file}: of its points, pictures of the best guidance at the most steps are shown")
    if inside(home, str(root.absolute())) is None and root.exists():
        told = "write eval.json to a folder above them to see them here"
        table.notes.append(f"{result.file}: its images are not in its own folder but in {root}: {told}")
        return
    for image in images:
        file = inside(root, str(image["file"]))
        if file is not None and file.is_file():
            key = RowKey(str(image.get("prompt") or ""), image.get("seed"), image.get("index"))
            table.add(key, group.name, ImagePart(file))
        else:
            gone += 1
    if gone:
        table.notes.append(f"{result.file}: {gone} of its {len(images)} images are gone from {root}")


class GalleryCell(NamedTuple):
    """A picture's place in the grid."""

    column: int
    image: Embedded
    alt: str

    @property
    def small(self) -> bool:
        """Whether it is shown pixel by pixel."""
        return self.image.width <= SMALL


class GalleryRow(NamedTuple):
    """A prompt and seed."""

    title: str
    cells: list[GalleryCell]


@dataclass
class Gallery:
    """What the section of pictures shows."""

    columns: list[str] = field(default_factory=list)
    rows: list[GalleryRow] = field(default_factory=list)
    left: int = 0
    """Column that the slider's left half shows initially."""
    right: int = 0
    slides: bool = False
    """Whether any row has two pictures to slide between."""
    of_checks: list[tuple[str, Embedded]] = field(default_factory=list)
    """Pictures of lpl check, with captions."""
    notes: list[str] = field(default_factory=list)
    """Lines on what is not shown."""


def build_gallery(inputs: Inputs, budget: int) -> Gallery:
    """Gathers the pictures and embeds them within a budget of bytes for all of them."""
    table = gather_pictures(inputs)
    places = [(key, column) for key, row in table.rows.items() for column in row]
    pictures = [table.rows[key][column] for key, column in places]
    drawn, missing = check_pictures(inputs)
    embedded, notes = embed_all([*pictures, *(picture for _, picture in drawn)], budget)
    found = dict(zip(places, embedded, strict=False))
    gallery = Gallery(list(table.columns), notes=[*table.notes, *missing, *notes])
    for key, row in table.rows.items():
        title = _title(key, list(table.rows))
        cells = [
            GalleryCell(i, image, f"{title}: {column}")
            for i, column in enumerate(table.columns)
            if column in row and (image := found[key, column]) is not None
        ]
        if cells:
            gallery.rows.append(GalleryRow(title, cells))
    shown = zip(drawn, embedded[len(places) :], strict=True)
    gallery.of_checks = [(caption, image) for (caption, _), image in shown if image is not None]
    gallery.slides = any(len(row.cells) > 1 for row in gallery.rows)
    gallery.left, gallery.right = _ends(gallery, inputs)
    return gallery


def _title(key: RowKey, keys: list[RowKey]) -> str:
    """The prompt, with the seed; a drawn seed is too long to read, so such images are numbered."""
    name = key.prompt or "(empty prompt)"
    if key.number is not None:
        return f"{name} · sample {key.number}" + ("" if key.seed is None else f", seed {key.seed}")
    if key.seed is None:
        return name
    if key.seed < LONG:
        return f"{name} · seed {key.seed}"
    number = [other for other in keys if other.prompt == key.prompt].index(key) + 1
    return f"{name} · image {number}"


def check_pictures(inputs: Inputs) -> tuple[list[tuple[str, ImagePart]], list[str]]:
    """Captions and pictures that the checks name, and lines on those that are gone."""
    here, lost = [], []
    for check in inputs.checks:
        content, folder = check.content, check.file.parent
        named = [
            ("What the VAE loses: real images, and decoded again", content.get("reconstruction") or {}),
            ("The model's estimates, by noise level", content.get("estimates") or {}),
            *((f"{drawn['tap']}, timestep {drawn['t']}", drawn) for drawn in content.get("maps") or []),
        ]
        for caption, drawn in named:
            if name := drawn.get("file"):
                file = inside(folder, name)
                if file is not None and file.is_file():
                    here.append((caption, ImagePart(file)))
                else:
                    lost.append(f"{folder / name}: the picture is gone")
    return here, lost


def _ends(gallery: Gallery, inputs: Inputs) -> tuple[int, int]:
    """The baseline against the next arm of its comparison; for a run alone, before against after."""
    for baseline in (group for group in inputs.groups if group.baseline and group.name in gallery.columns):
        arms = [g.name for g in inputs.groups if g.comparison == baseline.comparison and g is not baseline]
        shown = [i for i, name in enumerate(gallery.columns) if name in arms]
        if shown:
            return gallery.columns.index(baseline.name), shown[0]
    others = [i for i, name in enumerate(gallery.columns) if name != "real"]
    after = [i for i in others if not gallery.columns[i].startswith(BEFORE)]
    before = [i for i in others if i not in after]
    if before and after:
        return before[0], after[0]
    return (others[0], others[-1]) if others else (0, 0)
