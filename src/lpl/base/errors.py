"""The exceptions whose message is meant for the user's eyes: one line, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class UserError(Exception):
    """One or several faults in what the user gave; the command line prints each on a line and exits with 2."""

    args: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(self.args)


class DamagedCacheError(UserError):
    """A file of the cache that is not what was written, or lacks what it should hold."""


class UnreadCacheError(DamagedCacheError):
    """A file of the cache that could not be read (no permission, the network), and may be whole: it is kept."""


class TrainingStoppedError(Exception):
    """A run that cannot go on (a loss that is not finite, a full disk); prints its message and exits with 3."""


class StopRequestedError(Exception):
    """A run that was asked to stop (a signal, --max_minutes) and lost nothing; prints its message and exits with 4."""


_noted: ContextVar[list[str] | None] = ContextVar("noted", default=None)


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds; within `all_faults`, notes it and goes on."""
    noted = _noted.get()
    if not condition and noted is None:
        raise UserError(message)
    if not condition and noted is not None:
        noted.append(message)


@contextmanager
def all_faults() -> Iterator[None]:
    """Raises the faults that `require` finds in the block together at its end, with a UserError that ended it.

    For checks that do not depend on each other.
    """
    found: list[str] = []
    token = _noted.set(found)
    try:
        yield
    except UserError as error:
        found += error.args
    finally:
        _noted.reset(token)
    if found:
        raise UserError(*dict.fromkeys(found))


class Faults:
    """Faults of checks that do not depend on each other."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def one(self) -> Iterator[None]:
        """Notes the UserError that ends a check."""
        try:
            yield
        except UserError as error:
            self.found += error.args

    def raise_any(self) -> None:
        """Raises all that were noted."""
        if self.found:
            raise UserError(*dict.fromkeys(self.found))


def on_one_line(error: BaseException, most: int | None = None) -> str:
    """The message of an exception, its line breaks as blanks, cut to at most `most` characters."""
    return " ".join(str(error).split())[:most]
