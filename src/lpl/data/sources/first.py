"""--max_train_samples for sources whose shards do not say how many samples they hold."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from lpl.data.sources.base import Piece, Sample, digest


class FirstSamples:
    """The first samples of several pieces, as one piece: where the cut lies is known only once they have been read.

    Pieces behind the cut are never opened. The stamp covers all pieces.

    Args:
        pieces: in order.
        count: how many samples at most.
    """

    size = None

    def __init__(self, pieces: Sequence[Piece], count: int) -> None:
        self._pieces, self._count = pieces, count
        self.key = f"first {count}"
        self.stamp = digest(*(part for piece in pieces for part in (piece.key, piece.stamp)))

    def samples(self) -> Generator[Sample, None, None]:
        """See Piece."""
        left = self._count
        for piece in self._pieces:
            samples = piece.samples()
            try:
                for sample in samples:
                    yield sample
                    left -= 1
                    if left == 0:
                        return
            finally:
                if isinstance(samples, Generator):
                    samples.close()


def cut(pieces: Sequence[Piece], count: int | None) -> Sequence[Piece]:
    """The pieces themselves, or one piece with their first `count` samples."""
    return pieces if count is None else [FirstSamples(pieces, count)]
