"""arms.yaml: what is run, and in which order a search goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality.variants import OPTIONS as VARIANT_OPTIONS
from lpl.base.errors import UserError

ARMS = Path(__file__).parent / "arms.yaml"
Options = dict[str, Any]


@dataclass(frozen=True)
class Points:
    """Where something is measured.

    Attributes:
        samples: how many.
        sampling_steps: each of these, the first one first.
        guidance: each of these scales.
        to_best: whether further scales of the grid are measured until the best one is not at an end of them.
    """

    samples: int
    sampling_steps: list[int]
    guidance: list[float]
    to_best: bool = False


@dataclass(frozen=True)
class Pretraining:
    """How far the denoiser is trained from scratch: `steps` in all, kept and measured `every` so many."""

    steps: int
    every: int
    seed: int


@dataclass(frozen=True)
class Arm:
    """A search: where it starts, and what each round tries."""

    start: Options
    rounds: dict[str, list[Options]]

    @property
    def most_runs(self) -> int:
        """Runs that the search takes at most: the start, and every choice."""
        return 1 + sum(map(len, self.rounds.values()))


@dataclass(frozen=True)
class Control:
    """An arm derived from another one's best options.

    Attributes:
        of: that arm.
        without: options that do not act in it.
        plus: options laid on top.
        costs: the control of the same arm whose counted FLOPs it gets; None: as many steps as the others.
        everywhere: measured where the two arms are, and not where controls are.
    """

    of: str
    without: list[str] = field(default_factory=list)
    plus: Options = field(default_factory=dict)
    costs: str | None = None
    everywhere: bool = False


@dataclass(frozen=True)
class Flow:
    """The arms of flow matching, see flow.py.

    Attributes:
        pretraining_steps, pretraining: how the pretrained UNet is trained on, by flow matching.
        steps, seeds, baseline, lpl: as a Benchmark's.
        default: LPL's default.
    """

    pretraining_steps: int
    pretraining: Options
    steps: int
    seeds: list[int]
    baseline: Arm
    lpl: Arm
    default: Options


@dataclass(frozen=True)
class Benchmark:
    """All of arms.yaml."""

    pretraining: Pretraining
    points: dict[str, Points]
    """Of "pretraining", "search", "report", "controls" and "flow"."""
    guidance: list[float]
    """The grid."""
    steps: int
    seeds: list[int]
    search_seed: int
    common: Options
    baseline: Arm
    lpl: Arm
    controls: dict[str, Control]
    flow: Flow


@dataclass(frozen=True)
class Run:
    """One run of an arm: what decides it, and so its rows' place in results.json."""

    arm: str
    seed: int
    reported: bool
    steps: int
    options: Options
    base_steps: int | None = None
    """Of the arm whose time this run was given; None: its steps are its own."""

    @property
    def command(self) -> str:
        """The module that trains it."""
        return "benchmarks.quality.variants" if self.options.keys() & VARIANT_OPTIONS.keys() else "lpl"


def read_arms(file: Path = ARMS) -> Benchmark:
    """Reads the file.

    Raises:
        UserError: keys that are missing or unknown, or searches of unequal length.
    """
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        found["pretraining"] = Pretraining(**found["pretraining"])
        found["points"] = {name: Points(**value) for name, value in found["points"].items()}
        for part in (found, found["flow"]):
            part |= {arm: Arm(**part[arm]) for arm in ("baseline", "lpl")}
        found["flow"] = Flow(**found["flow"])
        found["controls"] = {name: Control(**value) for name, value in found["controls"].items()}
        benchmark = Benchmark(**found)
    except (TypeError, KeyError) as error:
        raise UserError(f"{file}: {error}") from error
    if benchmark.search_seed in (*benchmark.seeds, *benchmark.flow.seeds):
        raise UserError(f"{file}: search_seed {benchmark.search_seed} is among the reported seeds")
    counts = benchmark.baseline.most_runs, benchmark.lpl.most_runs
    if counts[0] != counts[1]:
        raise UserError(f"{file}: the baseline's search has {counts[0]} runs, LPL's {counts[1]}: they must be equal")
    outside = {g for points in benchmark.points.values() for g in points.guidance} - set(benchmark.guidance)
    if outside:
        raise UserError(f"{file}: guidance {sorted(outside)} is not in the grid {benchmark.guidance}")
    return benchmark


def as_toy(benchmark: Benchmark) -> Benchmark:
    """The same stages in minutes: two seeds, few steps and samples, one round of one choice, two scales."""

    def shorter(arm: Arm) -> Arm:
        return Arm(arm.start, {name: choices[:1] for name, choices in list(arm.rounds.items())[:1]})

    steps = {"train_batch_size": 4, "lr_warmup_steps": 1, "log_every": 2, "checkpointing_steps": 4}
    flow = benchmark.flow
    few = {
        name: replace(points, samples=32, sampling_steps=points.sampling_steps[:2], guidance=[1.0, 3.0], to_best=False)
        for name, points in benchmark.points.items()
    }
    return replace(
        benchmark,
        pretraining=replace(benchmark.pretraining, steps=4, every=2),
        points=few,
        steps=4,
        seeds=benchmark.seeds[:2],
        common=benchmark.common | steps,
        baseline=shorter(benchmark.baseline),
        lpl=shorter(benchmark.lpl),
        flow=replace(
            flow,
            pretraining_steps=4,
            pretraining=flow.pretraining | {"lr_warmup_steps": 1},
            steps=4,
            seeds=flow.seeds[:2],
            lpl=shorter(flow.lpl),
        ),
    )


def merged(*parts: Options) -> Options:
    """Options on top of each other, sorted; those that are null in the end are left out."""
    found: Options = {}
    for part in parts:
        found |= part
    return {name: value for name, value in sorted(found.items()) if value is not None}


def search(arm: Arm, start: Options, score: Callable[[list[Options]], list[float]]) -> Options:
    """The best options of a search by rounds; the first of equal ones.

    Args:
        arm: its start is laid on top of the options to start from.
        start: those options.
        score: of several options at once, the lower the better.
    """
    best = merged(start, arm.start)
    for choices in arm.rounds.values():
        candidates = candidates_of(best, choices)
        scores = score(candidates)
        best = candidates[min(range(len(scores)), key=scores.__getitem__)]
    return best


def candidates_of(best: Options, choices: list[Options]) -> list[Options]:
    """What a round tries: the best so far, and every choice on top of it that changes it."""
    candidates = [best]
    for choice in choices:
        options = merged(best, choice)
        if options not in candidates:
            candidates.append(options)
    return candidates
