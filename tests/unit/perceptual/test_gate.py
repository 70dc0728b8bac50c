import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from lpl.diffusion.draws import timestep_probabilities
from lpl.diffusion.prediction import alpha_sigma_table, signal_to_noise
from lpl.perceptual.gate import Gate, snr_scale


@pytest.fixture(scope="module")
def flow_scheduler():
    return FlowMatchEulerDiscreteScheduler()


def passed(gate, scheduler):
    """The timesteps that pass, as a bool table (T,)."""
    t = torch.arange(gate.num_timesteps)
    return gate.passes(t, *(table[t] for table in alpha_sigma_table(scheduler)))


@pytest.mark.parametrize(("sigma", "first_closed"), [(0.57, 200), (3.0, 674), (None, 674)])
def test_sigma_on_the_sdxl_schedule(sdxl_scheduler, sigma, first_closed):
    """None: the default is 3."""
    open_ = passed(Gate(sdxl_scheduler, sigma_threshold=sigma), sdxl_scheduler)
    assert torch.equal(open_, torch.arange(1000) < first_closed)


def test_snr_says_the_same_as_sigma(sdxl_scheduler):
    by_snr = passed(Gate(sdxl_scheduler, snr_threshold=1 / 0.57**2), sdxl_scheduler)
    assert torch.equal(by_snr, passed(Gate(sdxl_scheduler, sigma_threshold=0.57), sdxl_scheduler))


@pytest.mark.parametrize("statement", [{"t_threshold": 200}, {"snr_threshold": 16.0}, {"sigma_threshold": 0.25}])
def test_flow_below_200_is_snr_above_16(flow_scheduler, statement):
    s = torch.tensor([0.0, 0.01, 0.1999, 0.2001, 0.5, 1.0], dtype=torch.float64)
    assert torch.equal(signal_to_noise(1 - s, s) > 16, s < 0.2)
    opened = Gate(flow_scheduler, **statement).passes(torch.zeros(6), 1 - s, s)
    assert opened.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    "gates",
    [
        {"t_threshold": 200, "snr_threshold": 3.0},
        {"snr_threshold": 3.0, "sigma_threshold": 0.6},
        {"t_threshold": 200, "sigma_threshold": 0.6},
    ],
)
def test_contradictory_gates_are_refused(sdxl_scheduler, gates):
    with pytest.raises(ValueError, match="contradictory gates"):
        Gate(sdxl_scheduler, **gates)


@pytest.mark.parametrize("threshold", [-1, 0, 1001])
def test_timestep_threshold_outside_the_schedule_is_refused(sdxl_scheduler, flow_scheduler, threshold):
    for scheduler in (sdxl_scheduler, flow_scheduler):
        with pytest.raises(ValueError, match=r"lpl_t_threshold .* outside the schedule"):
            Gate(scheduler, t_threshold=threshold)


@pytest.mark.parametrize("statement", [{"snr_threshold": 1e9}, {"sigma_threshold": 1e-4}])
def test_gate_that_nothing_passes_is_refused(sdxl_scheduler, statement):
    with pytest.raises(ValueError, match="no timestep of the schedule passes"):
        Gate(sdxl_scheduler, **statement)


def test_default_gate_of_a_flow_passes_samples_whatever_the_shift(flow_scheduler):
    """Of sigma = s u / (1 + (s - 1) u), u uniform or logit-normal, as the docstring says."""
    gate, normal = Gate(flow_scheduler), torch.distributions.Normal(0.0, 1.0)
    assert gate.probability(None) == pytest.approx(0.75)
    u = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
    for draws, passed_at in ((u, (0.75, 0.5)), (normal.icdf(u).sigmoid(), (0.864, 0.5))):
        for shift, expected in zip((1.0, 3.0), passed_at, strict=True):
            sigma = shift * draws / (1 + (shift - 1) * draws)
            assert float(gate.passes(None, 1 - sigma, sigma).double().mean()) == pytest.approx(expected, abs=2e-3)


def test_default_gate_of_a_short_schedule():
    assert Gate(DDPMScheduler(num_train_timesteps=50)).probability(None) == 1


def test_probability_under_uniform_timesteps(sdxl_scheduler, flow_scheduler):
    assert Gate(sdxl_scheduler).probability(None) == pytest.approx(0.674)
    assert Gate(sdxl_scheduler, t_threshold=200).probability(None) == pytest.approx(0.2)
    assert Gate(flow_scheduler, t_threshold=200).probability(None) == pytest.approx(0.2)
    assert Gate(flow_scheduler, snr_threshold=1.0).probability(None) == pytest.approx(0.5, abs=1e-4)


def test_probability_under_weighted_timesteps(sdxl_scheduler):
    """Below 250 three times as likely: 200 * 3 of 250 * 3 + 750."""
    weights = timestep_probabilities(1000, "earlier", multiplier=3.0, portion=0.25)
    gate = Gate(sdxl_scheduler, t_threshold=200)
    assert [gate.probability(weights), gate.probability(7 * weights)] == pytest.approx([600 / 1500] * 2)


def test_probability_as_a_number(sdxl_scheduler, flow_scheduler):
    assert Gate(sdxl_scheduler).probability(0.35) == 0.35
    assert Gate(flow_scheduler).probability(0.35) == 0.35


@pytest.mark.parametrize("p_gate", [0.0, -0.1, 1.1, float("nan")])
def test_impossible_probability_is_refused(sdxl_scheduler, p_gate):
    with pytest.raises(ValueError, match="p_gate"):
        Gate(sdxl_scheduler).probability(p_gate)


def test_weights_that_do_not_fit_are_refused(sdxl_scheduler, flow_scheduler):
    with pytest.raises(ValueError, match="one per timestep"):
        Gate(sdxl_scheduler).probability(torch.ones(999))
    with pytest.raises(ValueError, match="one per timestep"):
        Gate(flow_scheduler).probability(torch.ones(1000))


def test_weights_that_never_pass_are_refused(sdxl_scheduler):
    weights = timestep_probabilities(1000, "earlier", multiplier=0.0, portion=0.25)
    with pytest.raises(ValueError, match="no timestep that is drawn passes the gate t < 200"):
        Gate(sdxl_scheduler, t_threshold=200).probability(weights)


def test_scale_by_snr():
    """min(1, g / SNR); without snr_gamma g is 5 (and not: no scale)."""
    snr = torch.tensor([1.0, 4.0, 5.0, 10.0, 50.0, float("inf")])
    torch.testing.assert_close(snr_scale(snr, None), torch.tensor([1.0, 1.0, 1.0, 0.5, 0.1, 0.0]))
    torch.testing.assert_close(snr_scale(snr, 2.0), torch.tensor([1.0, 0.5, 0.4, 0.2, 0.04, 0.0]))
