"""What a finished run is worth: figures over steps and seconds from its folder, and those of `lpl eval` at its end."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lpl.base.errors import UserError, require
from lpl.base.json_files import read_object
from lpl.base.written_files import FINISHED, read_result
from lpl.config import TrainConfig
from lpl.config.commands import CompareConfig
from lpl.config.points import FOLDER, as_tuple
from lpl.evaluation.comparing import Row, rows_of
from lpl.report.curves import final_kind
from lpl.report.run_folder import RunFolder, read_run, training_clock

if TYPE_CHECKING:
    from lpl.evaluation.planning import Inputs

logger = logging.getLogger("lpl")

HIGHER_IS_BETTER = {"precision", "recall", "density", "coverage", "clip_score"}
LOSSES = ("diffusion_loss", "lpl")
EVAL = "eval"
REDRAW = (
    "give --prompts, --reference_dir, --resolution, --guidance_scale and --num_inference_steps as before, or remove "
    f"the folder {EVAL} of every run, so that all samples are drawn anew"
)
"""What to do about samples of a comparison that were drawn otherwise."""

Curve = list[tuple[float, float]]


class Figures(NamedTuple):
    """What `lpl eval` says of a run."""

    values: dict[str, float]
    notes: dict[str, str]
    """What limits a figure, such as too few samples, by its name."""
    left_out: tuple[str, ...]
    """What it refused or skipped, a line each."""
    rows: tuple[Row, ...] = ()
    """Of each point of guidance and sampling steps, see comparison.points."""


NO_FIGURES = Figures({}, {}, ())


@dataclass(frozen=True)
class Measured:
    """A run's figures."""

    seed: int
    folder: str
    """Within the comparison's."""
    steps: int
    seconds: float
    """Of training, without validation and checkpoints."""
    metrics: dict[str, float]
    """At the end."""
    curves: dict[str, Curve]
    """Figures that were measured along the way: (optimizer steps, value)."""
    clock: Curve
    """(optimizer steps, seconds of training)."""
    validation: list[dict[str, Any]]
    """The last row of validation.jsonl for each kind of weights."""
    notes: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Of Figures."""
    rows: tuple[Row, ...] = ()
    """Of Figures."""
    final: str | None = None
    """The weights whose validation counts, raw or ema."""


def measure_run(home: Path, name: str, seed: int, figures: Figures = NO_FIGURES) -> Measured:
    """Reads a finished run.

    Args:
        home: the comparison's folder.
        name: of the run's folder within it.
        seed: of the run.
        figures: of `lpl eval`.
    """
    run = read_run(home / name)
    clock: Curve = [(float(step), seconds) for step, seconds in training_clock(run)]
    curves = validation_curves(run)
    last = {metric: points[-1][1] for metric, points in curves.items()}
    rows = {row["weights"]: row for row in run.validation}
    steps = run.finished_step or run.last_step
    metrics, seconds = last | figures.values, clock[-1][1]
    measured = Measured(seed, name, steps, seconds, metrics, curves, clock, list(rows.values()))
    measured = replace(measured, notes=figures.notes, left_out=figures.left_out, rows=figures.rows)
    return replace(measured, final=final_kind(run))


def validation_curves(run: RunFolder) -> dict[str, Curve]:
    """validation/<kind>/<loss> over optimizer steps."""
    curves: dict[str, Curve] = {}
    for row in run.validation:
        for loss in LOSSES:
            if row.get(loss) is not None:
                curves.setdefault(f"validation/{row['weights']}/{loss}", []).append((float(row["step"]), row[loss]))
    return curves


def metrics_of(
    folder: Path,
    options: CompareConfig,
    config: TrainConfig,
    inputs: Inputs,
    is_late: Callable[[], bool] = lambda: False,
) -> Figures:
    """The figures of `lpl eval` for a run against --reference_dir; every process calls it, the first gets them.

    What eval.json of the run's folder holds for the same options, reference and prompts is not measured again; samples
    of the run as it was before it was trained on are removed.

    Args:
        folder: of the finished run.
        options: of `lpl compare`.
        config: of the run.
        inputs: of inputs_of.
        is_late: asked before anything is measured: whether no time is left.

    Raises:
        UserError: what cannot be measured, in every process.
        StopRequestedError: no time is left, in every process.
    """
    from lpl.evaluation.command import RESULT, run_eval

    first = os.environ.get("RANK", "0") == "0"
    wanted = eval_options(str(folder), folder / EVAL, options, config)
    file = folder / EVAL / RESULT
    if not _holds(file, {"options": asdict(wanted), **inputs._asdict()}, folder):
        if first:
            drop_stale_samples(folder)
        run_eval(wanted, is_late)
    if not first:
        return NO_FIGURES
    content = read_result(file, "eval")
    known = {name: m for name, m in content.get("metrics", {}).items() if m.get("value") is not None}
    # Those of several points are of the one that is best in this run alone: arms are compared by the rows.
    values = {} if "points" in content else {name: float(metric["value"]) for name, metric in known.items()}
    notes = {name: str(metric["note"]) for name, metric in known.items() if metric.get("note")}
    return Figures(values, notes, tuple(content.get("refused", ())), tuple(rows_of(content)))


def inputs_of(options: CompareConfig, config: TrainConfig) -> Inputs:
    """What eval.json has to say of --reference_dir and the prompts, of any run."""
    from lpl.evaluation.planning import read_inputs

    return read_inputs(eval_options("", Path(config.run.output_dir) / EVAL, options, config))


def drop_stale_samples(run: Path) -> None:
    """Removes what `lpl eval` drew of a run where it is older than the run's result.

    It is of other weights, so `lpl eval` would refuse to go on with it.

    Args:
        run: folder of a finished run.
    """
    from lpl.evaluation.generate import remove_samples

    for folder in (run / EVAL, *(run / EVAL / FOLDER).glob("*")):
        if _are_stale(run, folder):
            logger.info("%s: its samples are of the run before it was trained on; they are drawn anew", folder)
            remove_samples(folder)


def _are_stale(run: Path, folder: Path) -> bool:
    from lpl.evaluation.generate import SETTINGS

    drawn, result = folder / SETTINGS, run / FINISHED
    return drawn.is_file() and result.is_file() and drawn.stat().st_mtime < result.stat().st_mtime


def check_metrics(options: CompareConfig, config: TrainConfig, ended: Sequence[TrainConfig] = ()) -> None:
    """Refuses, before anything is trained, what `lpl eval` would refuse of the reference, its images or old samples.

    Args:
        options: of `lpl compare`.
        config: of the baseline.
        ended: options of runs that will not be trained further, whose samples are to be the same as those of others.

    Raises:
        UserError: bad input.
    """
    from lpl.evaluation.command import check_reference
    from lpl.evaluation.evaluate import FEWEST
    from lpl.evaluation.generate import check_settings
    from lpl.evaluation.images import list_pictures

    source, folder = str(config.model.pretrained_model_name_or_path), Path(config.run.output_dir) / EVAL
    wanted = eval_options(source, folder, options, config)
    least = min(options.num_samples, len(list_pictures(Path(str(options.reference_dir)), "--reference_dir")))
    several = len(as_tuple(options.guidance_scale)) * len(as_tuple(options.num_inference_steps)) > 1
    require(
        not several or least >= FEWEST["frechet"],
        f"--guidance_scale, --num_inference_steps: at several of them arms are compared by the Fréchet distance, which "
        f"needs {FEWEST['frechet']} samples and images in --reference_dir: {least} are too few (--num_samples)",
    )
    plan = check_reference(wanted, config.model)
    for one in ended:
        run = Path(one.run.output_dir)
        own = replace(plan, resolution=one.data.resolution or plan.resolution, folder=run / EVAL)
        for point in own.each():
            if not _are_stale(run, point.folder):
                check_settings(point.folder, point.settings(), REDRAW)


def eval_options(source: str, output: Path, options: CompareConfig, config: TrainConfig) -> Any:
    """Options of `lpl eval` for a run: equal for all of them but for the model and where its images go."""
    from lpl.config.model_commands import EvalConfig

    return EvalConfig(
        pretrained_model_name_or_path=source,
        reference_dir=options.reference_dir,
        prompts=options.prompts,
        num_samples=options.num_samples,
        output_dir=str(output),
        resolution=config.data.resolution,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
    )


def _holds(file: Path, wanted: dict[str, Any], run: Path) -> bool:
    """Whether an eval.json has these fields and is of the run's result as it is."""
    try:
        content = read_object(file)
        older = file.stat().st_mtime < (run / FINISHED).stat().st_mtime
    except (OSError, UserError):
        return False
    return not older and {key: content.get(key) for key in wanted} == json.loads(json.dumps(wanted))


def lower_is_better(metric: str) -> bool:
    """Which way a figure is to go."""
    return metric not in HIGHER_IS_BETTER


def at(curve: Curve, place: float) -> float | None:
    """The value at a place, by a straight line between its neighbours; None: outside of what was measured."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < place < x1:
            return y0 + (place - x0) / (x1 - x0) * (y1 - y0)
    return next((y for x, y in curve if x == place), None)


def by_seconds(curve: Curve, clock: Curve) -> Curve:
    """A curve over steps as one over seconds of training; steps beyond the clock are left out."""
    timed = [(at(clock, step), value) for step, value in curve]
    return [(seconds, value) for seconds, value in timed if seconds is not None]
