"""What commands leave for later ones: the names of files and folders, what each must look like, how it is read.

A checkpoint's manifest lists the size and checksum of each of its files and is written last. A folder without it was
never finished; one whose files differ from it was cut short or damaged since.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.base.files import checksum, sync_file, write_atomically
from lpl.base.json_files import (
    NULL,
    NUMBER,
    REST,
    SWITCH,
    TEXT,
    WHOLE,
    Kind,
    Shape,
    difference,
    number,
    one_of,
    parse_json,
    read_object,
    require_shape,
    whole,
)
from lpl.base.output_folder import JUNK

logger = logging.getLogger("lpl")

# A run.
CONFIG_FILE, FINISHED, VALIDATION, BAD_FILES = "config.yaml", "finished.json", "validation.jsonl", "bad_files.jsonl"
SAMPLES, SAVED = "samples", "saved"
"""Folders: of validation images, and the prefix of those with weights of a step."""
WEIGHTS = "weights.json"
"""In a folder of weights: what they are."""
RESULT = ".tmp-result"
"""A result that is being written."""
DATA_REPORT, CHECK_REPORT, EVAL_FOLDER = "data-report", "check-report", "eval"
"""Folders of `lpl data`, `lpl check` and an evaluation; the first two show training images: never published."""
# A checkpoint.
MANIFEST, STATE = "manifest.json", "state.json"
CHECKPOINT, NONFINITE = "checkpoint-", "nonfinite-step-"
"""Prefixes before the number of a step: of checkpoints, and of files about a step that was not finite."""
PATTERN = re.compile(rf"{CHECKPOINT}(\d+)")
UNPUBLISHED = (f"{CHECKPOINT}*", f"{SAVED}-*", ".tmp-*", ".lpl*", f"{DATA_REPORT}/*", f"{CHECK_REPORT}/*", BAD_FILES)
"""Files of a run that are not uploaded to the Hub."""
# Results, and the page about them.
RESULT_FILES = {"eval": "eval.json", "check": "check.json", "compare": "compare.json"}
EVAL_FILE, CHECK_FILE, COMPARE_FILE = RESULT_FILES.values()
PAGE = "report.html"
DATA_FILE, DRAWS, CROPPED = "data.json", "draws.png", "cropped.png"
RECONSTRUCTION, ESTIMATES, MAPS = "reconstruction.png", "estimates.png", "maps"
"""Pictures of a check; the last is a folder."""
IMAGES, SETTINGS, FIGURES = "images", "samples.json", "figures.json"
"""Of an evaluation: samples, how they are drawn, and the metrics of one of several points."""

STEP = whole(0, 2**53)
PLAIN = Kind("a single value", lambda v: v is None or isinstance(v, str | int | float))
MEASURED = Kind(
    "a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool) and (v != v or -1e100 <= v <= 1e100)
)
"""What was measured while training, where a loss may be NaN."""
PAIR = Kind("two numbers", lambda v: isinstance(v, list) and len(v) == 2 and all(map(NUMBER.fits, v)))
TEXTS = ([TEXT], NULL)
MAYBE, MAYBE_TEXT, MAYBE_STEP = (NUMBER, NULL), (TEXT, NULL), (STEP, NULL)
LARGE = (number(-1e300, 1e300), NULL)
"""The largest value in a network, which may overflow."""
ENVIRONMENT = {REST: PLAIN}

METRIC: Shape = {
    **dict.fromkeys(("value?", "floor?"), MAYBE),
    "interval?": (PAIR, NULL),
    "lower_is_better?": SWITCH,
    "note?": MAYBE_TEXT,
}
METRICS: Shape = {REST: METRIC}
POINT: Shape = {"guidance_scale": MAYBE, "num_inference_steps": STEP}
DIFFERENCE: Shape = {"difference": NUMBER, "interval": (PAIR, NULL)}

SPECTRUM = ("frequency", "samples", "reference")
EVAL: Shape = {
    "kind": one_of("eval"),
    "environment?": ENVIRONMENT,
    "options?": ({"against?": one_of("images", "reconstructions")}, NULL),
    "refused?": [TEXT],
    **dict.fromkeys(("model?", "reference?", "reference_digest?", "features?", "image_root?"), MAYBE_TEXT),
    **dict.fromkeys(("num_samples?", "num_reference?", "resolution?"), MAYBE_STEP),
    "metrics?": METRICS,
    "points?": [{**POINT, "metrics": METRICS}],
    "best?": [POINT],
    "spectrum?": ({**{key: [NUMBER] for key in SPECTRUM}, "floor?": ([NUMBER], NULL)}, NULL),
    "images?": ([{"file": TEXT, "prompt?": MAYBE_TEXT, "seed?": (WHOLE, NULL), "index?": (WHOLE, NULL)}], NULL),
}
T_RANGE: Shape = {"t_low": NUMBER, "t_high": NUMBER}
CHECK: Shape = {
    "kind": one_of("check"),
    "environment?": ENVIRONMENT,
    "refused?": [TEXT],
    "outcome?": (one_of("acts", "idles", "harms"), NULL),
    "verdict?": MAYBE_TEXT,
    "faults?": TEXTS,
    "warnings?": TEXTS,
    "components?": ({REST: {REST: {"finite": (SWITCH, NULL), "max_abs?": LARGE, "relative_error?": LARGE}}}, NULL),
    "suggestion?": ({"lpl_weight?": MAYBE, "lpl_t_threshold?": MAYBE_STEP, "why?": TEXTS}, NULL),
    "reconstruction?": ({"psnr_mean": MAYBE, "psnr_min": MAYBE, "file?": MAYBE_TEXT}, NULL),
    "walk_equals_decode?": MAYBE,
    "step?": (dict.fromkeys(("peak_bytes?", "flops?", "seconds?"), MAYBE), NULL),
    "gradients?": ([{**T_RANGE, "ratio": MAYBE, "cosine": MAYBE}], NULL),
    "layers?": ([{"tap": (TEXT, WHOLE), "bins": [{**T_RANGE, "distance": MAYBE, "outlier_fraction": MAYBE}]}], NULL),
    "estimates?": ({"file?": MAYBE_TEXT}, NULL),
    "maps?": ([{"tap": (TEXT, WHOLE), "t": STEP, "file": TEXT}], NULL),
}
METRIC_NAME = Kind(
    "the name of a metric", lambda v: isinstance(v, str) and (not v.startswith("validation/") or v.count("/") == 2)
)
BESIDE = ("precision?", "recall?", "high_band_log_error?")
COMPARE: Shape = {
    "kind": one_of("compare"),
    "environment?": ENVIRONMENT,
    "refused?": [TEXT],
    "notes?": [TEXT],
    "arms?": [
        {
            "name": TEXT,
            "overrides?": {REST: PLAIN},
            "baseline?": SWITCH,
            "repeats?": SWITCH,
            "unpaired?": MAYBE_TEXT,
            "yardsticks?": ({REST: [TEXT]}, [TEXT]),
            "runs?": [{"seed": STEP, "folder": TEXT}],
        }
    ],
    "paired?": [
        {
            "arm": TEXT,
            "metric": METRIC_NAME,
            **dict.fromkeys(("abscissa", "verdict", "outcome?"), TEXT),
            "seeds?": STEP,
            "baseline?": MAYBE,
            **DIFFERENCE,
            "bootstrap?": (PAIR, NULL),
            "noise": MAYBE,
            "noise_from?": (one_of("repeat", "seeds"), NULL),
            "lower_is_better?": SWITCH,
        }
    ],
    "rows?": [
        {
            "arm": TEXT,
            "seed": STEP,
            "guidance": MAYBE,
            "sampling_steps": STEP,
            "frechet": MAYBE,
            **dict.fromkeys(BESIDE, MAYBE),
        }
    ],
    "at_best?": [
        {
            "arm": TEXT,
            "sampling_steps": STEP,
            "guidance": [MAYBE],
            "baseline_guidance": [MAYBE],
            "frechet?": {"ratio": NUMBER, "interval": (PAIR, NULL)},
            **dict.fromkeys(BESIDE, DIFFERENCE),
        }
    ],
    "verdicts?": [{"arm": TEXT, "outcome": TEXT, "sentence": TEXT}],
}
RESULTS = {"eval": EVAL, "check": CHECK, "compare": COMPARE}
VALIDATED: Shape = {
    "step": STEP,
    "weights": TEXT,
    "samples?": STEP,
    **{f"{name}?": (MEASURED, NULL) for name in ("diffusion_loss", "lpl")},
    **{f"{name}_bins?": ([(MEASURED, NULL)], NULL) for name in ("diffusion_loss", "lpl")},
    "edges?": [NUMBER],
}
"""A line of validation.jsonl."""
ENDED: Shape = {"step": STEP, "weights": TEXT, "data?": TEXT}
"""finished.json."""
ENTRIES = {REST: {"bytes": whole(0), "xxh3_128": TEXT}}
"""manifest.json, by the name of each file."""


def read_result(file: Path, kind: str) -> dict[str, Any]:
    """What lpl eval, check or compare wrote.

    Raises:
        UserError: it cannot be read, is of another kind, or was changed so that it no longer makes sense.
    """
    then = f"run lpl {kind} again"
    try:
        found = read_object(file)
    except UserError as error:
        fault = str(error).removeprefix(f"{file}: ").removeprefix("cannot be read ")
        raise UserError(f"{file}: cannot be read ({fault.strip('()')}): {then}") from error
    if found.get("kind") != kind:
        raise UserError(f"{file}: was not written by lpl {kind}")
    require_shape(found, RESULTS[kind], str(file), then)
    if kind == "eval":
        lists = [(found.get("spectrum") or {}).get(key) for key in (*SPECTRUM, "floor")]
        if len({len(values) for values in lists if values}) > 1:
            raise UserError(f"{file}: spectrum: its lists are of different lengths: {then}")
    if kind == "compare":
        names = [arm["name"] for arm in found.get("arms", [])]
        parts = ("paired", "rows", "at_best", "verdicts")
        unknown = [(key, e["arm"]) for key in parts for e in found.get(key, []) if e["arm"] not in names]
        if unknown or len(set(names)) < len(names):
            told = "an arm is there twice"
            if len(set(names)) == len(names):
                told = f"{unknown[0][0]} has the arm {unknown[0][1]!r:.60}, which is not in arms"
            raise UserError(f"{file}: {told}: {then}")
    return found


def _read_row(line: bytes, where: str) -> dict[str, Any]:
    then = "move the file away"
    try:
        row = parse_json(line, where)
    except UserError as error:
        raise UserError(f"{where}: is no row of a validation: {then}") from error
    fault = difference(row, VALIDATED)
    for name in ("diffusion_loss_bins", "lpl_bins"):
        if fault is None and row.get(name) and len(row.get("edges", ())) != len(row[name]) + 1:
            fault = f"{name} does not go with edges"
    if fault is not None:
        raise UserError(f"{where}: is no row of a validation ({fault}): {then}")
    return dict(row)


def read_finished(folder: Path) -> dict[str, Any] | None:
    """What a finished run recorded at its end; None if there is no such file, or no valid one.

    A run without it counts as unfinished: nothing is lost by going on from its last checkpoint.
    """
    try:
        found = read_object(folder / FINISHED)
    except UserError:
        return None
    return found if difference(found, ENDED) is None else None


def read_rows(path: Path, skipped: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a validation.jsonl, none if there is no file.

    Args:
        skipped: the messages of lines that are no rows are added to it; None: they are raised.

    Raises:
        UserError: a line that is no row.
    """
    rows = []
    for place, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), 1):
        try:
            rows += [_read_row(line, f"{path}, line {place}")] if line.strip() else []
        except UserError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces the rows, ordered by step; the file is whole at any moment."""
    ordered = sorted(rows, key=lambda row: int(row["step"]))
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in ordered).encode())


def write_manifest(folder: Path) -> None:
    """Reads every file of a folder, notes its size and XXH3 checksum (128 bits), and syncs all of it.

    Raises:
        OSError: the disk is full, or another fault of the file system.
    """
    for path in folder.iterdir():
        sync_file(path)
    files = {p.name: {"bytes": p.stat().st_size, "xxh3_128": checksum(p)} for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    sync_file(folder / MANIFEST)
    sync_file(folder)


def damage(folder: Path, read: bool = True) -> str | None:
    """What is wrong with a folder that write_manifest has described; None: nothing.

    Args:
        read: read every byte; else only sizes are compared.
    """
    try:
        files = parse_json((folder / MANIFEST).read_bytes(), MANIFEST)
        fault = difference(files, ENTRIES)
        if fault is not None:
            return f"{MANIFEST} is not what was written"
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} of {expected['bytes']} bytes"
            if read and checksum(folder / name) != expected["xxh3_128"]:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    except (UserError, ValueError):  # ValueError: a name with a NUL
        return f"{MANIFEST} is not what was written"
    return None


def unlisted(folder: Path) -> str | None:
    """The first entry of a folder that the manifest in it does not list; None: there is none."""
    try:
        files = read_object(folder / MANIFEST)
        return next((p.name for p in sorted(folder.iterdir()) if p.name not in {MANIFEST, *JUNK, *files}), None)
    except (OSError, UserError):
        return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a run's folder, oldest first; their sizes are compared, their content is not."""
    return [path for path in _named(folder) if damage(path, read=False) is None]


def find_checkpoint(folder: Path, choice: str | None, read: bool = True) -> Path | None:
    """The checkpoint to go on from: the newest good one of the run, or the one that --resume_from_checkpoint names.

    Every byte is read, or with read=False only sizes are compared. Newer ones that are damaged are named in the log and
    skipped.

    Raises:
        UserError: a named checkpoint that is not there or not complete, or a run whose checkpoints are all damaged.
    """
    if choice is None or choice == "latest":
        found = _named(folder)
        for path in reversed(found):
            if (fault := damage(path, read)) is None:
                return path
            logger.warning("%s is damaged (%s): it is passed over", path, fault)
        if found:
            raise UserError(f"{folder}: every checkpoint in it is damaged; delete or move them to start over")
        return None
    for path in (Path(choice), folder / choice):
        if (path / STATE).is_file() or (path / MANIFEST).is_file():
            if (fault := damage(path, read)) is not None:
                raise UserError(f"--resume_from_checkpoint {choice}: {path} is damaged ({fault}); name another")
            return path
    names = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
    raise UserError(f"--resume_from_checkpoint {choice}: no complete checkpoint there; {folder} has {names}")


def _named(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, oldest first."""
    found = [(int(m[1]), p) for p in folder.glob(f"{CHECKPOINT}*") if (m := PATTERN.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def last_checkpoint(folder: Path) -> str:
    """A clause that says which checkpoint a stopped run has."""
    found = list_checkpoints(folder)
    return f"{found[-1]} is the last checkpoint" if found else "no checkpoint was written yet"
