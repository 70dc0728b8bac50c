"""Random draws keyed by what they are for, not by where they happen.

A draw is a function of (seed, stream, sample id, how often that sample has been drawn), made on the CPU in
float32. It does not depend on process, worker, batch position, device or LPL itself, so runs that differ in those see
the same crops, noise and timesteps, and a resumed run needs no random state.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a key, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator for a key such as (seed, "noise", sample_id, count)."""
    return torch.Generator("cpu").manual_seed(keyed_seed(*key))


def keyed_uniform(*key: int | str) -> float:
    """One number in [0, 1) for a key."""
    return (keyed_seed(*key) >> 10) / 2**53


def draw_normal(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """Standard normal float32 of a shape for a key."""
    return torch.randn(shape, generator=keyed_generator(*key), dtype=torch.float32)


def fill_normal(target: Tensor, *key: int | str) -> None:
    """Fills a contiguous float32 tensor on the CPU with what draw_normal gives for a key."""
    target.normal_(generator=keyed_generator(*key))


def keyed_quantile(*key: int | str, stratum: int = 0, strata: int = 1) -> float:
    """One number in [0, 1) for a key, from part number `stratum` of `strata` equal parts, the lowest first."""
    return (stratum + keyed_uniform(*key)) / strata


def timestep_probabilities(
    num_timesteps: int,
    strategy: str = "none",
    multiplier: float = 1.0,
    portion: float = 0.25,
    begin: int = 0,
    end: int = 1000,
    distribution: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Tensor:
    """How likely each timestep is, (T,), float64, summing to 1: distribution times bias, renormalised.

    logit_normal: t = floor(T / (1 + exp(-n))), n normal of logit_mean and logit_std; with F the normal distribution
    function, P(t) = F((logit((t + 1) / T) - mean) / std) - F((logit(t / T) - mean) / std), exactly.

    Source: Esser et al. 2024 (arXiv 2403.03206), section 3.1. Differs from the paper: over t / T of a discrete
    schedule, not the time of a flow.

    Args:
        num_timesteps: length T of the schedule.
        strategy: none, earlier (the first `portion` of the schedule), later (the last), range (begin..end-1).
        multiplier: how much more likely the favoured timesteps are.
        portion: share of the schedule that earlier and later favour.
        begin: first favoured timestep of range.
        end: timestep before which range ends.
        distribution: uniform or logit_normal.
        logit_mean: mean of logit_normal; above 0 draws more noise.
        logit_std: standard deviation of logit_normal, above 0.

    Raises:
        ValueError: an unknown strategy or distribution, a negative multiplier, a range outside the schedule, a
            logit_std that is not positive, or nothing left to draw.
    """
    if multiplier < 0:
        raise ValueError(f"the timestep bias multiplier must be 0 or more, not {multiplier}")
    if distribution == "uniform":
        weights = torch.ones(num_timesteps, dtype=torch.float64)
    elif distribution == "logit_normal":
        weights = _logit_normal(num_timesteps, logit_mean, logit_std)
    else:
        raise ValueError(f"unknown timestep distribution {distribution!r}")
    count = int(portion * num_timesteps)
    if strategy == "earlier":
        weights[:count] *= multiplier
    elif strategy == "later":
        weights[num_timesteps - count :] *= multiplier
    elif strategy == "range":
        if not 0 <= begin < end <= num_timesteps:
            raise ValueError(f"timestep range {begin}..{end} lies outside the schedule's 0..{num_timesteps}")
        weights[begin:end] *= multiplier
    elif strategy != "none":
        raise ValueError(f"unknown timestep strategy {strategy!r}")
    if not weights.sum() > 0:
        raise ValueError("the timestep bias leaves no timestep to draw")
    return weights / weights.sum()


def _logit_normal(num_timesteps: int, mean: float, std: float) -> Tensor:
    if not std > 0:
        raise ValueError(f"logit_std must be positive, not {std}")
    edges = (torch.logit(torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps) - mean) / std
    low, high = edges[:-1], edges[1:]
    # In the upper tail use the complement: a difference of two numbers near 1 has few digits.
    return torch.where(low > 0, _tail(low) - _tail(high), _tail(-high) - _tail(-low))


def _tail(x: Tensor) -> Tensor:
    """The probability that a standard normal number is above x; torch.special.ndtr rounds small ones to 0."""
    return torch.erfc(x / 2**0.5) / 2


BINS = 10
"""Parts of a schedule for which losses are reported."""


def bin_edges(num_timesteps: int, bins: int = BINS) -> list[int]:
    """Edges of equal parts of a schedule, at most one for each timestep: bin k holds edges[k] <= t < edges[k + 1]."""
    bins = min(bins, num_timesteps)
    return [num_timesteps * k // bins for k in range(bins + 1)]


@lru_cache(maxsize=4)
def balanced_order(size: int) -> tuple[int, ...]:
    """Positions 0..size - 1 in such an order that the first k, and the last k, lie evenly in every split, for every k.

    A share is {i : floor(i / b) mod P = p}, b P | size. Of the first k, two shares of a split get numbers that differ
    by one at most where size is a prime or a power of two (tested to 1024). For other sizes an order that does that for
    all splits at once need not exist (for 6 none does); there they differ by 2 at most up to size 28, by 4 up to 192.

    Each position is the one that keeps the sum over shares of max(0, taken - k / P)^2 least (the lowest in a tie),
    computed in integers, so that every machine finds the same. Computed once a run: 2 seconds for 2048, 15 for 4096.

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

    Source: stratified sampling; the order is this package's own. Each step permutes it by a map that takes shares of a
    split to shares: i -> i XOR x with a random x where size is a power of two, which makes every stratum of a position
    equally likely; else, at random, i -> size - 1 - i or nothing. Strata are also counted from the top at random.

    Args:
        size: G, samples of an optimizer step over all processes and micro-batches.
        seed: the run's seed.
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


def even_draws(size: int, *key: int | str) -> tuple[float, ...]:
    """A number in [0, 1) for each position of a step's global batch, each uniform: (k / size + v) mod 1.

    k is the position's rank in balanced_order, v one number for a key such as (seed, stream, step). Together they lie
    evenly in [0, 1), and so do those of every share of every split.

    Source: Cranley and Patterson, 1976 (a randomly shifted lattice).
    """
    turn = keyed_uniform(*key)
    found = [0.0] * size
    for rank, position in enumerate(balanced_order(size)):
        found[position] = (rank / size + turn) % 1.0
    return tuple(found)


def pyramid_noise(noise: Tensor, iterations: int, discount: float, *key: int | str) -> Tensor:
    """Adds `iterations` levels of coarser noise to one sample's white noise.

        n = noise + sum_i discount^i * upsample(normal(C, h / r_i^i, w / r_i^i))    r_i uniform in [2, 4), i = 0, 1, ...
        n / std(n)

    Levels end at the first one with a side of one cell. Level 0 has the full resolution, as kohya's does.

    Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training" (2023), as kohya-ss/sd-scripts'
    --multires_noise_iterations does it. Differs from kohya: the standard deviation is a sample's own, not the
    batch's, and draws are keyed, so the noise of a sample does not depend on the batch it is in.

    Args:
        noise: (C, h, w), standard normal, float32, on the CPU.
        iterations: levels at most.
        discount: factor from one level to the next, in (0, 1].
        key: key of the draws, such as (seed, "pyramid", sample_id, count).

    Returns:
        (C, h, w), float32, of standard deviation 1.
    """
    channels, height, width = noise.shape
    total = noise.clone()
    for level in range(iterations):
        ratio = (2 + 2 * keyed_uniform(*key, "ratio", level)) ** level
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn((1, channels, *size), generator=keyed_generator(*key, level), dtype=torch.float32)
        total += interpolate(coarse, (height, width), mode="bilinear")[0] * discount**level
        if min(size) == 1:
            break
    return total / total.std()
