"""The pictures of the page, in rows by prompt and seed and in columns by what made them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from lpl.data.bad_image import BadImageError
from lpl.data.decode import decode_image
from lpl.data.picture_cells import Cell, read_cells
from lpl.report.run_folder import RunFolder, inside
from lpl.report.sources import Group, Inputs, Result

SHEETS = "samples"
MOST_ROWS = 16
BEFORE = "before"


class Picture(NamedTuple):
    """One picture: a file, or a part of one."""

    file: Path
    """In the folder of what names it: see inside."""
    box: tuple[int, int, int, int] | None = None
    """None: all of it."""

    def read(self) -> Image.Image:
        """The pixels as lpl eval takes them: upright, sRGB, 8 bits, on white.

        Raises:
            OSError: it is gone.
            BadImageError: it is no picture.
        """
        image = decode_image(self.file.read_bytes())
        return image.crop(self.box) if self.box else image


class Key(NamedTuple):
    """What a row shows."""

    prompt: str
    seed: int | None
    number: int | None = None
    """Number of a sample that shares its seed with others."""


@dataclass
class Pictures:
    """A table of pictures."""

    columns: list[str] = field(default_factory=list)
    """Names, from left to right."""
    rows: dict[Key, dict[str, Picture]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What of them is not shown."""

    def add(self, key: Key, column: str, picture: Picture) -> None:
        """Puts a picture into its place; the first one there stays."""
        if column not in self.columns:
            self.columns.append(column)
        self.rows.setdefault(key, {}).setdefault(column, picture)


def gather_pictures(inputs: Inputs) -> Pictures:
    """The pictures of all runs and evaluations.

    Of a run, the first sheet (before) and the last; of an arm with several seeds, those of its first run. Rows that
    most columns share come first.
    """
    table = Pictures()
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


def _add_run(table: Pictures, group: Group, alone: bool) -> None:
    run = group.runs[0]
    folder = run.path / SHEETS
    sheets = {file for file in folder.glob("*.png") if _is_inside(table, run.path, file)}
    numbers = {file: file.stem[5:] for file in sheets if file.stem.startswith("step-")}
    steps = sorted((int(n), file) for file, n in numbers.items() if n.isascii() and n.isdigit() and len(n) <= 18)
    for file in sorted(sheets - {file for _, file in steps}):
        for cell in _cells(table, file) or []:
            column = cell.kind if alone or cell.kind == "real" else f"{group.name}: {cell.kind}"
            table.add(Key(cell.prompt, cell.seed), column, Picture(file, cell.box))
    if not steps:
        return
    (first, before), (last, after) = steps[0], steps[-1]
    if first == 0 and last > 0 and not any(c.startswith(BEFORE) for c in table.columns):
        _add_sheet(table, run, before, f"{BEFORE} (step 0)")
    elif alone and last > first:
        _add_sheet(table, run, before, f"step {first}")
    _add_sheet(table, run, after, f"after (step {last})" if alone else group.name)


def _is_inside(table: Pictures, folder: Path, file: Path) -> bool:
    """Whether a picture is in the folder of its run; one that a link takes from elsewhere is noted."""
    found = inside(folder, str(file.relative_to(folder))) is not None
    if not found:
        table.notes.append(f"{file}: leads out of {folder} and is not shown")
    return found


def _add_sheet(table: Pictures, run: RunFolder, file: Path, column: str) -> None:
    cells = _cells(table, file)
    if cells is None:
        return
    if not cells:
        table.add(Key("all validation images", None), column, Picture(file))
        return
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    kind = run.final_weights if run.final_weights in kinds else kinds[-1]
    for cell in cells:
        if cell.kind == kind:
            table.add(Key(cell.prompt, cell.seed), column, Picture(file, cell.box))


def _cells(table: Pictures, file: Path) -> list[Cell] | None:
    """A sheet's cells; None where it is damaged, which is noted."""
    try:
        return read_cells(file)
    except BadImageError as error:
        table.notes.append(f"{file}: cannot be shown ({error})")
        return None


def _add_eval(table: Pictures, group: Group, result: Result) -> None:
    """Its images, from beside eval.json where they were drawn, else from where --images was."""
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
            key = Key(str(image.get("prompt") or ""), image.get("seed"), image.get("index"))
            table.add(key, group.name, Picture(file))
        else:
            gone += 1
    if gone:
        table.notes.append(f"{result.file}: {gone} of its {len(images)} images are gone from {root}")
