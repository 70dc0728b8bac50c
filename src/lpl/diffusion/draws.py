"""Random draws keyed by what they are for, not by where they happen.

A draw is a function of (seed, stream, sample id, how often that sample has been drawn), made on the CPU in
float32. Process, worker, batch position, device and LPL itself do not enter, so runs that differ in those see the
same crops, noise and timesteps, and a resumed run needs no random state.
"""

import hashlib

import torch
from torch import Tensor


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
    """Puts what draw_normal gives for a key into a contiguous float32 tensor on the CPU."""
    target.normal_(generator=keyed_generator(*key))


def draw_timestep(probabilities: Tensor, *key: int | str, stratum: int = 0, strata: int = 1) -> int:
    """A timestep from probabilities (T,), float64, that sum to 1, by inversion of their cumulative sum.

    Args:
        probabilities: of each timestep.
        key: of the draw.
        stratum, strata: draw from part number `stratum` of `strata` parts of equal probability, the lowest first.
    """
    cumulative = probabilities.cumsum(0)
    point = torch.tensor([(stratum + keyed_uniform(*key)) / strata], dtype=torch.float64) * cumulative[-1]
    return min(int(torch.searchsorted(cumulative, point, right=True)), len(probabilities) - 1)


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
        logit_mean: of logit_normal; above 0 draws more noise.
        logit_std: of logit_normal, above 0.

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
    # Of the upper tail take the complement: a difference of two numbers near 1 has few digits.
    return torch.where(low > 0, _tail(low) - _tail(high), _tail(-high) - _tail(-low))


def _tail(x: Tensor) -> Tensor:
    """The probability that a standard normal number is above x; torch.special.ndtr rounds small ones to 0."""
    return torch.erfc(x / 2**0.5) / 2
