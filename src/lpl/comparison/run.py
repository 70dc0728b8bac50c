"""`lpl compare`: runs every arm with every seed as `lpl train` does, measures all and writes the results."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpl import __version__
from lpl.base.errors import StopRequestedError, TrainingStoppedError, UserError
from lpl.base.files import alone_in
from lpl.base.json_files import write_json
from lpl.base.output_folder import Names, OutputFolder, check_real, kind_of
from lpl.base.terminal import with_names
from lpl.comparison import measures
from lpl.comparison.arms import Arm, check_same_data, read_arms
from lpl.comparison.measures import NO_METRICS, RunMetrics, measure_run
from lpl.comparison.sentences import verdict_on
from lpl.comparison.verdict import compare_arm, repeated_noise, result_table
from lpl.config import TrainConfig
from lpl.config.commands import CompareConfig, ReportConfig
from lpl.config.environment import environment
from lpl.config.run_folder import COMPARE_FILE, CONFIG_FILE, EVAL_FOLDER, PAGE
from lpl.evaluation.guidance import SAMPLES, at_best, edge_notes
from lpl.training import launch
from lpl.training.run import run_train

logger = logging.getLogger("lpl")

FORKED = "FORK_LAUNCHED"
"""Tells accelerate not to end a process group."""


def run_compare(options: CompareConfig) -> None:
    """Trains what is not finished, measures, and writes compare.json, the table and the page.

    All options are checked before anything is trained. A run that has to stop (a loss that is not finite), or whose
    samples cannot be measured, is left out of the comparison and named; a signal or --max_minutes, which counts for all
    training and measuring together, stops the whole, and the same command continues. Under a launch every process
    trains; the first writes.

    Raises:
        UserError: bad options, or runs that were trained on other data than the baseline's.
        StopRequestedError: asked to stop.
    """
    arms = read_arms(options)
    home = Path(options.train.run.output_dir)
    for arm in arms:
        for seed in options.seeds:
            check_real(home, home / arm.folder(seed) / EVAL_FOLDER, "--output_dir")
    from lpl.report.page import is_page, write_report

    output = OutputFolder(home, "lpl compare")
    names = Names({COMPARE_FILE: lambda path: kind_of(path) == "compare", PAGE: is_page})
    output.check(names)
    with alone_in(home):
        content = _compare(options, arms)
        if content is None:
            return
        output.check(names)
        output.claim(names)
        write_json(home / COMPARE_FILE, content, f"--output_dir {home}")
        print(result_table(content))
        write_report(ReportConfig((str(home),), str(home / PAGE)))
        print("\n".join(["", *(entry["sentence"] for entry in content["verdicts"])]))


def _compare(options: CompareConfig, arms: Sequence[Arm]) -> dict[str, Any] | None:
    """Trains and measures; the content of compare.json, in the first process."""
    from lpl.training.preflight import preflight

    started, ended = time.monotonic(), list[TrainConfig]()
    level = logger.level
    logger.setLevel(logging.ERROR)  # the run repeats preflight's warnings
    try:
        for arm in arms:
            for seed, config in arm.configs.items():
                begun = (Path(config.run.output_dir) / CONFIG_FILE).is_file()
                if begun or seed == options.seeds[0]:  # for other seeds there is nothing else to find
                    checked = preflight(config)
                    if checked.has_ended or (checked.finished_step is not None and checked.num_steps is None):
                        ended.append(config)
    finally:
        logger.setLevel(level)
    with one_process_group():
        return _train_and_measure(options, arms, ended, started)


@contextmanager
def one_process_group() -> Iterator[None]:
    """Lets all runs in it share the process group that the first of them makes, and ends it with the last.

    A launcher's store keeps the addresses and the NCCL id of a group that has ended, and the next group would take them
    for its own.
    """
    import torch

    own = FORKED not in os.environ
    try:
        with launch.environment({FORKED: "1"}):
            yield
    finally:
        _forget_run()
        if own and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _train_and_measure(
    options: CompareConfig, arms: Sequence[Arm], ended: list[TrainConfig], started: float
) -> dict[str, Any] | None:
    limit = options.train.run.max_minutes
    if options.reference_dir is not None:
        measures.check_metrics(options, arms[0].configs[options.seeds[0]], ended)
        _forget_run()
    refused = [f"{arm.name}: not paired, as {arm.why_unpaired}" for arm in arms if arm.unpaired]
    for line in refused:
        logger.warning("%s: its steps do not see what the baseline's see", line)
    for arm in arms:
        for kind, changed in arm.redefined.items():
            told = "figures of samples" if kind == SAMPLES else f"validation's {kind}"
            why = f"another yardstick than the baseline's: --{', --'.join(changed)}"
            logger.warning("%s: %s will not be compared: %s", arm.name, told, why)
    failed = train_all(options, arms, started)
    is_late = lambda: limit is not None and time.monotonic() - started >= 60 * limit  # noqa: E731
    measured, unmeasured = _measure_all(options, arms, failed, is_late)
    if os.environ.get("RANK", "0") != "0":
        return None
    return result(options, arms, measured, [*refused, *failed.values(), *unmeasured])


def train_all(options: CompareConfig, arms: Sequence[Arm], started: float) -> dict[tuple[str, int], str]:
    """Trains every arm with every seed, seed by seed, so that an early end leaves whole pairs.

    Returns why runs have no result, by arm and seed; --max_minutes counts from `started` (time.monotonic).

    Raises:
        UserError: a pair of runs that were trained on different data.
        StopRequestedError: asked to stop.
    """
    limit = options.train.run.max_minutes
    failed: dict[tuple[str, int], str] = {}
    number, total = 0, len(arms) * len(options.seeds)
    for seed in options.seeds:
        for arm in arms:
            number += 1
            config = arm.configs[seed]
            if limit is not None:
                left = limit - (time.monotonic() - started) / 60
                if left <= 0:
                    raise StopRequestedError("stopped by --max_minutes between runs: the same command continues")
                config = replace(config, run=replace(config.run, max_minutes=left))
            logger.info("run %d of %d: %s, seed %d", number, total, arm.name, seed)
            try:
                run_train(config)
            except TrainingStoppedError as error:
                failed[arm.name, seed] = f"{arm.folder(seed)}: {error}"
                logger.warning("%s", failed[arm.name, seed])
            _forget_run()
            if not (arm.sees_other_data or (arms[0].name, seed) in failed or (arm.name, seed) in failed):
                check_same_data(Path(config.run.output_dir), Path(arms[0].configs[seed].run.output_dir))
    return failed


def _forget_run() -> None:
    """Frees accelerate's settings and the device's memory, so that the next run begins as in a process of its own."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # a run ends its process group with itself
    GradientState._reset_state()
    torch.compiler.reset()  # else compiled code of earlier runs counts against dynamo's limit
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _measure_all(
    options: CompareConfig, arms: Sequence[Arm], failed: dict[tuple[str, int], str], is_late: Callable[[], bool]
) -> tuple[dict[str, list[RunMetrics]], list[str]]:
    """The metrics of all runs, in the first process, and lines on runs whose samples could not be measured."""
    found: dict[str, list[RunMetrics]] = {arm.name: [] for arm in arms}
    lines: list[str] = []
    home, first, digests = Path(options.train.run.output_dir), arms[0].configs[options.seeds[0]], None
    if options.reference_dir is not None:
        from lpl.evaluation.planning import input_digests

        digests = input_digests(measures.eval_options("", Path(first.run.output_dir) / EVAL_FOLDER, options, first))
    for arm in arms:
        for seed, config in arm.configs.items():
            if (arm.name, seed) in failed:
                continue
            evaluated = NO_METRICS
            if digests is not None:
                try:
                    evaluated = measures.metrics_of(home / arm.folder(seed), options, config, digests, is_late)
                except UserError as error:  # in every process of a launch, so that all go on together
                    lines.append(f"{arm.folder(seed)}: its samples are not measured: {error}")
                    logger.warning("%s", lines[-1])
                _forget_run()
            if os.environ.get("RANK", "0") == "0":
                found[arm.name].append(measure_run(home, arm.folder(seed), seed, evaluated))
    return found, lines


def result(
    options: CompareConfig, arms: Sequence[Arm], measured: dict[str, list[RunMetrics]], refused: Sequence[str]
) -> dict[str, Any]:
    """The content of compare.json."""
    baseline, paired, lines = measured[arms[0].name], [], list(refused)
    noise = repeated_noise({arm.name: (measured[arm.name], arm.redefined) for arm in arms if arm.repeats}, baseline)
    for arm in arms[1:]:
        entries, left_out = compare_arm(arm.name, measured[arm.name], baseline, arm.repeats, arm.redefined, noise)
        paired += entries
        lines += left_out
    runs = [run for arm in arms for run in measured[arm.name]]
    lines += with_names(((run.folder, line) for run in runs for line in run.evaluated.left_out), len(runs))
    if len(options.seeds) == 1:
        lines.append("--seeds: one seed gives no interval, so no verdict; give three or more")
    told: dict[str, Any] = {"arms": options.arms, "seeds": list(options.seeds), "reference_dir": options.reference_dir}
    if options.reference_dir is not None:
        told |= {"guidance_scale": options.guidance_scale, "num_inference_steps": options.num_inference_steps}
    told_arms = [_arm(arm, measured[arm.name]) for arm in arms]
    rows = [
        {"arm": arm.name, "seed": run.seed, "samples": options.num_samples} | _finite(row)
        for arm in arms
        for run in measured[arm.name]
        for row in run.evaluated.rows
    ]
    alike = [arm for arm in arms[1:] if SAMPLES not in arm.redefined]
    best = [entry for arm in alike for entry in at_best(rows, arm.name, arms[0].name)]
    final = next((run.final for run in runs if run.final), None)
    notes = [(run.folder, line) for run in runs for line in with_names(run.evaluated.notes.items())]
    verdicts = []
    for told_arm in told_arms[1:]:
        own_best, own_pairs = ([e for e in entries if e["arm"] == told_arm["name"]] for entries in (best, paired))
        verdicts.append(verdict_on(told_arm, told_arms[0], own_best, own_pairs, final, options.num_samples))
    return {
        "lpl": __version__,
        "kind": "compare",
        "environment": environment(),
        "options": told | {"num_samples": options.num_samples, "prompts": options.prompts},
        "refused": lines,
        "notes": [*with_names(notes, len(runs)), *edge_notes(rows, [arm.name for arm in arms])],
        "arms": told_arms,
        "paired": paired,
        "rows": rows,
        "at_best": best,
        "verdicts": verdicts,
    }


def _finite(value: Any) -> Any:
    """A value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _arm(arm: Arm, runs: Sequence[RunMetrics]) -> dict[str, Any]:
    shown = ("seed", "folder", "steps", "seconds", "metrics", "validation")
    return {
        "name": arm.name,
        "overrides": arm.overrides,
        "baseline": arm.baseline,
        "repeats": arm.repeats,
        "unpaired": arm.why_unpaired,
        "yardsticks": {kind: list(options) for kind, options in arm.redefined.items()},
        "runs": [{key: _finite(getattr(run, key)) for key in shown} for run in runs],
    }
