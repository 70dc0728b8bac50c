"""The logit-normal distribution of timesteps against draws and against an independent distribution function."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from lpl.diffusion.draws import keyed_generator, timestep_probabilities
from lpl.perceptual.gate import Gate


def normal(x):
    return (1 + math.erf(x / 2**0.5)) / 2


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.6), (1.5, 2.0)])
def test_probabilities_by_the_distribution_function(mean, std):
    p = timestep_probabilities(10, distribution="logit_normal", logit_mean=mean, logit_std=std)
    edges = [0.0, *(normal((math.log(i / (10 - i)) - mean) / std) for i in range(1, 10)), 1.0]
    assert p.tolist() == pytest.approx([b - a for a, b in pairwise(edges)], rel=1e-9)
    assert p.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.6)])
def test_probabilities_are_those_of_squashed_normal_draws(mean, std):
    """Chi-square over ten bins of 20000 draws: 27.9 at one in a thousand, 9 degrees of freedom."""
    n = torch.randn(20000, generator=keyed_generator(1), dtype=torch.float64) * std + mean
    t = (torch.sigmoid(n) * 1000).long()
    p = timestep_probabilities(1000, distribution="logit_normal", logit_mean=mean, logit_std=std)
    expected, found = 20000 * p.view(10, 100).sum(1), torch.bincount(t // 100, minlength=10)
    assert ((found - expected).square() / expected.clamp_min(1)).sum() < 27.9


def test_gate_probability_is_exact():
    """P(t < 200) of a logit-normal of mean -0.5 and deviation 0.8: F((logit(0.2) + 0.5) / 0.8)."""
    p = timestep_probabilities(1000, distribution="logit_normal", logit_mean=-0.5, logit_std=0.8)
    assert Gate(DDPMScheduler(), 200).probability(p) == pytest.approx(normal((math.log(0.25) + 0.5) / 0.8), rel=1e-12)


def test_tails_keep_their_digits_and_are_symmetric():
    p = timestep_probabilities(1000, distribution="logit_normal", logit_std=0.4)
    assert (p > 0).all()
    torch.testing.assert_close(p, p.flip(0), rtol=1e-9, atol=0)
    assert float(p[0]) == pytest.approx(math.erfc(math.log(999) / 0.4 / 2**0.5) / 2, rel=1e-9)


def test_bias_multiplies_the_distribution():
    options = {"distribution": "logit_normal", "logit_mean": -1.0}
    plain = timestep_probabilities(8, **options)
    biased = timestep_probabilities(8, "range", 5.0, begin=1, end=3, **options)
    weights = plain * torch.tensor([1, 5, 5, 1, 1, 1, 1, 1])
    torch.testing.assert_close(biased, weights / weights.sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"distribution": "cubic"}, "'cubic'"), ({"distribution": "logit_normal", "logit_std": 0.0}, "logit_std")],
)
def test_impossible_distribution_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timestep_probabilities(8, **options)
