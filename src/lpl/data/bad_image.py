"""The error of an image file that gives no pixels."""


class BadImageError(Exception):
    """An image file that gives no pixels.

    Attributes:
        reason: why, in one line, without the file's name.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
