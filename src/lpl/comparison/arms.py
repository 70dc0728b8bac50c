"""The arms: named sets of options over those that all share, read and checked before anything is trained."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lpl.base.errors import UserError
from lpl.base.text import read_text
from lpl.config import TrainConfig, declared
from lpl.config.command_line import parse_train
from lpl.config.commands import CompareConfig, check_logs
from lpl.config.files import REFUSED, as_flags, nearest, read_strings, without_replaced
from lpl.config.loss import acting
from lpl.config.run_folder import COMPARE_FILE, FINISHED, PAGE, read_finished
from lpl.evaluation.guidance import SAMPLES

logger = logging.getLogger("lpl")


def check_same_data(run: Path, baseline: Path) -> None:
    """Compares the digests of the samples that two finished runs of one seed, by their folders, were trained on.

    Raises:
        UserError: other images or captions, or others held out, as when files were changed between the runs.
    """
    digests = {folder: (read_finished(folder) or {}).get("data") for folder in (run, baseline)}
    for folder, digest in digests.items():
        if digest is None:
            logger.warning("%s: %s does not say on which data it was trained; that is not compared", folder, FINISHED)
    if None in digests.values() or digests[run] == digests[baseline]:
        return
    older, newer = sorted(digests, key=lambda folder: (folder / FINISHED).stat().st_mtime)
    raise UserError(
        f"{newer}: was trained on other images or captions than {older}, which was finished before it, or others were "
        f"held out, so they are no pair: restore the data and remove {newer}, or remove {older} and all runs as "
        "old as it, or compare in another --output_dir"
    )


SAME_VALUES = {"channel_detached": "channel"}
"""Norms that differ only in their gradients."""


def redefined_metrics(config: TrainConfig, baseline: TrainConfig) -> dict[str, tuple[str, ...]]:
    """The options by which metrics of two runs have different definitions, by the kind of metric (see kind_of).

    Kinds without any are left out, and LPL where one of the runs has none to measure.
    """
    (given, own), (given_before, before) = ((c.flat(), _acting(c)) for c in (config, baseline))
    changed = {name for name in given if given[name] != given_before[name] and own.get(name) != before.get(name)}
    kinds = ["diffusion_loss", SAMPLES, *["lpl"] * (config.lpl.use_lpl and baseline.lpl.use_lpl)]
    found = {kind: tuple(sorted(name for name in changed if kind in declared()[name].defines)) for kind in kinds}
    return {kind: options for kind, options in found.items() if options}


def _acting(config: TrainConfig) -> dict[str, Any]:
    """The options that act, with one spelling for those of the same effect."""
    found = acting(config.flat())
    if "lpl_norm_type" in found:
        found["lpl_norm_type"] = SAME_VALUES.get(found["lpl_norm_type"], found["lpl_norm_type"])
    return found


@dataclass(frozen=True)
class Arm:
    """A set of options."""

    name: str
    overrides: dict[str, str]
    """As written in the file."""
    baseline: bool
    configs: dict[int, TrainConfig]
    """By seed."""
    repeats: bool = False
    """Whether it has the options of the baseline: it shows what the hardware's rounding alone does."""
    unpaired: tuple[str, ...] = ()
    """Options by which its steps see something else than the baseline's."""
    redefined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Options by which its metrics have another definition than the baseline's, by the kind of metric."""

    @property
    def why_unpaired(self) -> str | None:
        """Why its runs are not paired with the baseline's; None: they are."""
        return f"it changes --{', --'.join(self.unpaired)}" if self.unpaired else None

    @property
    def sees_other_data(self) -> bool:
        """Whether an option of the data is another than the baseline's."""
        return any(name in vars(TrainConfig().data) for name in self.unpaired)

    def folder(self, seed: int) -> str:
        """The folder of a run, within the comparison's."""
        return f"{self.name}/seed-{seed}"


def read_arms(options: CompareConfig) -> list[Arm]:
    """The arms of --arms with the options of all their runs.

    Raises:
        UserError: a file that cannot be read, or an arm with an invalid name or option.
    """
    shared = _shared_options(options.train)
    arms: list[Arm] = []
    for name, overrides in _read(Path(str(options.arms))).items():
        where = f"--arms {options.arms}: {name}"
        own = _flags(overrides, where)
        # What all share gives way to an arm's own options as a preset does to flags.
        flags, configs = [*as_flags(without_replaced(shared, own, is_preset=True)), *own], {}
        for seed in options.seeds:
            folder = Path(options.train.run.output_dir) / name / f"seed-{seed}"
            try:
                configs[seed] = parse_train([*flags, f"--seed={seed}", f"--output_dir={folder}"])
                check_logs(configs[seed])
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
        config = configs[options.seeds[0]]
        first = arms[0].configs[options.seeds[0]] if arms else config
        changed = _changed(config, first)
        unpaired = tuple(sorted(name for name in changed if declared()[name].draws))
        repeats = bool(arms) and not changed
        redefined = redefined_metrics(config, first)
        arms.append(Arm(name, overrides, not arms, configs, repeats, unpaired, redefined))
    return arms


def _read(file: Path) -> dict[str, dict[str, str]]:
    content = read_strings(read_text(file, f"--arms {file}"), f"--arms {file}")
    if not isinstance(content, dict) or len(content) < 2:
        raise UserError(f"--arms {file}: expected two arms or more, `name: {{option: value}}`, the baseline first")
    arms = {}
    for name, overrides in content.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name):
            raise UserError(f"--arms {file}: {name!r} names a folder: use letters, digits and . _ + = - only")
        if name.lower() in (COMPARE_FILE, PAGE):
            raise UserError(f"--arms {file}: {name} is a file that lpl compare writes; name the arm otherwise")
        overrides = overrides or {}
        if not isinstance(overrides, dict) or not all(isinstance(value, str) for value in overrides.values()):
            raise UserError(f"--arms {file}: {name}: expected {{option: value, ...}} with single values")
        arms[name] = overrides
    return arms


def _flags(overrides: dict[str, str], where: str) -> list[str]:
    known = list(TrainConfig().flat())
    for key in overrides:
        why = REFUSED.get(key) or (declared()[key].arms if key in known else None)
        if why is not None:
            raise UserError(f"{where}: {key} is not taken: {why}")
        if key not in known:
            raise UserError(f"{where}: unknown option {key}{nearest(key, known)}")
    try:
        return as_flags(overrides)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _shared_options(config: TrainConfig) -> dict[str, str]:
    """What differs from the defaults, as config.yaml has it."""
    default = TrainConfig().flat()
    given = {k: v for k, v in config.flat().items() if v != default[k] and k not in ("output_dir", "seed")}
    return dict(yaml.load(yaml.safe_dump(given), yaml.BaseLoader))


def _changed(config: TrainConfig, other: TrainConfig) -> set[str]:
    now, before = acting(config.flat()), acting(other.flat())
    found = {name for name in now.keys() & before.keys() if now[name] != before[name] and not declared()[name].free}
    return found - {"seed"}
