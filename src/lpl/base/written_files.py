"""The JSON files that commands write and later ones read: what each must look like, and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
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

FINISHED, VALIDATION = "finished.json", "validation.jsonl"

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
"""The largest value of a network that overflows."""
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


def read_result(file: Path, kind: str) -> dict[str, Any]:
    """What lpl eval, check or compare wrote.

    Raises:
        UserError: it cannot be read, is of another kind, or has been changed to something that it cannot be.
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
                told = f"{unknown[0][0]} has the arm {unknown[0][1]!r:.60}, which arms has not"
            raise UserError(f"{file}: {told}: {then}")
    return found


def read_validated(line: bytes, where: str) -> dict[str, Any]:
    """A row of validation.jsonl.

    Raises:
        UserError: a line that is none.
    """
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
    """What a finished run says of itself; None where there is no such file, or none that can be believed.

    A run without it is one that has not ended: nothing is lost by going on from its last checkpoint.
    """
    try:
        found = read_object(folder / FINISHED)
    except UserError:
        return None
    return found if difference(found, ENDED) is None else None
