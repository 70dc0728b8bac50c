"""Schedules against independent formulas: levels by quantile, shifts, and the probability of a gate."""

import math
from statistics import NormalDist

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from lpl.diffusion.draws import timestep_probabilities
from lpl.diffusion.schedule import MODE_SCALES, Distribution, Flow, schedule_of
from lpl.perceptual.gate import Gate

NORMAL = NormalDist()
QUANTILES = [0.0, 0.01, 0.3, 0.5, 0.77, 0.999]


def shifted(u, s):
    return s * u / (1 + (s - 1) * u)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 0.6), (1.2, 1.5)])
def test_logit_normal_levels_and_gate(mean, std, shift):
    """The level at p, and the probability of sigma <= 0.75: that of u = 0.75 / (s - (s - 1) 0.75)."""
    flow = Flow().drawing(Distribution("logit_normal", mean, std, shift=shift))
    u = [0.0, *(1 / (1 + math.exp(-(mean + std * NORMAL.inv_cdf(p)))) for p in QUANTILES[1:])]
    assert flow.levels(QUANTILES).tolist() == pytest.approx([shifted(x, shift) for x in u], rel=1e-12)
    last = 0.75 / (shift - (shift - 1) * 0.75)
    expected = NORMAL.cdf((math.log(last / (1 - last)) - mean) / std)
    assert Gate(flow).probability(None) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("shift", "below_200", "default"), [(1.0, 0.0828, 0.864), (3.0, 0.0065, 0.5)])
def test_share_that_passes_of_a_logit_normal(shift, below_200, default):
    """And so do as many of a hundred thousand stratified draws."""
    flow = Flow().drawing(Distribution("logit_normal", shift=shift))
    drawn = flow.levels([(n + 0.5) / 10**5 for n in range(10**5)])
    for gate, expected in ((Gate(flow, 200), below_200), (Gate(flow), default)):
        assert gate.probability(None) == pytest.approx(expected, abs=1e-4)
        assert float(gate.opens(drawn).double().mean()) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("scale", [-0.9, 0.0, 1.29, MODE_SCALES[1]])
def test_mode_is_that_of_diffusers(scale):
    """Whose u falls with its random number, where levels rise with the quantile."""
    flow = Flow().drawing(Distribution("mode", mode_scale=scale))
    levels = flow.levels([n / 1000 for n in range(1001)])
    assert (levels.diff() > 0).all()
    generator = torch.Generator().manual_seed(0)
    theirs = compute_density_for_timestep_sampling("mode", 8, mode_scale=scale, generator=generator)
    uniform = torch.rand(8, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(flow.levels((1 - uniform).tolist()), theirs.double(), atol=1e-6, rtol=0)


def test_shift_by_resolution_is_flux_line():
    """exp(0.5) at 256 tokens of 2 x 2 cells, exp(1.15) at 4096."""
    for tokens, mu in ((256, 0.5), (4096, 1.15)):
        flow = Flow().drawing(Distribution(shift="resolution", cells=4 * tokens))
        level = float(flow.levels([0.3]))
        assert level == float(Flow().drawing(Distribution(shift="resolution")).levels([0.3], cells=4 * tokens))
        assert level == pytest.approx(shifted(0.3, math.exp(mu)), rel=1e-12)
        assert flow.probability(lambda t, alpha, sigma, at=level: sigma <= at) == pytest.approx(0.3)


@pytest.mark.parametrize("distribution", [Distribution("logit_normal", 0.3, shift=2.0), Distribution("mode")])
def test_density_sums_to_one(distribution):
    flow = Flow().drawing(distribution)
    t = (torch.arange(1000, dtype=torch.float64) + 0.5).tolist()
    assert float(flow.density(flow.at(t)).sum()) == pytest.approx(1, abs=1e-3)


def test_discrete_levels_are_timesteps_and_the_gate_is_a_sum():
    schedule = schedule_of(DDPMScheduler()).drawing(Distribution(bias=("later", 3.0, 0.25, 0, 1000)))
    weights = timestep_probabilities(1000, "later", 3.0)
    assert torch.equal(schedule.density(torch.arange(1000)), weights)
    levels = schedule.levels([0.0, 0.2501, 0.5001, 0.999999])
    assert levels.tolist() == [0, 375, 750, 999]  # of 1500 units, 750 lie below t = 750
    assert Gate(schedule, 200).probability(None) == pytest.approx(200 / 1500)
    assert schedule.at([0, 199.9]).tolist() == [0, 199]


def test_timesteps_of_a_flow():
    flow = schedule_of(FlowMatchEulerDiscreteScheduler())
    assert flow.at([0, 250, 1000]).tolist() == [0, 0.25, 1]
    assert flow.timesteps(flow.at([0, 250, 1000])).tolist() == [0, 250, 1000]


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (Distribution("cubic"), "'cubic'"),
        (Distribution("logit_normal", logit_std=0.0), "logit_std"),
        (Distribution("mode", mode_scale=2.0), "mode_scale"),
        (Distribution(shift=0.0), "shift"),
        (Distribution(bias=("later", 2.0, 0.25, 0, 1000)), "bias later is for a discrete"),
    ],
)
def test_impossible_distribution_of_a_flow_is_refused(distribution, message):
    with pytest.raises(ValueError, match=message):
        Flow().drawing(distribution)


def test_a_shift_of_a_discrete_schedule_is_refused():
    with pytest.raises(ValueError, match="for flow matching"):
        schedule_of(DDPMScheduler()).drawing(Distribution(shift=3.0))
