"""What every group of options is checked and marked with."""

from __future__ import annotations

import os
from dataclasses import field, fields
from os.path import expanduser
from typing import Any

from lpl.errors import UserError

MOST = 10**12
"""Of a whole number that declares no bound of its own."""
MOST_PIXELS = 2**12
"""Side of the largest images: a plan, whose time grows with the area, answers within a minute or two."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that file systems take."""


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def option(default: Any, *, most: float | None = None, path: bool = False, free: bool = False) -> Any:
    """A field with what is known of it.

    Args:
        default: its value where it is not given.
        most: the largest value that it takes.
        path: it names a file or folder (or may, beside a Hub id).
        free: it changes the trajectory of a run by float rounding at most: a run may be continued with another.
    """
    return field(default=default, metadata={"most": most, "path": path, "free": free})


def free(default: Any) -> Any:
    """An option that is free."""
    return option(default, free=True)


def check_declared(group: Any) -> None:
    """Checks what is declared beside the fields of a group: numbers and their bounds, names that a system can have.

    In paths ~ becomes the home folder, for which a shell does not always see to it (a YAML file, --option=~/x).

    Raises:
        UserError: the first value that does not fit.
    """
    for declared in fields(group):
        values = getattr(group, declared.name)
        for value in values if isinstance(values, tuple) else (values,):
            _check_value(f"--{declared.name}", value, declared.metadata)
        if declared.metadata.get("path") and isinstance(values, str | tuple):
            at_home = expanduser(values) if isinstance(values, str) else tuple(map(expanduser, values))
            object.__setattr__(group, declared.name, at_home)


def _check_value(flag: str, value: Any, declared: Any) -> None:
    if isinstance(value, int | float):
        most = declared.get("most")
        if isinstance(value, int) or most is not None:
            most = MOST if most is None else most
            require(value <= most, f"{flag} must be at most {most}, not {str(value)[:40]}")
    elif isinstance(value, str):
        path = declared.get("path", False)
        check_text(flag, value, path)
        if path:
            check_path(flag, value)


def check_text(flag: str, text: str, path: bool = False) -> None:
    """Refuses a text that no file and no tokenizer takes: U+0000, or half of a surrogate pair.

    Args:
        flag: what gave it.
        text: to check.
        path: it names a file, whose name may have bytes that are no UTF-8.
    """
    for letter in text:
        escaped = path and "\udc80" <= letter <= "\udcff"
        if letter == "\0" or ("\ud800" <= letter <= "\udfff" and not escaped):
            raise UserError(f"{flag}: holds \\u{ord(letter):04x}, which is no character of a text: take it out")


def check_path(flag: str, name: str) -> None:
    """Refuses a name that is longer than file systems take."""
    encoded = os.fsencode(name)
    long = len(encoded) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in encoded.split(os.sep.encode()))
    require(not long or "://" in name, f"{flag} {name[:40]}...: {len(name)} characters are too many for a file's name")
