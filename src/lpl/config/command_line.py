"""From a command line to options: --config first, flags after it win, every fault in one line. Only here is tyro."""

from __future__ import annotations

import contextlib
import io
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

import tyro

from lpl.base.errors import UserError
from lpl.base.terminal import as_it_is
from lpl.config import TrainConfig, declared
from lpl.config.commands import CompareConfig, DataReportConfig, PlanConfig
from lpl.config.files import as_flags, nearest, read_options, why_refused, without_replaced
from lpl.presets import presets


def parse_train(argv: list[str]) -> TrainConfig:
    """Options of `lpl train`: --config (a file or preset) first, flags after it win.

    Raises:
        UserError: an unknown, refused or malformed option, or values that fail the config's checks.
    """
    return parse_options(TrainConfig, argv, "lpl train", list(TrainConfig().flat()))


def load_config(file: Path) -> TrainConfig:
    """The options that a YAML file holds, such as a run's config.yaml.

    Raises:
        UserError: as parse_train.
    """
    return parse_train(["--config", str(file)])


def parse_plan(argv: list[str]) -> PlanConfig:
    """Options of `lpl plan`: those of `lpl train`, --memory, --num_processes and --sharding.

    Raises:
        UserError: as parse_train, or a --memory that is no size.
    """
    return parse_options(PlanConfig, argv, "lpl plan", [*TrainConfig().flat(), "memory", "num_processes", "sharding"])


def parse_compare(argv: list[str]) -> CompareConfig:
    """Options of `lpl compare`: those of `lpl train`, and its own.

    Raises:
        UserError: as parse_train, or nothing to compare.
    """
    own = [name for name in CompareConfig.__dataclass_fields__ if name != "train"]
    return parse_options(CompareConfig, argv, "lpl compare", [*TrainConfig().flat(), *own])


def parse_data(argv: list[str]) -> DataReportConfig:
    """Options of `lpl data`: those of `lpl train`, and --num_shown.

    Raises:
        UserError: as parse_train, or a --num_shown that is out of range.
    """
    return parse_options(DataReportConfig, argv, "lpl data", [*TrainConfig().flat(), "num_shown"])


def parse_options(cls: Any, argv: list[str], prog: str, known: list[str]) -> Any:
    """Options of a command that takes those of `lpl train`, and --config.

    Args:
        cls: a dataclass whose first line of docstring is the command's help.
        argv: without the command's name.
        prog: the command, as its help shows it.
        known: names of its options.

    Raises:
        UserError: an unknown, refused or malformed option.
    """
    argv, config_name = _take_config(argv)
    base = [] if config_name is None else as_flags(without_replaced(read_options(config_name), argv))
    intro = cls.__doc__.splitlines()[0]
    help_text = f"{intro} --config FILE-or-preset is read first, flags win. Presets: {', '.join(presets())}."
    return parse(cls, base + argv, prog, known, help_text)


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    rest, name = [], None
    tokens = iter(argv)
    for token in tokens:
        if token == "--config":
            name = next(tokens, None)
            if name is None:
                raise UserError("--config needs a file or the name of a preset")
        elif token.startswith("--config="):
            name = token.split("=", 1)[1]
        else:
            rest.append(token)
    return rest, name


def parse(cls: Any, argv: list[str], prog: str, known: list[str], description: str | None = None) -> Any:
    """Options of any command; arguments and errors as parse_options."""
    _check_flags(argv, known)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), as_it_is():
            return tyro.cli(
                cls,
                args=argv,
                prog=prog,
                description=description,
                use_underscores=True,
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.PositionalRequiredArgs,
                ),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue())) from None


def _check_flags(argv: list[str], known: list[str]) -> None:
    option = "an argument"
    for i, token in enumerate(argv):
        option = token.split("=", 1)[0] if token.startswith("--") else option
        is_empty = not (token.partition("=")[2] if token.startswith("--") and "=" in token else token).strip()
        facts = declared().get(option[2:].replace("-", "_"))
        if is_empty and not (facts and facts.may_be_empty):
            raise UserError(f"{option} is given empty: give a value, or leave it out")
        if not token.startswith("--") or token == "--help":
            continue
        name = token[2:].split("=", 1)[0].replace("-", "_")
        why = why_refused(name)
        if why is not None:
            raise UserError(f"--{name} is not taken: {why}")
        plain = name.removeprefix("no_")
        if name not in known and not _is_switch(plain):
            raise UserError(f"unknown option --{name}{nearest(name, known)}")
        value = token.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
        if value.lower() in ("true", "false") and _is_switch(plain):
            raise UserError(f"--{name} takes no value: write --{plain} or --no_{plain}")


def _is_switch(name: str) -> bool:
    return isinstance(TrainConfig().flat().get(name), bool)


def _one_line(box: str) -> str:
    """The message in tyro's box (drawn or, where stdout is not UTF-8, blank), without title and help, on one line."""

    def is_rule(line: str) -> bool:
        return set(line) <= {"─", "-"}

    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    return " ".join(takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines)))
