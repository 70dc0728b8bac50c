"""The pictures of the page, embedded: rows by prompt and seed for the grid, and what the slider begins with."""

from __future__ import annotations

from dataclasses import dataclass, field

from lpl.report.images import Embedded, embed_all
from lpl.report.pictures import BEFORE, Key, Picture, gather_pictures
from lpl.report.run_folder import inside
from lpl.report.sources import Inputs

LONG = 10**7
"""Seeds from here on were drawn, not given."""
SMALL = 160
"""Pictures up to so many pixels wide are shown enlarged, pixel by pixel."""


@dataclass
class Cell:
    """A place in the grid."""

    column: int
    image: Embedded
    alt: str

    @property
    def small(self) -> bool:
        """Whether it is shown pixel by pixel."""
        return self.image.width <= SMALL


@dataclass
class GalleryRow:
    """A prompt and seed."""

    title: str
    cells: list[Cell]


@dataclass
class Gallery:
    """What the section of pictures shows."""

    columns: list[str] = field(default_factory=list)
    rows: list[GalleryRow] = field(default_factory=list)
    left: int = 0
    """Column that the slider's left half shows at first."""
    right: int = 0
    slides: bool = False
    """Whether any row has two pictures to slide between."""
    of_checks: list[tuple[str, Embedded]] = field(default_factory=list)
    """What lpl check drew, with captions."""
    notes: list[str] = field(default_factory=list)


def build_gallery(inputs: Inputs, budget: int) -> Gallery:
    """Gathers and embeds the pictures.

    Args:
        inputs: of the page.
        budget: bytes for all of them.
    """
    table = gather_pictures(inputs)
    places = [(key, column) for key, row in table.rows.items() for column in row]
    pictures = [table.rows[key][column] for key, column in places]
    drawn, missing = _check_pictures(inputs)
    embedded, notes = embed_all([*pictures, *(picture for _, picture in drawn)], budget)
    found = dict(zip(places, embedded, strict=False))
    gallery = Gallery(list(table.columns), notes=[*table.notes, *missing, *notes])
    for key, row in table.rows.items():
        title = _title(key, list(table.rows))
        cells = [
            Cell(i, image, f"{title}: {column}")
            for i, column in enumerate(table.columns)
            if column in row and (image := found[key, column]) is not None
        ]
        if cells:
            gallery.rows.append(GalleryRow(title, cells))
    for (caption, _), image in zip(drawn, embedded[len(places) :], strict=True):
        if image is not None:
            gallery.of_checks.append((caption, image))
    gallery.slides = any(len(row.cells) > 1 for row in gallery.rows)
    gallery.left, gallery.right = _ends(gallery, inputs)
    return gallery


def _title(key: Key, keys: list[Key]) -> str:
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


def _check_pictures(inputs: Inputs) -> tuple[list[tuple[str, Picture]], list[str]]:
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
                    here.append((caption, Picture(file)))
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
