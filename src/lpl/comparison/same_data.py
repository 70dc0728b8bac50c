"""Runs are compared in pairs only where both were trained on the same images and captions."""

from __future__ import annotations

import logging
from pathlib import Path

from lpl.errors import UserError
from lpl.written_files import FINISHED, read_finished

logger = logging.getLogger("lpl")


def check_same_data(run: Path, baseline: Path) -> None:
    """Compares the digests of the samples that two finished runs of one seed were trained on.

    Args:
        run, baseline: folders; one for both is fine.

    Raises:
        UserError: other images or captions, or others held out, as when files were changed between the runs.
    """
    digests = {folder: _digest(folder) for folder in (run, baseline)}
    for folder, digest in digests.items():
        if digest is None:
            logger.warning("%s: %s does not say on which data it was trained; that is not compared", folder, FINISHED)
    if None in digests.values() or digests[run] == digests[baseline]:
        return
    older, newer = sorted(digests, key=lambda folder: (folder / FINISHED).stat().st_mtime)
    raise UserError(
        f"{newer}: was trained on other images or captions than {older}, which was finished before it, or others were "
        f"held out, so they are no pair: restore the data and remove {newer}, or remove {older} and all runs as old, "
        "or compare in another --output_dir"
    )


def _digest(folder: Path) -> str | None:
    return (read_finished(folder) or {}).get("data")
