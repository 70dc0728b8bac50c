"""Decoding of image files."""

from __future__ import annotations


class BadImageError(Exception):
    """An image that cannot be used.

    Attributes:
        reason: what is wrong with it, in one line, without the image's name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
