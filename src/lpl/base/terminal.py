"""Output to the terminal: text from users may hold control characters, which a terminal would obey."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, line separators, direction marks, halves of surrogate pairs."""
LONGEST = 4000
"""Most characters of a line."""
BARS = re.compile("(\r|\x1b\\[A)")
"""Sequences that a progress bar needs to draw over itself."""


def printable(text: str) -> str:
    r"""A text with escapes such as \x1b or \u202e in the place of what a terminal would obey; lines stay lines."""
    return UNPRINTABLE.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    """The same on a single line; the middle of a very long one is left out."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return printable(text.replace("\n", "\\n").replace("\t", " "))


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silences a library's logger within the block."""
    theirs = logging.getLogger(name)
    before, theirs.disabled = theirs.disabled, True
    try:
        yield
    finally:
        theirs.disabled = before


def _escape(letter: str) -> str:
    return f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\u{ord(letter):04x}"


class Screen:
    """A text stream that writes what is printable to another; `bars`: progress bars are drawn on it."""

    def __init__(self, raw: Any, bars: bool) -> None:
        self.raw, self._bars = raw, bars

    def write(self, text: str) -> int:
        """Writes a text; returns its length."""
        parts = BARS.split(text) if self._bars else [text]
        shown = "".join(part if number % 2 else printable(part) for number, part in enumerate(parts))
        encoding = self.encoding or "utf-8"
        self.raw.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes texts one after another."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """Everything that is printed or logged meanwhile is made printable; a record of the logger "lpl" stays one line."""
    logger = logging.getLogger("lpl")
    if _as_one_line not in logger.filters:
        logger.addFilter(_as_one_line)
    out, err = Screen(sys.stdout, bars=False), Screen(sys.stderr, bars=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def _as_one_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), None
    return True


def as_it_is() -> contextlib.AbstractContextManager[Any]:
    """Prints without escaping: for the program's own text with terminal sequences, such as the colours of --help."""
    return contextlib.redirect_stdout(getattr(sys.stdout, "raw", sys.stdout))


QUIET = 2.0
"""Seconds before a bar shows."""


def progress(
    items: Iterable[Any] | None = None, *, desc: str, unit: str = "it", total: int | None = None, show: bool = True
) -> Any:
    """A tqdm bar on stderr over items, or of `total` steps."""
    from tqdm import tqdm  # not for --help

    return tqdm(
        items, desc=one_line(desc), unit=unit, total=total, delay=QUIET, leave=False, disable=not show, file=sys.stderr
    )


INDENT = 13
"""Columns before the text of a labelled line."""


def labelled(label: str, lines: Iterable[str]) -> list[str]:
    """Lines after a label, all indented alike."""
    return [f"{'' if number else label:{INDENT}}{line}" for number, line in enumerate(lines)]


def columns(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """The rows of a table as lines, each column as wide as its longest text.

    Args:
        rows: texts, the same number in each.
        right: align all columns but the first to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = str.rjust if right else str.ljust
    return ["  ".join([row[0].ljust(widths[0]), *map(align, row[1:], widths[1:])]).rstrip() for row in rows]


def with_names(told: Iterable[tuple[str, str]], everyone: int | None = None) -> list[str]:
    """Each line once, after all names that it belongs to.

    Args:
        told: (name, line).
        everyone: the number of all names; a line that belongs to all of them is shown without names.
    """
    names: dict[str, dict[str, None]] = {}
    for name, line in told:
        names.setdefault(line, {})[name] = None
    return [line if len(own) == everyone else f"{', '.join(own)}: {line}" for line, own in names.items()]


def percent(part: float) -> str:
    """A share in per cent: whole numbers from 1 % on, two digits below."""
    return f"{100 * part:.0f} %" if part >= 0.01 else f"{100 * part:.2g} %"
