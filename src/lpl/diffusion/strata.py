"""Stratified timesteps: which part of the timesteps' distribution each position of a global batch draws from.

The distribution is cut into G strata of equal probability, G the samples of an optimizer step, and each position takes
another one. Where the samples that pass LPL's gate are the least noisy ones, or the noisiest, they are the lowest (or
highest) strata, so their number in a step is p_gate * G, rounded up or down. How they lie in the batch decides who
decodes: a process's share of a micro-batch, and of a step, is {i : floor(i / b) mod P = p} for some b and P. The
assignment is balanced for all b and P with b P | G at once, since how a batch is split must not change the run.
"""

from functools import lru_cache

import numpy as np

from lpl.diffusion.draws import keyed_seed


@lru_cache(maxsize=4)
def balanced_order(size: int) -> tuple[int, ...]:
    """Positions 0..size - 1 in such an order that the first k, and the last k, lie evenly in every split, for every k.

    A share is {i : floor(i / b) mod P = p}, b P | size. Of the first k, two shares of a split differ by one at most
    where size is a prime or a power of two (tested to 1024). For other sizes no order need do that for all splits
    at once (for 6 none does), and they differ by a few: by 2 at most to size 28, by 4 to 192.

    Each position is the one that keeps the sum over shares of max(0, taken - k / P)^2 least, the lowest of several; in
    integers, so that every machine finds the same. Found once a run, in 2 seconds for 2048, in 15 for 4096.

    Args:
        size: G, at least 1.
    """
    splits = [
        (block, parts)
        for block in range(1, size + 1)
        if size % block == 0
        for parts in range(2, size // block + 1)
        if size // block % parts == 0
    ]
    positions = np.arange(size)
    share = np.array([positions // block % parts for block, parts in splits], dtype=np.int32).reshape(-1, size)
    fair = np.array([size // parts for _, parts in splits], dtype=np.int64)[:, None]
    taken = np.zeros(share.shape, dtype=np.int64)  # of the share that each position lies in
    free = np.ones(size, dtype=bool)
    order: list[int] = []
    for k in range(1, size + 1):
        lead = np.maximum((taken + 1) * size - k * fair, 0)
        cost = np.square(lead).sum(0)
        cost[~free] = np.iinfo(np.int64).max
        chosen = int(cost.argmin())
        free[chosen] = False
        taken += share == share[:, chosen : chosen + 1]
        order.append(chosen)
    return tuple(order)


@lru_cache(maxsize=4)
def strata(size: int, seed: int, step: int) -> tuple[int, ...]:
    """The stratum of each position of a step's global batch, a permutation of 0..size - 1, keyed by (seed, step).

    Source: stratified sampling; the order is this package's own. Each step turns it by a map that takes the shares of
    every split to each other: i -> i XOR x with a random x where size is a power of two, which makes every stratum of a
    position equally likely; else i -> size - 1 - i at random. Strata are counted from the top at random, too.

    Args:
        size: G, samples of an optimizer step over all processes and micro-batches.
        seed: of the run.
        step: optimizer step.
    """
    key = keyed_seed(seed, "stratum", step)
    downwards, turn = key & 1, key >> 1
    power_of_two = size & (size - 1) == 0
    mask, mirrored = (turn % size, False) if power_of_two else (0, bool(turn & 1))
    of_position = [0] * size
    for rank, position in enumerate(balanced_order(size)):
        place = size - 1 - position if mirrored else position ^ mask
        of_position[place] = size - 1 - rank if downwards else rank
    return tuple(of_position)
