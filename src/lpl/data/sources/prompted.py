"""--instance_prompt for sources whose captions are known only once a piece is read."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from lpl.data.sources.base import Piece, Sample, digest


class Prompted:
    """A piece in which images without a caption have the instance prompt.

    That is in the piece's stamp, so that another prompt reads the captions anew; it is not in those of the samples, so
    that no image is opened again for it.

    Args:
        piece: yields the prompt where there is no caption.
        prompt: the instance prompt.
    """

    def __init__(self, piece: Piece, prompt: str) -> None:
        self._piece = piece
        self.key, self.size = piece.key, piece.size
        self.stamp = digest(piece.stamp, prompt)

    def samples(self) -> Generator[Sample, None, None]:
        """See Piece."""
        return self._piece.samples()


def with_prompt(pieces: Sequence[Piece], prompt: str | None) -> Sequence[Piece]:
    """The pieces themselves, or such pieces of them."""
    return pieces if prompt is None else [Prompted(piece, prompt) for piece in pieces]
