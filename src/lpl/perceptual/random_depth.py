"""How likely each tap of a decoder is to be reached, where calls stop at a random depth (the loss's random_depth)."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from lpl.base.arguments import is_number

REACH = (1.0, 1.0, 0.4, 0.3, 0.25)
"""For the taps of SDXL's decoder (middle block and four up blocks), from benchmarks/random_depth.py."""


def reach_probabilities(taps: int, given: bool | Sequence[float]) -> tuple[float, ...] | None:
    """The probability of reaching each tap, or None without random depth.

    Args:
        taps: how many there are.
        given: False; True for REACH (a decoder with more taps keeps its last value); or the probabilities.

    Raises:
        ValueError: given is none of these, or has not one probability per tap, does not start at 1, rises, or reaches
            0.
    """
    if given is False:
        return None
    if given is True:
        return tuple(REACH[min(i, len(REACH) - 1)] for i in range(taps))
    listed = list(given) if isinstance(given, Iterable) else []
    if not listed or not all(map(is_number, listed)):
        raise ValueError(f"random_depth must be True, False or {taps} probabilities, one per tap, not {given!r}")
    reach = tuple(map(float, listed))
    falls = all(a >= b > 0 for a, b in pairwise(reach))
    if len(reach) != taps or reach[0] != 1 or not falls:
        raise ValueError(f"random_depth needs {taps} probabilities, one per tap, falling from 1 and above 0: {reach}")
    return reach


def depth_of(draw: float, reach: Sequence[float]) -> int:
    """How many taps are compared, for a draw that is uniform in [0, 1)."""
    return sum(draw < p for p in reach)
