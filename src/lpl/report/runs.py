"""Reads a folder of `lpl train`: options, versions, logged values by step, validation and training time."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from lpl.config import TrainConfig
from lpl.config.files import is_config_of_run, read_record
from lpl.config.run_folder import CONFIG_FILE, VALIDATION, read_finished, read_rows

RATE = "samples_per_second"
Curve = list[tuple[float, float]]
"""(abscissa, value), by abscissa."""


@dataclass(frozen=True)
class RunFolder:
    """The data of a run that its folder holds."""

    path: Path
    options: dict[str, Any]
    """By flag name."""
    environment: dict[str, Any]
    """Versions, git state and the number of processes."""
    finished_step: int | None
    """Optimizer steps of the finished run; None: the run has not ended."""
    final_weights: str | None
    """Which weights the result contains, "raw" or "ema"; None: the run has not ended."""
    validation: list[dict[str, Any]]
    """Rows of validation.jsonl, by step."""
    scalars: dict[str, list[tuple[int, float]]]
    """Logged values: name -> (optimizer steps, value), by step."""
    skipped: list[str] = field(default_factory=list)
    """What could not be read, a line each."""

    @property
    def last_step(self) -> int:
        """The last step with any data."""
        logged = [points[-1][0] for points in self.scalars.values() if points]
        return self.finished_step or max([*logged, *(row["step"] for row in self.validation), 0])


def inside(folder: Path, name: str) -> Path | None:
    """The path of a name that a file in a folder refers to, if it is inside the folder, also after following links."""
    try:
        found = (folder / name).resolve()
        return folder / name if found.is_relative_to(folder.resolve()) and found.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or a loop of links
        return None


def is_run(path: Path) -> bool:
    """Whether a folder holds a run of `lpl train`."""
    return is_config_of_run(path / CONFIG_FILE)


def read_run(path: Path) -> RunFolder:
    """Reads a run's folder.

    Raises:
        UserError: config.yaml is not that of a run.
    """
    options, environment = read_record(path / CONFIG_FILE)
    skipped: list[str] = []
    scalars = _scalars(path, str(options.get("logging_dir", "logs")), skipped)
    finished = read_finished(path) or {}
    if not finished:
        skipped.append(f"{path}: the run has not ended; what it has so far is shown")
    step, weights = finished.get("step"), finished.get("weights")
    return RunFolder(path, options, environment, step, weights, _validation(path, skipped), scalars, skipped)


def training_clock(run: RunFolder) -> Curve:
    """(optimizer steps, seconds of training until then), without validation, checkpoints and the time between sessions.

    seconds(s_k) = seconds(s_{k-1}) + (s_k - s_{k-1}) n / r_k, with the n samples of a step and the logged rate r_k of
    samples a second between two logs. The first rate, which includes the start (memory, kernels, compilation), is
    replaced by the second. Without rates the clock has only its beginning.
    """
    rates = [(step, rate) for step, rate in run.scalars.get(RATE, []) if rate > 0]
    if len(rates) > 1:
        rates[0] = rates[0][0], rates[1][1]
    options = TrainConfig().flat() | run.options
    samples = options["train_batch_size"] * options["gradient_accumulation_steps"]
    samples *= int(run.environment.get("processes", 1))
    clock: Curve = [(0, 0.0)]
    for here, rate in rates:
        step, seconds = clock[-1]
        if here > step:
            clock.append((here, seconds + (here - step) * samples / rate))
    return clock


def interpolate(curve: Curve, place: float) -> float | None:
    """The value at a place, linear between its neighbours; None: outside the measured range."""
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < place < x1:
            return y0 + (place - x0) / (x1 - x0) * (y1 - y0)
    return next((y for x, y in curve if x == place), None)


def _validation(path: Path, skipped: list[str]) -> list[dict[str, Any]]:
    if not (path / VALIDATION).is_file():
        skipped.append(f"{path}: no {VALIDATION}, as nothing was held out (--validation_samples)")
    return sorted(read_rows(path / VALIDATION, skipped), key=lambda row: int(row["step"]))


def _scalars(path: Path, name: str, skipped: list[str]) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars; for a step that ran twice, the later value."""
    logs = inside(path, name)
    if logs is None or not any(logs.glob("**/events.out.tfevents.*")):
        skipped.append(f"{path}: no TensorBoard logs in {name}/: curves of training are left out")
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for folder in sorted({file.parent for file in logs.glob("*/events.out.tfevents.*")}):
        size = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
        events = EventAccumulator(str(folder), size_guidance=size, purge_orphaned_data=False)
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in sorted(events.Scalars(tag), key=lambda e: e.wall_time):
                found.setdefault(tag, {})[event.step] = event.value
    return {tag: sorted(points.items()) for tag, points in found.items()}
