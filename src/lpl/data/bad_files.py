"""Images that cannot be used: counted, listed with the reason, and too many of them stop the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import ROUND_CEILING, Context, Decimal
from pathlib import Path
from typing import NamedTuple

from lpl.base.errors import UserError
from lpl.base.files import write_atomically
from lpl.base.json_files import parse_json


class BadImageError(Exception):
    """An image file that gives no pixels; `reason` says why, in one line, without the file's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnreadImageError(BadImageError):
    """A file that could not be read this time or on this machine, though it may be sound: the next run tries again."""


ALWAYS_ALLOWED = 3
"""Up to this many bad images of a source never stop a run, whatever their share, unless --max_bad_fraction is 0."""
SEEN_FIRST = 1000
"""Images that are read before the share of bad ones is checked; smaller sources are read whole, then checked."""


def is_list(path: Path) -> bool:
    """Whether a file is what `BadFiles.write` writes."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return set(parse_json(file.readline(), str(path))) == set(Bad._fields)
    except (OSError, UserError, ValueError, TypeError):  # no text, or no object
        return False


class Bad(NamedTuple):
    """An image that cannot be used."""

    id: str
    name: str
    reason: str


class BadFiles:
    """Counts the bad images of a run, and lists them in a file: `limit` is the share of all that may be bad."""

    def __init__(self, limit: float, path: Path) -> None:
        self.limit, self.path = limit, path
        self.found: list[Bad] = []

    def begin(self, name: str, size: int | None) -> None:
        """Starts counting again for a source of `size` images; None: unknown."""
        self._name, self._size = name, size
        self._bad: list[Bad] = []
        self._seen = 0

    def count(self, sample: str, name: str, reason: str | None) -> None:
        """Takes note of an image of the source; raises UserError if too many are bad, and lists those found so far."""
        self._seen += 1
        if reason is None:
            return
        self._bad.append(Bad(sample, name, reason))
        if self._seen >= SEEN_FIRST:
            self._check(self._size or self._seen, self._seen)

    def settle(self, name: str, bad: Sequence[Bad], total: int) -> None:
        """Takes the bad images of a whole source instead of those counted; raises UserError if they are too many."""
        self._name, self._bad = name, list(bad)
        self._check(total, total)
        self.found += self._bad

    def write(self) -> None:
        """Writes the list, one JSON object a line; removes an old one if nothing is bad."""
        bad = self.found
        if bad:
            lines = [json.dumps(entry._asdict(), ensure_ascii=False) + "\n" for entry in bad]
            write_atomically(self.path, "".join(lines).encode("utf-8", "surrogateescape"))
        else:
            self.path.unlink(missing_ok=True)

    def _check(self, total: int, seen: int) -> None:
        bad = len(self._bad)
        if not bad or bad / total <= self.limit or (bad <= ALWAYS_ALLOWED and self.limit > 0):
            return
        self.found += self._bad
        self.write()
        first = self._bad[0]
        if bad == seen:
            remedy = "repair them"
        elif seen < total:
            share = _rounded_up(bad, seen)
            remedy = f"repair or remove them, or, if the others are alike, allow them with --max_bad_fraction {share}"
        else:
            remedy = f"repair or remove them, or allow them with --max_bad_fraction {_rounded_up(bad, total)}"
        raise UserError(
            f"{self._name}: {bad} of {'the first ' * (seen < total)}{seen} images cannot be used, first {first.name} "
            f"({first.reason}); {self.path} lists them: {remedy}"
        )


def _rounded_up(part: int, whole: int) -> str:
    """A share, rounded up to two digits."""
    return f"{float(Context(prec=2, rounding=ROUND_CEILING).divide(Decimal(part), Decimal(whole))):g}"
