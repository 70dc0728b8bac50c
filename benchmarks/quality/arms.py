"""arms.yaml: what is run, and in which order a search goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lpl.errors import UserError

ARMS = Path(__file__).parent / "arms.yaml"
Options = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Which data, at which resolution.

    Attributes:
        begins_with: the setting, one before this, whose baseline the pretraining starts from; None: the model.
        pretraining: what differs in it.
        steps: of its arms; None: as all.
        sampling_steps: None: as all.
    """

    name: str
    data: str
    resolution: int
    begins_with: str | None = None
    pretraining: Options = field(default_factory=dict)
    steps: int | None = None
    sampling_steps: int | None = None


@dataclass(frozen=True)
class Arm:
    """A search: where it starts, and what each round tries."""

    start: Options
    rounds: dict[str, list[Options]]


@dataclass(frozen=True)
class Pretraining:
    """How the baseline is made; see arms.yaml."""

    decoder_minutes: float
    ratio: float
    flat: float
    first: int
    every: int
    max_steps: int
    seed: int
    options: Options

    def of(self, setting: Setting) -> Pretraining:
        """The setting's own."""
        options = merged(self.options, setting.pretraining.get("options", {}))
        return replace(self, **setting.pretraining | {"options": options})


@dataclass(frozen=True)
class Control:
    """An arm derived from another one's best options.

    Attributes:
        of: that arm.
        command: the module that trains it.
        without: options that do not act in it.
        as_long_as: the arm whose training time it gets; None: as many steps as the others.
    """

    of: str
    command: str = "lpl"
    without: list[str] = field(default_factory=list)
    as_long_as: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """All of arms.yaml."""

    settings: list[Setting]
    samples: int
    search_samples: int
    guidance: float
    guided_samples: int
    steps: int
    seeds: list[int]
    search_seed: int
    common: Options
    pretraining: Pretraining
    baseline: Arm
    lpl: Arm
    controls: dict[str, Control]

    @property
    def primary(self) -> Setting:
        """The setting that is searched."""
        return self.settings[0]


@dataclass(frozen=True)
class Run:
    """One run of an arm: what decides it, and so its row's place in results.json."""

    setting: Setting
    arm: str
    seed: int
    reported: bool
    steps: int
    samples: int
    options: Options
    command: str = "lpl"
    base_steps: int | None = None
    """Of the arm whose time this run was given; None: its steps are its own."""


def read_arms(file: Path = ARMS) -> Benchmark:
    """Reads the file.

    Raises:
        UserError: keys that are missing or unknown.
    """
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        found["settings"] = [Setting(name, **value) for name, value in found["settings"].items()]
        found["pretraining"] = Pretraining(**found["pretraining"])
        for arm in ("baseline", "lpl"):
            found[arm] = Arm(**found[arm])
        found["controls"] = {name: Control(**value) for name, value in found["controls"].items()}
        benchmark = Benchmark(**found)
        for setting in benchmark.settings:
            benchmark.pretraining.of(setting)
    except (TypeError, KeyError) as error:
        raise UserError(f"{file}: {error}") from error
    before: list[str | None] = [None]
    for setting in benchmark.settings:
        if setting.begins_with not in before:
            raise UserError(f"{file}: {setting.name} begins with {setting.begins_with}, which is no setting before it")
        before.append(setting.name)
    if benchmark.search_seed in benchmark.seeds:
        raise UserError(f"{file}: search_seed {benchmark.search_seed} is among the reported seeds")
    return benchmark


def as_toy(benchmark: Benchmark) -> Benchmark:
    """The same stages in a minute: one setting, two seeds, few steps and samples, one round of one choice."""

    def shorter(arm: Arm) -> Arm:
        return Arm(arm.start, {name: choices[:1] for name, choices in list(arm.rounds.items())[:1]})

    steps = {"train_batch_size": 4, "lr_warmup_steps": 1, "log_every": 2, "checkpointing_steps": 4}
    return replace(
        benchmark,
        settings=benchmark.settings[:1],
        samples=64,
        search_samples=64,
        guided_samples=64,
        steps=4,
        seeds=benchmark.seeds[:2],
        common=benchmark.common | steps,
        pretraining=replace(benchmark.pretraining, decoder_minutes=0.05, first=4, every=4, max_steps=8),
        baseline=shorter(benchmark.baseline),
        lpl=shorter(benchmark.lpl),
    )


def only_settings(benchmark: Benchmark, names: list[str]) -> Benchmark:
    """The same with fewer settings.

    Raises:
        UserError: an unknown one, or the searched one is not among them.
    """
    known = {setting.name: setting for setting in benchmark.settings}
    unknown = [name for name in names if name not in known]
    if unknown or benchmark.primary.name not in names:
        wrong = f"{unknown[0]} is unknown" if unknown else f"{benchmark.primary.name}, which is searched, is missing"
        raise UserError(f"--settings {','.join(names)}: {wrong}; there are {', '.join(known)}")
    return replace(benchmark, settings=[setting for name, setting in known.items() if name in names])


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
