"""From a command line to options: --config first, flags after it win, every fault in one line. Only here is tyro."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import TypeVar

import tyro

from lpl.base.errors import UserError
from lpl.base.terminal import as_it_is
from lpl.config import Facts, TrainConfig, declared
from lpl.config.commands import CompareConfig
from lpl.config.files import REFUSED, as_flags, nearest, read_options, without_replaced
from lpl.presets import presets

T = TypeVar("T")


def parse_train(argv: list[str]) -> TrainConfig:
    """Options of `lpl train`; arguments and errors as parse_options."""
    return parse_options(TrainConfig, argv, "lpl train")


def load_config(file: Path) -> TrainConfig:
    """The options that a YAML file holds, such as a run's config.yaml; errors as parse_options."""
    return parse_train(["--config", str(file)])


def parse_compare(argv: list[str]) -> CompareConfig:
    """Options of `lpl compare`; arguments and errors as parse_options."""
    return parse_options(CompareConfig, argv, "lpl compare")


def parse_options(command: Callable[..., T], argv: list[str], name: str) -> T:
    """Options of a command; one that takes those of `lpl train` also takes --config (a file or preset): flags win.

    Args:
        command: a dataclass whose first line of docstring is the command's help.
        argv: without the command's name.
        name: of the command, as its help shows it.

    Raises:
        UserError: an unknown, refused or malformed option, or values that fail the options' checks.
    """
    known, description = declared(command), None
    if known.keys() >= TrainConfig().flat().keys():
        argv, config_name = _take_config(argv)
        if config_name is not None:
            argv = as_flags(without_replaced(read_options(config_name), argv, config_name in presets())) + argv
        intro = (command.__doc__ or "").splitlines()[0]
        description = f"{intro} --config FILE-or-preset is read first, flags win. Presets: {', '.join(presets())}."
    _check_flags(argv, known)
    errors = io.StringIO()
    conf = tyro.conf
    try:
        with contextlib.redirect_stderr(errors), as_it_is():
            return tyro.cli(
                command,
                args=argv,
                prog=name,
                description=description,
                use_underscores=True,
                config=(conf.OmitArgPrefixes, conf.OmitSubcommandPrefixes, conf.PositionalRequiredArgs),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue())) from None


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


def _check_flags(argv: list[str], known: Mapping[str, Facts]) -> None:
    option = "an argument"
    for i, token in enumerate(argv):
        option = token.split("=", 1)[0] if token.startswith("--") else option
        is_empty = not (token.partition("=")[2] if token.startswith("--") and "=" in token else token).strip()
        facts = known.get(option[2:].replace("-", "_"))
        if is_empty and not (facts and facts.may_be_empty):
            raise UserError(f"{option} is given empty: give a value, or leave it out")
        if not token.startswith("--") or token == "--help":
            continue
        name = token[2:].split("=", 1)[0].replace("-", "_")
        why = REFUSED.get(name)
        if why is not None:
            raise UserError(f"--{name} is not taken: {why}")
        plain = name.removeprefix("no_")
        is_switch = plain in known and isinstance(known[plain].default, bool)
        if name not in known and not is_switch:
            raise UserError(f"unknown option --{name}{nearest(name, list(known))}")
        value = token.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
        if is_switch and value.lower() in ("true", "false"):
            raise UserError(f"--{name} takes no value: write --{plain} or --no_{plain}")


def _one_line(box: str) -> str:
    """The message in tyro's box (drawn or, where stdout is not UTF-8, blank), without title and help, on one line."""

    def is_rule(line: str) -> bool:
        return set(line) <= {"─", "-"}

    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    return " ".join(takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines)))
