"""Checks of arguments of the library's own functions: one of the wrong kind raises a ValueError of one line."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any


def integer(name: str, value: Any, least: int | None = None) -> int:
    """An integer of `least` or more; a numpy integer or a tensor that holds one is taken, too."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or (least is not None and found < least):
        raise ValueError(f"{name} must be an integer{'' if least is None else f' of {least} or more'}, not {value!r}")
    return found


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, not {value!r}")
    return float(value)


def shape_of(name: str, value: Any) -> tuple[int, ...]:
    """The shape of a sample's latents, (C, *space)."""
    known = isinstance(value, Sequence) and len(value) > 1 and not isinstance(value, str)
    if not known or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in value):
        raise ValueError(f"{name} must be the shape of a sample's latents, (C, *space), not {value!r}")
    return tuple(value)


def is_number(value: Any) -> bool:
    """Whether a value is a real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def flags(**values: Any) -> None:
    """Arguments that are True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, not {value!r}")


def function(name: str, value: Any, takes: str) -> None:
    """Checks that a value can be called with the arguments that `takes` names, such as "alpha, sigma"."""
    wanted = f"{name} must be a function of ({takes})"
    if not callable(value):
        raise ValueError(f"{wanted}, not {value!r}")
    try:
        signature = inspect.signature(value)
    except ValueError:  # some builtins do not say what they take
        return
    try:
        signature.bind(*takes.split(", "))
    except TypeError as error:
        raise ValueError(f"{wanted}: {error}") from None


def check_state(of: str, value: Any, kinds: Mapping[str, Any]) -> None:
    """Checks a state_dict(): it has these keys and kinds of values; where a kind is a dict, None is valid, too."""
    hint = "pass what state_dict() gave"
    if not isinstance(value, Mapping) or (missing := [key for key in kinds if key not in value]):
        found = f"without {', '.join(missing)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise ValueError(f"the state of {of} is {found}: {hint}")
    for key, kind in kinds.items():
        if isinstance(kind, Mapping) and value[key] is not None:
            check_state(f"{of}, {key!r},", value[key], kind)
        elif not isinstance(kind, Mapping) and not isinstance(value[key], kind):
            raise ValueError(f"the state of {of} has {value[key]!r} as {key!r}: {hint}")
