"""What `--help` prints: the options of a command that matter first, or all of them by topic."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, get_type_hints

from lpl.config import TrainConfig, declared, takes_train
from lpl.config.checks import facts_of

LABEL, WIDEST = 26, 100
"""Columns of an option's name, and of a line at most."""
ALL = "all"
"""What --help takes to show every option."""
KINDS = {"str": ("TEXT", "a text"), "int": ("N", "a whole number"), "float": ("X", "a number")}
"""By type: how a value is shown after its option, and what it is called."""


def texts_of(group: Callable[..., Any]) -> dict[str, str]:
    """The text under each field of a class of options."""
    body = ast.parse(inspect.getsource(group)).body[0].body  # type: ignore[attr-defined]
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def help_text(command: Callable[..., Any], name: str, everything: bool) -> str:
    """The help of a command.

    Args:
        command: a dataclass of options, which may have groups or take those of `lpl train`.
        name: of the command, such as "lpl data".
        everything: all options by topic; else the command's own, and of `lpl train` those that are declared as main.
    """
    width = min(shutil.get_terminal_size().columns, WIDEST)
    shared = takes_train(command)
    trains = command is TrainConfig
    own: Any = command
    positional = [_written(command, f) for f in fields(own) if f.default is f.default_factory is MISSING]
    config = ["[--config FILE-or-preset]"] if shared else []
    lines = [" ".join(["usage:", name, *positional, *config, "[options]"]), ""]
    for paragraph in inspect.cleandoc(command.__doc__ or "").split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), width), ""]
    if not trains:
        lines += _listed("options", command, width)
    if trains and not everything:
        chosen = [line for group in TrainConfig().groups() for line in _rows(type(group), width, main=True)]
        lines += ["options to begin with:", *chosen, ""]
    elif shared and everything:
        for group in TrainConfig().groups():
            lines += _listed((type(group).__doc__ or "").splitlines()[0].rstrip("."), type(group), width)
    if shared:
        told = "--config is read first, flags win: `lpl presets` lists what ships. --no_x turns off what --x turns on."
        if not everything:
            told += f" All {len(declared())} options of a run by topic: `{name} --help {ALL}`."
        lines += textwrap.wrap(told, width)
    return "\n".join(lines).rstrip()


def _listed(title: str, group: Callable[..., Any], width: int) -> list[str]:
    rows = list(_rows(group, width))
    return [f"{title}:", *rows, ""] if rows else []


def _rows(group: Callable[..., Any], width: int, main: bool = False) -> Iterator[str]:
    """The options of a class, or those of them that are declared as main, a few lines each."""
    own: Any = group
    texts, facts = texts_of(group), facts_of(group)
    for field in fields(own):
        if field.name not in texts or (main and not facts[field.name].main):
            continue
        label = f"  {_written(group, field)}"
        told = texts[field.name]
        if field.default not in (None, MISSING, "") and not isinstance(field.default, bool | tuple):
            told = f"{told.rstrip('.')}. [{field.default}]"
        if len(label) > LABEL - 1:
            yield label
            label = ""
        yield textwrap.fill(told, width, initial_indent=f"{label:{LABEL}}", subsequent_indent=" " * LABEL)


def _written(group: Callable[..., Any], field: Field[Any]) -> str:
    """An option as one gives it, as in "--rank N" and "--no_use_lpl"."""
    kind = _type(group, field.name)
    several = " ..." if "tuple" in kind else ""
    if isinstance(field.default, bool):
        return f"--{'no_' if field.default else ''}{field.name}"
    if field.default is MISSING:
        return field.name.upper() + several
    words = ["PATH"] if facts_of(group)[field.name].path else [shown for shown, _ in _kinds(kind)]
    return f"--{field.name} {'|'.join([*words, *_choices(kind)])}{several}"


def expected(command: Callable[..., Any], name: str) -> str:
    """What an option of a command takes, in words."""
    groups: tuple[Any, ...] = (command, *map(type, TrainConfig().groups()))
    kind = next(_type(group, name) for group in groups if name in facts_of(group))
    *others, last = [*(told for _, told in _kinds(kind)), *_choices(kind)]
    return f"{', '.join(others)} or {last}" if others else last


def _type(group: Callable[..., Any], name: str) -> str:
    return str(get_type_hints(group)[name])


def _kinds(kind: str) -> list[tuple[str, str]]:
    return [told for name, told in KINDS.items() if re.search(rf"\b{name}\b", kind.partition("Literal[")[0])]


def _choices(kind: str) -> list[str]:
    return re.findall(r"[\w+.]+", kind.partition("Literal[")[2].partition("]")[0])
