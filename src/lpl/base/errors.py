"""The exceptions whose message is meant for the user's eyes: one line, what was found, what to do."""

from __future__ import annotations


class UserError(Exception):
    """A fault in what the user handed over; the command line prints its message alone and exits with 2."""


class DamagedCacheError(UserError):
    """A file of the cache that is not what was written, or lacks what it should hold."""


class UnreadCacheError(DamagedCacheError):
    """A file of the cache that could not be read (no permission, the network), and may be whole: it is kept."""


class TrainingStoppedError(Exception):
    """A run that cannot go on (a loss that is not finite, a full disk); prints its message and exits with 3."""


class StopRequestedError(Exception):
    """A run that was asked to stop (a signal, --max_minutes) and lost nothing; prints its message and exits with 4."""


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def on_one_line(error: BaseException, most: int | None = None) -> str:
    """What an exception says, its line breaks as blanks; of that the first so many characters."""
    return " ".join(str(error).split())[:most]
