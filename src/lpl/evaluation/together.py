"""What one process of a launch finds out ends all of them alike, instead of leaving the others to wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import gather_object

from lpl.errors import StopRequestedError, UserError

T = TypeVar("T")


def together(act: Callable[[], T]) -> T:
    """Calls act, which waits for no other process; returns when all processes have called this.

    Raises:
        UserError: in every process, where act raised one in any: the first's.
    """
    found: list[T] = []
    fault: UserError | None = None
    try:
        found.append(act())
    except UserError as error:
        fault = error
    told: list[str | None] = gather_object([None if fault is None else str(fault)])
    first = next((line for line in told if line is not None), None)
    if first is not None:
        raise UserError(first) from fault
    return found[0]


def stop_together(is_late: Callable[[], bool], message: str) -> None:
    """Processes' clocks differ; every process must call this.

    Raises:
        StopRequestedError: in every process, where it is late in any.
    """
    if any(gather_object([is_late()])):
        raise StopRequestedError(message)
