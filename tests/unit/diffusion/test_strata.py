"""Stratified timesteps: every step its share of gated samples, every process and micro-batch its share of those."""

import itertools
import math

import numpy as np
import pytest
import torch

from lpl.data.sampler import share
from lpl.diffusion.draws import balanced_order, keyed_quantile, strata, timestep_probabilities
from lpl.diffusion.schedule import Discrete


def timestep(p, quantile):
    """The timestep at a quantile of probabilities (T,)."""
    return int(Discrete(p, p, "epsilon", p).levels([quantile]))


def splits(size):
    """(batch size, accumulation, processes) of all ways to split a global batch."""
    return [
        (batch, size // batch // processes, processes)
        for batch in range(1, size + 1)
        if size % batch == 0
        for processes in range(1, size // batch + 1)
        if size // batch % processes == 0
    ]


def worst(order):
    """Largest difference, over splits and k, of the first k's numbers between processes, and between micro-batches."""
    size, found = len(order), 0
    for batch, _, processes in splits(size):
        for parts in (processes, size // batch):
            counts = np.cumsum((np.array(order) // batch % parts)[:, None] == np.arange(parts), 0)
            found = max(found, int((counts.max(1) - counts.min(1)).max()))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 13, 16, 32, 64, 128, 256])
def test_first_k_positions_lie_evenly_in_every_split(size):
    """Primes and powers of two: processes, and their micro-batches, differ by one at most for every k."""
    order = balanced_order(size)
    assert sorted(order) == list(range(size))
    assert worst(order) <= 1


def test_large_powers_of_two_are_even_too():
    order = np.array(balanced_order(1024))
    for block in (1, 4, 16, 64, 256):
        for parts in (2, 4, 64):
            if block * parts <= 1024:
                counts = np.cumsum((order // block % parts)[:, None] == np.arange(parts), 0)
                assert (counts.max(1) - counts.min(1)).max() == 1


@pytest.mark.parametrize(
    ("sizes", "most"), [((6, 9, 10, 12, 15, 18, 20, 24, 28), 2), ((30, 36, 40, 48, 60, 72, 80, 96, 192), 4)]
)
def test_other_sizes_are_nearly_even(sizes, most):
    assert max(worst(balanced_order(size)) for size in sizes) <= most


def test_no_order_of_six_is_even_in_every_split():
    """So the two of other sizes are no fault of the search."""
    assert min(map(worst, itertools.permutations(range(6)))) == 2


@pytest.mark.parametrize("size", [1, 2, 6, 8, 12, 64])
def test_strata_are_a_permutation_keyed_by_seed_and_step(size):
    tables = [strata(size, 0, step) for step in range(40)]
    assert all(sorted(table) == list(range(size)) for table in tables)
    assert tables[3] == strata(size, 0, 3)
    if size > 2:
        assert len(set(tables)) > 1
        assert tables != [strata(size, 1, step) for step in range(40)]


def test_every_stratum_of_a_position_is_equally_likely():
    """Powers of two: chi-square with 7 degrees of freedom over 4000 steps, 24.3 at one in a thousand."""
    tables = np.array([strata(8, 0, step) for step in range(4000)])
    for position in range(8):
        counts = np.bincount(tables[:, position], minlength=8)
        assert ((counts - 500) ** 2 / 500).sum() < 24.3


@pytest.mark.parametrize("p_gate", [0.2, 0.25, 0.01, 0.674, 1.0])
@pytest.mark.parametrize("size", [8, 12, 64])
def test_every_step_has_its_share_of_gated_samples(size, p_gate):
    """t < threshold for floor or ceil of p_gate * G samples of every step, and for p_gate of all of them."""
    p = timestep_probabilities(1000)
    threshold = round(1000 * p_gate)
    counts = []
    for step in range(150):
        numbers = strata(size, 5, step)
        t = [timestep(p, keyed_quantile(5, "t", i, step, stratum=n, strata=size)) for i, n in enumerate(numbers)]
        counts.append(sum(x < threshold for x in t))
    expected = size * p_gate
    assert set(counts) <= {math.floor(expected + 1e-9), math.ceil(expected - 1e-9)}
    error = 4 * (expected % 1 * (1 - expected % 1) / 150) ** 0.5
    assert np.mean(counts) == pytest.approx(expected, abs=error + 1e-9)


@pytest.mark.parametrize("size", [8, 16, 64])
@pytest.mark.parametrize("gate", ["low", "high"])
def test_processes_and_micro_batches_have_equal_shares_of_gated_samples(size, gate):
    """By the trainer's own split: 1x8, 2x4, 8x1 and every other."""
    for step in range(20):
        numbers = strata(size, 0, step)
        for gated in range(size + 1):
            open_ = [(n < gated) if gate == "low" else (n >= size - gated) for n in numbers]
            for batch, accumulation, processes in splits(size):
                shares = [
                    [sum(share(open_, m, p, batch, accumulation, processes)) for m in range(accumulation)]
                    for p in range(processes)
                ]
                assert np.ptp(shares) <= 1
                assert np.ptp(np.sum(shares, 1)) <= 1


@pytest.mark.parametrize(
    ("stratum", "uniform", "expected"), [(0, 0.0, 0), (0, 0.999, 2), (1, 0.0, 2), (1, 0.999, 4), (3, 0.999, 9)]
)
def test_stratum_is_a_part_of_equal_probability(monkeypatch, stratum, uniform, expected):
    """Ten timesteps in four parts: the first is t = 0, 1 and half of 2."""
    monkeypatch.setattr("lpl.diffusion.draws.keyed_uniform", lambda *key: uniform)
    p = torch.full((10,), 0.1, dtype=torch.float64)
    assert timestep(p, keyed_quantile(0, stratum=stratum, strata=4)) == expected
