"""The arms: named sets of options over those that all share, read and checked before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from lpl.base.text import read_text
from lpl.comparison.options import FILE, CompareConfig, check_logs
from lpl.comparison.yardsticks import other_yardsticks
from lpl.config import TrainConfig, free_options
from lpl.config.perceptual import acting
from lpl.config_io import REFUSED, as_flags, nearest, read_strings, without_replaced
from lpl.errors import UserError
from lpl.report.options import PAGE

ONE_MODEL = "all arms begin with one model"

SET_HERE = {
    "seed": "--seeds sets it for every arm",
    "output_dir": "every run has a folder of its own",
    **dict.fromkeys(
        (
            "pretrained_model_name_or_path",
            "pretrained_vae_model_name_or_path",
            "revision",
            "variant",
            "single_file_config",
        ),
        ONE_MODEL,
    ),
    "dry_run": "lpl compare has none",
    "resume_from_checkpoint": "unfinished runs are continued anyway",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_token"), "runs of a comparison are not pushed"),
}
"""Options that an arm cannot have, and why."""

DRAWING = {
    "noise_offset", "pyramid_noise_iterations", "pyramid_noise_discount", "timestep_bias_strategy",
    "timestep_bias_multiplier", "timestep_bias_portion", "timestep_bias_begin", "timestep_bias_end",
    "timestep_distribution", "logit_mean", "logit_std", "timestep_sampling", "train_batch_size",
    "gradient_accumulation_steps",
}  # fmt: skip
"""Options outside the data's that decide what a step sees: crops, captions, noise and timesteps."""


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
    yardsticks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Options by which its figures mean something else than the baseline's, by the kind of figure."""

    @property
    def why_unpaired(self) -> str | None:
        """Why its runs and the baseline's are no pairs; None: they are."""
        return f"it changes --{', --'.join(self.unpaired)}" if self.unpaired else None

    @property
    def sees_other_data(self) -> bool:
        """Whether an option of the data is another than the baseline's."""
        return not _data_options().isdisjoint(self.unpaired)

    def folder(self, seed: int) -> str:
        """Of a run, within the comparison's."""
        return f"{self.name}/seed-{seed}"


def read_arms(options: CompareConfig, parse: Callable[[list[str]], TrainConfig]) -> list[Arm]:
    """The arms of --arms with the options of all their runs.

    Args:
        options: of `lpl compare`.
        parse: makes options of the flags of `lpl train`.

    Raises:
        UserError: a file that cannot be read, or an arm with a name or option that is none.
    """
    shared = _shared_options(options.train)
    arms: list[Arm] = []
    for name, overrides in _read(Path(str(options.arms))).items():
        where = f"--arms {options.arms}: {name}"
        own = _flags(overrides, where)
        configs = {}
        for seed in options.seeds:
            folder = Path(options.train.run.output_dir) / name / f"seed-{seed}"
            try:
                configs[seed] = parse(
                    [*as_flags(without_replaced(shared, own)), *own, f"--seed={seed}", f"--output_dir={folder}"]
                )
                check_logs(configs[seed])
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
        config = configs[options.seeds[0]]
        first = arms[0].configs[options.seeds[0]] if arms else config
        changed = _changed(config, first)
        unpaired = tuple(sorted(changed & (DRAWING | _data_options())))
        repeats = bool(arms) and not changed
        arms.append(Arm(name, overrides, not arms, configs, repeats, unpaired, other_yardsticks(config, first)))
    return arms


def _read(file: Path) -> dict[str, dict[str, str]]:
    content = read_strings(read_text(file, f"--arms {file}"), f"--arms {file}")
    if not isinstance(content, dict) or len(content) < 2:
        raise UserError(f"--arms {file}: expected two arms or more, `name: {{option: value}}`, the baseline first")
    arms = {}
    for name, overrides in content.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name):
            raise UserError(f"--arms {file}: {name!r} names a folder: use letters, digits and . _ + = - only")
        if name.lower() in (FILE, PAGE):
            raise UserError(f"--arms {file}: {name} is a file that lpl compare writes; name the arm otherwise")
        overrides = overrides or {}
        if not isinstance(overrides, dict) or not all(isinstance(value, str) for value in overrides.values()):
            raise UserError(f"--arms {file}: {name}: expected {{option: value, ...}} with single values")
        arms[name] = overrides
    return arms


def _flags(overrides: dict[str, str], where: str) -> list[str]:
    known = list(TrainConfig().flat())
    for key in overrides:
        if key in SET_HERE or key in REFUSED:
            raise UserError(f"{where}: {key} is not taken: {SET_HERE.get(key) or REFUSED[key]}")
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
    written: dict[str, str] = yaml.load(yaml.safe_dump(given), yaml.BaseLoader)
    return written


def _changed(config: TrainConfig, other: TrainConfig) -> set[str]:
    now, before = acting(config.flat()), acting(other.flat())
    ignored = free_options() | {"seed"}
    return {name for name in now.keys() & before.keys() - ignored if now[name] != before[name]}


def _data_options() -> set[str]:
    return {f.name for f in fields(TrainConfig().data)}
