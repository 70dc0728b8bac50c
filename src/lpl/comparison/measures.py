"""The metrics of a finished run: those over steps and seconds in its folder, and those of `lpl eval` at its end."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lpl.base.errors import UserError, require
from lpl.base.json_files import read_object
from lpl.config import TrainConfig
from lpl.config.commands import CompareConfig
from lpl.config.model_commands import EvalConfig
from lpl.config.points import FOLDER, as_tuple
from lpl.config.run_folder import EVAL_FOLDER, FINISHED, read_result
from lpl.evaluation.guidance import Row, rows_of
from lpl.report.curves import LOSSES, final_kind
from lpl.report.runs import Curve, RunFolder, read_run, training_clock

logger = logging.getLogger("lpl")

REDRAW = (
    "give --prompts, --reference_dir, --resolution, --guidance_scale and --num_inference_steps as before, or remove "
    f"the folder {EVAL_FOLDER} of every run, so that all samples are drawn anew"
)
"""What to do about samples of a comparison that were drawn otherwise."""


class EvalMetrics(NamedTuple):
    """What `lpl eval` says of a run."""

    values: dict[str, float]
    notes: dict[str, str]
    """What limits a metric, such as too few samples, by its name."""
    left_out: tuple[str, ...]
    """What it refused or skipped, a line each."""
    rows: tuple[Row, ...] = ()
    """A row for each point of guidance and sampling steps, see evaluation.guidance."""


NO_METRICS = EvalMetrics({}, {}, ())


@dataclass(frozen=True)
class RunMetrics:
    """What was measured of a run."""

    seed: int
    folder: str
    """Its folder, within the comparison's."""
    steps: int
    seconds: float
    """Of training, without validation and checkpoints."""
    metrics: dict[str, float]
    """At the end."""
    curves: dict[str, Curve]
    """Metrics that were measured along the way: (optimizer steps, value)."""
    clock: Curve
    """(optimizer steps, seconds of training)."""
    validation: list[dict[str, Any]]
    """The last row of validation.jsonl for each kind of weights."""
    evaluated: EvalMetrics = NO_METRICS
    final: str | None = None
    """The weights whose validation counts, raw or ema."""


def measure_run(home: Path, name: str, seed: int, evaluated: EvalMetrics = NO_METRICS) -> RunMetrics:
    """Reads a finished run, by the comparison's folder and the run's name within it."""
    run = read_run(home / name)
    clock, curves = training_clock(run), validation_curves(run)
    last_rows = {row["weights"]: row for row in run.validation}
    return RunMetrics(
        seed,
        name,
        run.finished_step or run.last_step,
        clock[-1][1],
        {metric: curve[-1][1] for metric, curve in curves.items()} | evaluated.values,
        curves,
        clock,
        list(last_rows.values()),
        evaluated,
        final_kind(run),
    )


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
    digests: dict[str, str | None],
    is_late: Callable[[], bool] = lambda: False,
) -> EvalMetrics:
    """The metrics of `lpl eval` for a run against --reference_dir; every process calls it, the first gets them.

    What eval.json of the run's folder holds for the same options, reference and prompts is not measured again; samples
    that are older than the run's result are removed.

    Args:
        folder: of the finished run.
        options: of `lpl compare`.
        config: of the run.
        digests: of reference and prompts, see input_digests.
        is_late: asked before anything is measured: whether no time is left.

    Raises:
        UserError: what cannot be measured, in every process.
        StopRequestedError: no time is left, in every process.
    """
    from lpl.config.run_folder import EVAL_FILE
    from lpl.evaluation.command import run_eval

    first = os.environ.get("RANK", "0") == "0"
    wanted = eval_options(str(folder), folder / EVAL_FOLDER, options, config)
    file = folder / EVAL_FOLDER / EVAL_FILE
    if not _holds(file, {"options": asdict(wanted), **digests}, folder):
        if first:
            drop_stale_samples(folder)
        run_eval(wanted, is_late)
    if not first:
        return NO_METRICS
    content = read_result(file, "eval")
    known = {name: m for name, m in content.get("metrics", {}).items() if m.get("value") is not None}
    # With several points, these are of the one that is best in this run alone: arms are compared by the rows.
    values = {} if "points" in content else {name: float(metric["value"]) for name, metric in known.items()}
    notes = {name: str(metric["note"]) for name, metric in known.items() if metric.get("note")}
    return EvalMetrics(values, notes, tuple(content.get("refused", ())), tuple(rows_of(content)))


def drop_stale_samples(run: Path) -> None:
    """Removes samples that `lpl eval` drew of a run if they are older than the run's result.

    They are of other weights, so `lpl eval` would refuse to go on with them.
    """
    from lpl.evaluation.generate import remove_samples

    for folder in (run / EVAL_FOLDER, *(run / EVAL_FOLDER / FOLDER).glob("*")):
        if _are_stale(run, folder):
            logger.info("%s: its samples are older than the run's result; they are drawn again", folder)
            remove_samples(folder)


def _are_stale(run: Path, folder: Path) -> bool:
    from lpl.config.run_folder import SETTINGS

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

    source, folder = str(config.model.pretrained_model_name_or_path), Path(config.run.output_dir) / EVAL_FOLDER
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
        own = replace(plan, resolution=one.data.resolution or plan.resolution, folder=run / EVAL_FOLDER)
        for point in own.each():
            if not _are_stale(run, point.folder):
                check_settings(point.folder, point.settings(), REDRAW)


def eval_options(source: str, output: Path, options: CompareConfig, config: TrainConfig) -> EvalConfig:
    """Options of `lpl eval` for a run: equal for all runs except for the model and where its images go."""
    return EvalConfig(
        pretrained_model_name_or_path=source,
        reference_dir=options.reference_dir,
        prompts=options.prompts,
        num_samples=options.num_samples,
        output_dir=str(output),
        resolution=config.data.resolution,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        scheduler=options.scheduler,
        timestep_spacing=options.timestep_spacing,
    )


def _holds(file: Path, wanted: dict[str, Any], run: Path) -> bool:
    """Whether an eval.json has these fields and is not older than the run's result."""
    try:
        content = read_object(file)
        older = file.stat().st_mtime < (run / FINISHED).stat().st_mtime
    except (OSError, UserError):
        return False
    return not older and {key: content.get(key) for key in wanted} == json.loads(json.dumps(wanted))
