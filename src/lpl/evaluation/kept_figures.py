"""Figures of a point's samples, kept beside them, so that a continued command measures what is missing alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lpl import __version__
from lpl.base.json_files import read_object
from lpl.data.files import write_atomically
from lpl.errors import UserError
from lpl.evaluation.measuring import Judge, Measured
from lpl.evaluation.options import EvalConfig
from lpl.evaluation.pictures import list_pictures, pictures_digest, read_captions

FILE = "figures.json"
NOT_ACTING = ("guidance_scale", "num_inference_steps", "output_dir", "sample_batch_size", "reference_cache_dir")
"""Options that figures of given images do not follow from."""


def figures_key(
    options: EvalConfig, files: list[Path], prompts: Sequence[str] | None, judges: Sequence[Judge], vae: Any
) -> str:
    """A hash of all that decides figures: options, samples, prompts, networks, reference and VAE."""
    from lpl.families.base import weights_hash

    acting = {name: value for name, value in asdict(options).items() if name not in NOT_ACTING}
    parts: list[Any] = [__version__, acting, pictures_digest(files, f"--output_dir {options.output_dir}"), prompts]
    for judge in judges:
        parts += [judge.extractor.key, judge.reference.size, judge.reference.digest]
    folder = Path(str(options.reference_dir))
    parts.append(None if vae is None else weights_hash(vae))
    real = list_pictures(folder, "--reference_dir") if options.clip else []
    parts.append(read_captions(folder, real, "--reference_dir"))
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def read_figures(folder: Path, key: str) -> Measured | None:
    """What is kept in a point's folder under a key; None: nothing, or of something else."""
    try:
        found = read_object(folder / FILE)
        return Measured(**found["figures"]) if found.get("key") == key else None
    except (UserError, KeyError, TypeError):
        return None  # measured again: nothing is lost


def keep_figures(folder: Path, key: str, found: Measured) -> None:
    """Keeps figures in a point's folder.

    Raises:
        UserError: it cannot be written to.
    """
    text = json.dumps({"key": key, "figures": found._asdict()}, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        write_atomically(folder / FILE, (text + "\n").encode())
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from error
