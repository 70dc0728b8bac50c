"""Which taps are compared, what each weighs, and the decoder's segments from one of them to the next."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real

from torch import Tensor

from lpl.perceptual.convolution import Operation
from lpl.perceptual.decoders import Tap
from lpl.perceptual.frozen import Identity
from lpl.perceptual.sweep import Segment

logger = logging.getLogger("lpl.perceptual.loss")

NUM_BLOCKS = 4
"""Up blocks compared by default."""


def chosen_taps(every: Sequence[Tap], num_blocks: int | None, names: Sequence[str] | None, own: bool) -> list[int]:
    """Numbers of the compared taps, first to last.

    Args:
        every: the decoder's taps.
        num_blocks: how many after the first one; None: NUM_BLOCKS, or all of a caller's own decoder.
        names: names of the compared taps, instead of num_blocks.
        own: the decoder is the caller's own.

    Raises:
        ValueError: both num_blocks and names are given, or a name is unknown or given twice.
    """
    known = [tap.name for tap in every]
    if names is None:
        if num_blocks is None:
            return list(range(len(every)))[: None if own else NUM_BLOCKS + 1]
        if num_blocks > len(every) - 1:
            logger.warning("num_blocks %d: this decoder has %d up blocks, all tapped", num_blocks, len(every) - 1)
        return list(range(len(every)))[: num_blocks + 1]
    if num_blocks is not None:
        raise ValueError(f"num_blocks {num_blocks} and taps {list(names)}: pass one of them")
    listed = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else []
    if not listed or any(name not in known for name in listed) or len(set(listed)) < len(listed):
        raise ValueError(f"taps {names!r}: name one or more of {', '.join(known)}, each once")
    return sorted(map(known.index, listed))


def layer_weights_of(
    every: Sequence[Tap],
    compared: Sequence[Tap],
    pow_law: bool,
    given: Sequence[float] | Mapping[str, float] | None,
) -> list[float]:
    """The weight of each compared tap; empty where the maps' sizes must be known first.

    Args:
        every, compared: the decoder's taps, and those that are compared.
        pow_law: weights by resolution, stride / stride of the decoder's first tap; off: 1.
        given: weights to use instead, in order or by name.

    Raises:
        ValueError: given has not one weight for each compared tap, negative or infinite ones, or only zeros.
    """
    if given is not None:
        names = [tap.name for tap in compared]
        if isinstance(given, Mapping):
            if set(given) != set(names):
                raise ValueError(f"layer_weights of {', '.join(given)}: pass one for each of {', '.join(names)}")
            given = [given[name] for name in names]
        listed = list(given) if isinstance(given, Iterable) else []
        weights = [float(w) if isinstance(w, Real | Tensor) else math.nan for w in listed]
        if len(weights) != len(names) or not all(0 <= w < math.inf for w in weights) or not any(weights):
            raise ValueError(f"layer_weights {given!r}: pass {len(names)} numbers of 0 or more, for {', '.join(names)}")
        return weights
    if not pow_law:
        return [1.0] * len(compared)
    if not all(tap.stride for tap in every):
        return []
    return [tap.stride / every[0].stride for tap in compared]


def merged(segments: Sequence[Segment], chosen: Sequence[int]) -> list[Segment]:
    """The segments between chosen taps: segments of the taps in between are joined.

    Args:
        segments: one more than the decoder has taps.
        chosen: numbers of the taps, rising.
    """
    out = []
    first = 0
    for last in chosen:
        out.append(Segment(segments[first].head, _operations(segments[first : last + 1])))
        first = last + 1
    return [*out, Segment(segments[first].head, segments[first].operations)]


def _operations(segments: Sequence[Segment]) -> list[Operation]:
    """All operations of consecutive segments behind the first one's head; heads that change nothing are left out."""
    found = list(segments[0].operations)
    for segment in segments[1:]:
        found += [*([] if isinstance(segment.head, Identity) else [segment.head]), *segment.operations]
    return found
