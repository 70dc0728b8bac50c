"""The errors of an image file that gives no pixels."""


class BadImageError(Exception):
    """An image file that gives no pixels.

    Attributes:
        reason: why, in one line, without the file's name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnreadImageError(BadImageError):
    """A file that could not be read, or not here: no property of it, so the next run tries again."""
