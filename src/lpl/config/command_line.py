"""From a command line to options: --config first, flags override it, each fault on a line. Only this uses tyro."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, field, make_dataclass, replace
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from lpl.base.errors import Faults, UserError, all_faults
from lpl.base.terminal import as_it_is
from lpl.config import Facts, TrainConfig, declared, idle_options, takes_train
from lpl.config.commands import CompareConfig
from lpl.config.files import REFUSED, as_flags, nearest, read_options, without_replaced
from lpl.config.help import ALL, expected, help_text
from lpl.presets import presets

T = TypeVar("T")

CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.PositionalRequiredArgs)
SHELLS = ("bash", "zsh", "fish")
MALFORMED = re.compile(r"(?:Error parsing |for argument ')(--\w+)")
"""How tyro names the flag whose value it cannot read."""


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
        command: a dataclass whose docstring is the command's help.
        argv: without the command's name; with --help the help is printed, and the process ends.
        name: of the command, as its help shows it.

    Raises:
        UserError: options that are unknown, refused or malformed, and values that fail the options' checks: all of
            them at once.
    """
    if wanted := next((token for token in argv if token in ("--help", "-h")), None):
        [topic] = argv[argv.index(wanted) + 1 :][:1] or [""]
        if name == "lpl train" and topic not in ("", ALL) and not topic.startswith("-"):
            raise UserError(f"{wanted} {topic}: alone, or with {ALL} for every option")
        print(help_text(command, name, everything=topic == ALL))
        raise SystemExit(0)
    known, faults = declared(command), Faults()
    flags, config_name = argv, None
    if takes_train(command):
        with faults.one():
            flags, config_name = _take_config(argv)
    given, flags, refused = flags, [], []
    for part in _parts(given):
        refused.append(_option(part))
        with faults.one():
            _check(part, known)
            flags += part
            refused.pop()
    preset: dict[str, str] = {}
    if config_name is not None:
        with faults.one():
            options = without_replaced(read_options(config_name), given, config_name in presets())
            preset = options if config_name in presets() else {}
            flags = [*as_flags(options), *flags]
    return _without_idle(_parse(command, flags, name, faults, refused), preset, given)


def completion(commands: Mapping[str, Callable[..., Any] | None], shell: str) -> str:
    """The script that teaches a shell to complete the commands, their options and choices, with tyro's help.

    Args:
        commands: the options of each command; None: it has none.
        shell: one of SHELLS.
    """
    if shell not in SHELLS:
        raise UserError(f"{f'lpl completion {shell}'.rstrip()}: expected one of {', '.join(SHELLS)}")
    with_config: dict[str, Any] = {}
    for name, command in commands.items():
        own: list[Any] = [] if command is None else [("options", command)]
        if command is not None and takes_train(command):
            own.append(("config", Literal[tuple(presets())] | None, field(default=None)))
        with_config[name] = make_dataclass(name, own)
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(
            with_config, prog="lpl", args=["--tyro-print-completion", shell], use_underscores=True, config=CONFIG
        )
    return script.getvalue()


def _parse(command: Callable[..., T], flags: list[str], name: str, faults: Faults, refused: list[str]) -> T:
    """The options that flags give; raises all faults, with those that were found before.

    tyro stops at the first malformed value: its flag is left out, like those that were refused before, and the others
    are parsed again.
    """
    # If values may stand without a flag, it is not known which of the values after a flag belong to it.
    is_open = any(facts.default is MISSING for facts in declared(command).values())
    if is_open:
        faults.raise_any()
    left_out = list(refused)
    while True:
        own = Faults()
        with own.one(), all_faults():
            parsed = _run_tyro(command, flags, name)
        malformed = MALFORMED.search(own.found[-1]) if own.found else None
        odd = [part for part in _parts(flags) if malformed is not None and _option(part) == malformed[1]]
        if odd:
            own.found[-1] = _malformed(command, odd[-1])
        # What is missing or contradicts because a flag was left out is no fault of the user's.
        faults.found += [told for told in own.found if not any(f"{flag} " in f"{told} " for flag in left_out)]
        if is_open or not odd:
            faults.raise_any()
            return parsed
        left_out.append(_option(odd[0]))
        flags = [token for part in _parts(flags) if part not in odd for token in part]


def _malformed(command: Callable[..., Any], part: list[str]) -> str:
    """What a flag takes instead of the values that it was given."""
    flag, values = _option(part), [value for value in (part[0].partition("=")[2], *part[1:]) if value]
    what = expected(command, flag.removeprefix("--"))
    return f"{flag}: expected {what}, not {' '.join(map(repr, values)) or 'nothing'}"


def _run_tyro(command: Callable[..., T], flags: list[str], name: str) -> T:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), as_it_is():
            return tyro.cli(command, args=flags, prog=name, use_underscores=True, config=CONFIG)
    except SystemExit:
        raise UserError(_one_line(errors.getvalue())) from None


def _without_idle(parsed: T, preset: Mapping[str, str], argv: list[str]) -> T:
    """The options without those that a preset alone asks for and that cannot act beside the others."""
    if not preset:
        return parsed
    train = parsed if isinstance(parsed, TrainConfig) else parsed.train  # type: ignore[attr-defined]
    given = {_option(part).removeprefix("--") for part in _parts(argv)}
    idle = [name for name, _ in idle_options(train) if name in preset and name not in given]
    if not train.lpl.use_lpl:
        idle += [name for name in preset if name.startswith("lpl_") and name not in given]
    train = train.changed(**{name: declared()[name].default for name in idle})
    return train if isinstance(parsed, TrainConfig) else replace(parsed, train=train)  # type: ignore[return-value, type-var]


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


def _parts(argv: list[str]) -> Iterator[list[str]]:
    """The command line in parts: each flag with the values that follow it; what stands before the first flag."""
    part: list[str] = []
    for token in argv:
        if token.startswith("--") and part:
            yield part
            part = []
        part.append(token)
    if part:
        yield part


def _option(part: list[str]) -> str:
    """The flag of a part, as it is declared."""
    flag = part[0].partition("=")[0]
    return "--" + flag[2:].replace("-", "_") if flag.startswith("--") else "an argument"


def _check(part: list[str], known: Mapping[str, Facts]) -> None:
    """Refuses a flag that is not known, or is given what it cannot take."""
    option, (first, *values) = _option(part), part
    if option == "an argument":
        values = part
    elif "=" in first:
        values = [first.partition("=")[2], *values]
    name = option.removeprefix("--")
    facts = known.get(name)
    if any(not value.strip() for value in values) and not (facts and facts.may_be_empty):
        raise UserError(f"{option} is given empty: give a value, or leave it out")
    if option == "an argument":
        return
    if name in REFUSED:
        raise UserError(f"{option} is not taken: {REFUSED[name]}")
    plain = name.removeprefix("no_")
    is_switch = plain in known and isinstance(known[plain].default, bool)
    if name not in known and not is_switch:
        raise UserError(f"unknown option --{name}{nearest(name, list(known))}")
    if is_switch and values and values[0].lower() in ("true", "false"):
        raise UserError(f"{option} takes no value: write --{plain} or --no_{plain}")


def _one_line(box: str) -> str:
    """The message in tyro's box (drawn or, where stdout is not UTF-8, blank), without title and help, on one line."""

    def is_rule(line: str) -> bool:
        return set(line) <= {"─", "-"}

    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    return " ".join(takewhile(lambda line: not is_rule(line), dropwhile(is_rule, lines)))
