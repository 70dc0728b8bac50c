"""What a JSON file must look like: a description as plain data, and the key at which a file differs from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lpl.errors import UserError

LARGEST = 1e100
"""Beyond it no figure is anything that was measured, and squares overflow."""


@dataclass(frozen=True)
class Kind:
    """A plain value: in words, and whether something is one."""

    words: str
    fits: Callable[[Any], bool]


def number(least: float = -LARGEST, most: float = LARGEST) -> Kind:
    """A finite number within bounds."""
    told = "" if (least, most) == (-LARGEST, LARGEST) else f" in {least:g}..{most:g}"

    def fits(value: Any) -> bool:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return plain and math.isfinite(float(min(max(value, -LARGEST * 10), LARGEST * 10))) and least <= value <= most

    return Kind(f"a finite number{told}", fits)


def whole(least: int = -(2**63), most: int = 2**63 - 1) -> Kind:
    """A whole number within bounds."""
    told = "" if (least, most) == (-(2**63), 2**63 - 1) else f" in {least}..{most}"
    return Kind(
        f"a whole number{told}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most,
    )


def one_of(*values: Any) -> Kind:
    """One of some values."""
    return Kind(f"one of {', '.join(map(str, values))}", lambda v: not isinstance(v, list | dict) and v in values)


NUMBER, WHOLE = number(), whole()
TEXT = Kind("a text", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
NULL = Kind("null", lambda v: v is None)
ANY = Kind("anything", lambda v: True)
REST = "*"
"""Key of an object's description: all keys that are not named."""

Shape = Any
"""A Kind; (Shape, ...): any of these; [Shape]: a list of such; {"key": Shape, "key?": Shape}: an object, whose further
keys are let be unless REST describes them. A key with "?" may be missing."""


def require_shape(value: Any, shape: Shape, where: str, then: str = "") -> None:
    """Refuses a value of another shape; the first key at which it differs is named.

    Args:
        value: of a JSON file.
        shape: what it must be.
        where: the file (and line) that errors name.
        then: what to do about it.

    Raises:
        UserError: it is of another shape.
    """
    fault = difference(value, shape)
    if fault is not None:
        raise UserError(f"{where}: {fault}{f': {then}' if then else ''}")


def difference(value: Any, shape: Shape, key: str = "") -> str | None:
    """Where and how a value differs from a shape, in words; None: it does not."""
    if isinstance(shape, tuple):
        faults = [difference(value, each, key) for each in shape]
        if None in faults:
            return None
        same_kind = [f for f, each in zip(faults, shape, strict=True) if isinstance(value, type(each))]
        return same_kind[0] if same_kind else f"{key or 'it'} is {_told(value)}, not {_expected(shape)}"
    if isinstance(shape, Kind):
        return None if shape.fits(value) else f"{key or 'it'} is {_told(value)}, not {shape.words}"
    if not isinstance(value, type(shape)):
        return f"{key or 'it'} is {_told(value)}, not {_expected(shape)}"
    if isinstance(shape, list):
        parts = [(f"{key}[{place}]", item, shape[0]) for place, item in enumerate(value)]
    else:
        named = {name.removesuffix("?"): name for name in shape if name != REST}
        missing = [name for name, given in named.items() if name == given and name not in value]
        if missing:
            return f"{key or 'it'} has no {missing[0]}"
        of = {name: shape[given] for name, given in named.items()}
        rest = shape.get(REST, ANY)
        parts = [(f"{key}.{name}".lstrip("."), item, of.get(name, rest)) for name, item in value.items()]
    return next((fault for name, item, own in parts if (fault := difference(item, own, name))), None)


def _expected(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(dict.fromkeys(_expected(each) for each in shape))
    return shape.words if isinstance(shape, Kind) else "a list" if isinstance(shape, list) else "an object"


def _told(value: Any) -> str:
    """A value as errors show it."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else ""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, list | dict):
        text = f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    elif not text:
        text = f"{value:.6g}" if isinstance(value, float) or abs(value) < 10**15 else "a number beyond all measure"
    return text if len(text) <= 60 else f"{text[:57]}..."
