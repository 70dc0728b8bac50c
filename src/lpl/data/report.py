"""`lpl data`: reads the images of a run through and leaves a report of them, as text, numbers and pictures."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

from PIL import Image

from lpl.base.json_files import object_in
from lpl.base.locks import alone_in
from lpl.base.output_folder import Names, OutputFolder
from lpl.config import TrainConfig
from lpl.data.bad_files import FILE as BAD_FILES
from lpl.data.bad_files import is_list
from lpl.data.contact_sheet import crop_sheet, draw_sheet
from lpl.data.files import write_atomically
from lpl.data.report_numbers import draw_numbers, most_cropped, numbers
from lpl.data.report_text import text
from lpl.data.sources import Source
from lpl.data.survey import first_draws, read_through
from lpl.errors import UserError

NUMBERS, DRAWS, CROPPED = "data.json", "draws.png", "cropped.png"
CROPPED_SHOWN = 6


def make_report(
    config: TrainConfig, source: Source, regularisation: Source | None, folder: Path, num_shown: int
) -> tuple[str, UserError | None]:
    """Reads every image once and writes data.json, draws.png, cropped.png and bad_files.jsonl.

    Files of an earlier report are replaced, or removed where there is nothing to say or show.

    Args:
        config: the options, with a resolution.
        source: images and captions.
        regularisation: of --reg_data_dir; None: none.
        folder: where to.
        num_shown: draws on the contact sheet; 0: no pictures.

    Returns:
        The report as text, and why a run on these data would not start, if it would not.

    Raises:
        UserError: a folder that cannot be written, a source that cannot be read, options that do not go with it.
    """
    output = OutputFolder(folder.parent, "lpl data", folder.name)
    names = Names({**dict.fromkeys((NUMBERS, DRAWS, CROPPED)), BAD_FILES: is_list})
    is_old = lambda _: _is_report(folder / NUMBERS)  # noqa: E731
    output.check(names, is_old)
    with alone_in(folder):
        output.check(names, is_old)
        output.claim(names, is_old)
        return _write_report(config, source, regularisation, folder, num_shown)


def _is_report(path: Path) -> bool:
    """Whether a file is a data.json."""
    return {"resolution", "bad_files", "parts", "warnings"} <= object_in(path).keys()


def _write_report(
    config: TrainConfig, source: Source, regularisation: Source | None, folder: Path, num_shown: int
) -> tuple[str, UserError | None]:
    try:
        for name in (NUMBERS, DRAWS, CROPPED):
            (folder / name).unlink(missing_ok=True)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        survey = read_through(config, source, regularisation, folder / BAD_FILES, processes)
        found, pictures = numbers(survey), {}
        if survey.order is not None and num_shown:
            draws, cropped = first_draws(survey, num_shown), most_cropped(survey, CROPPED_SHOWN)
            found["shown"] = draw_numbers(draws)
            pictures[DRAWS] = draw_sheet(survey, draws)
            if cropped:
                pictures[CROPPED] = crop_sheet(survey, cropped)
        for name, picture in pictures.items():
            write_atomically(folder / name, _png(picture))
        # What is no UTF-8 becomes an escape, which JSON reads as what it was.
        written = json.dumps(found, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace")
        write_atomically(folder / NUMBERS, written + b"\n")
    except OSError as error:
        raise UserError(
            f"--output_dir {config.run.output_dir}: {folder} cannot be written ({error.strerror}): make room there, or "
            "name another folder"
        ) from error
    files = [folder / name for name in (NUMBERS, *pictures)]
    return text(found, files, folder / BAD_FILES), survey.fault


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
