"""What every group of options is checked and marked with."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from lpl.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)


def free(default: Any) -> Any:
    """A field that changes the trajectory of a run by float rounding at most: a run may be continued with another."""
    return field(default=default, metadata={"free": True})
