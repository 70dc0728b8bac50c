"""Reading JSON: every fault is one line that names the file; and what a file must look like, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError
from lpl.base.files import write_output

LARGEST = 1e100
"""No measured figure is larger, and the square of this is still finite."""


@dataclass(frozen=True)
class Kind:
    """A kind of plain value: its name in words, and a test for it."""

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
    words = "a whole number" + ("" if (least, most) == (-(2**63), 2**63 - 1) else f" in {least}..{most}")
    return Kind(words, lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most)


def one_of(*values: Any) -> Kind:
    """One of some values."""
    return Kind(f"one of {', '.join(map(str, values))}", lambda v: not isinstance(v, list | dict) and v in values)


NUMBER, WHOLE = number(), whole()
TEXT = Kind("a text", lambda v: isinstance(v, str))
SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
NULL = Kind("null", lambda v: v is None)
ANY = Kind("anything", lambda v: True)
REST = "*"
"""Key of an object's description: all keys that are not named."""

Shape = Any
"""A Kind; (Shape, ...): any of these; [Shape]: a list of such; {"key": Shape, "key?": Shape}: an object, whose other
keys are not checked unless REST describes them. A key with "?" may be missing."""


def require_shape(value: Any, shape: Shape, where: str, then: str = "") -> None:
    """Refuses a value of another shape.

    Raises:
        UserError: it is of another shape; the message has `where`, the first key that differs, and `then`.
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
    if isinstance(value, list | dict):
        text = f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    elif isinstance(value, str):
        text = repr(value)
    elif value is None or isinstance(value, bool):
        text = "null" if value is None else str(value).lower()
    else:
        text = f"{value:.6g}" if isinstance(value, float) or abs(value) < 10**15 else "a number that is far too large"
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_json(text: str | bytes, where: str, then: str = "") -> Any:
    """The content of a JSON text; bytes are UTF-8. Errors say `where` it is and what to do `then`.

    Raises:
        UserError: not JSON, or too deep or too large to be read.
    """
    then = f": {then}" if then else ""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}){then}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}){then}") from error
    except RecursionError as error:
        raise UserError(f"{where}: lists or objects are nested too deep to be read{then}") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where}: not JSON ({str(error).partition(';')[0]}){then}") from error
    except MemoryError as error:
        raise UserError(f"{where}: too large for the memory{then}") from error


def parse_row(line: str, where: str, then: str = "") -> dict[str, Any]:
    """The JSON object in a line of a user's file; its texts can be used as they are.

    Raises:
        UserError: as parse_json; it is no object; a text has U+0000 or half of a surrogate pair.
    """
    row = parse_json(line, where, then)
    instead = f": {then}" if then else ""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object{instead}")
    if "\\u" in line and (found := _unusable(row)):
        raise UserError(f"{where}: holds {found}, which is no character of a text: take it out")
    return row


def read_object(file: Path, flag: str = "", then: str = "") -> dict[str, Any]:
    """The JSON object in a file; `then`: what the user should do if it holds none.

    Raises:
        UserError: as parse_json; it cannot be read; it holds other JSON.
    """
    where, instead = f"{flag} {file}".strip(), f": {then}" if then else ""
    try:
        found = parse_json(file.read_bytes(), where, then)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}){instead}") from error
    except MemoryError as error:
        raise UserError(f"{where}: too large for the memory{instead}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: not a JSON object{instead}")
    return found


def object_in(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it cannot be read or holds none."""
    try:
        return read_object(file)
    except UserError:
        return {}


def _unusable(value: Any) -> str | None:
    """The first character in the texts of a value that cannot be stored, as a JSON escape; None: there is none."""
    if isinstance(value, dict):
        return next((found for item in value.items() for each in item if (found := _unusable(each))), None)
    if isinstance(value, list):
        return next((found for item in value if (found := _unusable(item))), None)
    letters = value if isinstance(value, str) else ""
    return next((f"\\u{ord(x):04x}" for x in letters if x == "\0" or "\ud800" <= x <= "\udfff"), None)


def as_json(content: Any) -> bytes:
    """Indented JSON; ValueError for numbers that are not finite; characters that UTF-8 lacks become JSON escapes."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def write_json(file: Path, content: Any, where: str) -> None:
    """Writes as_json; the file appears whole. Arguments and errors are those of write_output."""
    write_output(file, as_json(content), where)
