"""An objective for whatever process and convention a loop has, without a diffusers scheduler."""

import logging
import math
import re

import pytest
import torch
from diffusers import DDPMScheduler

from lpl import Distribution, Gate, LatentPerceptualLoss, PerceptualObjective, edm, probability_of
from lpl.diffusion.own_process import OwnProcess
from lpl.diffusion.prediction import alpha_sigma_table, expand, output_sensitivity, target_of, x0_from_output
from lpl.diffusion.schedule import schedule_of

SIZE = 6


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cosine(t):
    """The variance-preserving process of Nichol & Dhariwal, continuous in t of 0..1."""
    return torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)


def edm_target(x0, noise, sigma, d=0.5):
    """What F is trained to be in EDM, as Karras et al. 2022 write it (equation 8)."""
    sigma = expand(sigma, x0)
    c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2).sqrt()
    return (x0 - c_skip * (x0 + sigma * noise)) / c_out


T = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.76, 0.9])
ALPHA, SIGMA = cosine(T)
ONES = torch.ones(SIZE)
VP, FLOW = {"alpha_sigma": cosine, "p_gate": 0.8}, {"noise_scheduler": None}
EACH = {"p_gate": 0.8}
"""Each call hands over its alphas and sigmas."""
GIVEN = {"alphas": ALPHA, "sigmas": SIGMA}
REVERSED = 1 - T
"""Time of a loop in which t = 1 is data."""
PROCESSES = {
    "epsilon": ("epsilon", VP, {"timesteps": T}, ALPHA, SIGMA, lambda x0, eps: eps),
    "epsilon, each call": ("epsilon", EACH, GIVEN, ALPHA, SIGMA, lambda x0, eps: eps),
    "v": ("v_prediction", VP, {"timesteps": T}, ALPHA, SIGMA,
          lambda x0, eps: expand(ALPHA, x0) * eps - expand(SIGMA, x0) * x0),
    "x0": ("sample", VP, {"timesteps": T}, ALPHA, SIGMA, lambda x0, eps: x0),
    "flow, v = eps - x0": ("flow", FLOW, {"sigmas": T}, 1 - T, T, lambda x0, eps: eps - x0),
    "flow, v = x0 - eps, reversed": ("flow_to_data", FLOW, {"sigmas": 1 - REVERSED}, 1 - T, T,
                                     lambda x0, eps: x0 - eps),
    "flow, x-prediction": ("sample", FLOW, {"sigmas": T}, 1 - T, T, lambda x0, eps: x0),
    "EDM": (edm(), EACH, {"alphas": ONES, "sigmas": 5 * T}, ONES, 5 * T, lambda x0, eps: edm_target(x0, eps, 5 * T)),
    "EDM by a function": (edm(1.5), {"alpha_sigma": lambda s: (torch.ones_like(s), s), "p_gate": 0.8},
                          {"timesteps": 5 * T}, ONES, 5 * T, lambda x0, eps: edm_target(x0, eps, 5 * T, 1.5)),
    "a convention of one's own": (lambda a, s: (1 / a, -2 * s / a), VP, {"timesteps": T}, ALPHA, SIGMA,
                                  lambda x0, eps: eps / 2),
}  # fmt: skip


def batch(name, space=(8, 8), error=0.0):
    """An objective's options and a call's arguments."""
    kind, options, levels, alpha, sigma, target = PROCESSES[name]
    latents, noise, wrong = randn(3, SIZE, 4, *space)
    noisy = expand(alpha, latents) * latents + expand(sigma, latents) * noise
    output = (target(latents, noise) + error * wrong).requires_grad_()
    arguments = {"model_output": output, "noisy_latents": noisy, "latents": latents, **levels}
    return {"prediction_type": kind, **options}, arguments


@pytest.mark.parametrize("name", PROCESSES)
def test_a_perfect_output_has_no_loss_and_a_wrong_one_its_own(name, latent_distance):
    """Fails where x0, the gate's noise/signal or the scale by SNR are another process's."""
    options, arguments = batch(name)
    assert PerceptualObjective(latent_distance, **options)(**arguments).loss < 1e-9
    options, arguments = batch(name, error=0.3)
    objective = PerceptualObjective(latent_distance, **options)
    term = objective(**arguments)
    *_, alpha, sigma, _ = PROCESSES[name]
    gated = sigma <= 3 * alpha
    assert 0 < gated.sum() < SIZE
    assert term.num_samples == int(gated.sum())
    error = output_sensitivity(alpha.double(), sigma.double(), options["prediction_type"]) * 0.3
    own = randn(3, SIZE, 4, 8, 8)[2].double().square().flatten(1).mean(1)
    scale = (5 / (alpha / sigma).double().square()).clamp(max=1)
    expected = (scale * error.square() * own)[gated].sum() / (SIZE * objective.p_gate)
    assert term.loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_target_and_x0_are_inverse(name):
    kind, _, _, alpha, sigma, target = PROCESSES[name]
    latents, noise = randn(2, SIZE, 4, 3).double()
    stated = target_of(latents, noise, alpha.double(), sigma.double(), kind)
    torch.testing.assert_close(stated, target(latents, noise), rtol=1e-5, atol=1e-6)
    noisy = expand(alpha.double(), latents) * latents + expand(sigma.double(), latents) * noise
    torch.testing.assert_close(x0_from_output(stated, noisy, alpha.double(), sigma.double(), kind), latents)


def test_a_table_of_ones_own_is_the_schedulers(latent_distance):
    scheduler, timesteps = DDPMScheduler(), torch.tensor([20, 200, 400, 600, 700, 900])
    tables = alpha_sigma_table(scheduler)
    latents, noise, output = randn(3, SIZE, 4, 8, 8)
    alpha, sigma = (table[timesteps].float() for table in tables)
    arguments = (output.requires_grad_(), expand(alpha, noise) * latents + expand(sigma, noise) * noise, latents)
    known = PerceptualObjective(latent_distance, scheduler)
    own = PerceptualObjective(
        latent_distance, alpha_sigma=lambda t: (tables[0][t], tables[1][t]), prediction_type="epsilon",
        p_gate=lambda n: torch.randint(1000, (n,), generator=torch.Generator().manual_seed(0)),
    )  # fmt: skip
    assert own.p_gate == pytest.approx(known.p_gate, abs=4e-3)
    own.p_gate = known.p_gate
    assert torch.equal(own(*arguments, timesteps).loss, known(*arguments, timesteps).loss)


class Halved:
    """A Schedule of someone else's: every other timestep of a discrete one."""

    is_flow, num_timesteps, prediction_type = False, 500, "epsilon"

    def __init__(self):
        self.inner = schedule_of(DDPMScheduler())

    def at(self, timesteps):
        return torch.tensor([int(t) for t in timesteps])

    def timesteps(self, levels):
        return levels

    def alpha_sigma(self, levels):
        return self.inner.alpha_sigma(2 * levels)

    def probability(self, passes):
        every = torch.arange(self.num_timesteps)
        return float(passes(every, *self.alpha_sigma(every)).double().mean())


def test_a_schedule_of_ones_own(latent_distance):
    timesteps = torch.tensor([0, 100, 200, 300, 400, 499])
    latents, noise, output = randn(3, SIZE, 4, 8, 8)
    own, known = (PerceptualObjective(latent_distance, s, lpl_reduction="gated") for s in (Halved(), DDPMScheduler()))
    alpha, sigma = (c.float() for c in Halved().alpha_sigma(timesteps))
    arguments = (output.requires_grad_(), expand(alpha, noise) * latents + expand(sigma, noise) * noise, latents)
    assert torch.equal(own(*arguments, timesteps).loss, known(*arguments, 2 * timesteps).loss)
    assert own.p_gate == pytest.approx(known.p_gate, abs=2e-3)


@pytest.mark.parametrize("space", [(8,), (4, 4, 6), (1, 8, 8)])
def test_latents_have_any_number_of_axes(latent_distance, space):
    """1-D sequences, volumes and videos give what the same values give as images."""
    found = []
    for shape in (space, (math.prod(space), 1)):
        options, arguments = batch("flow, v = eps - x0", (8,), error=0.3)
        for name in ("model_output", "noisy_latents", "latents"):
            arguments[name] = arguments[name].detach().repeat(1, 1, math.prod(space) // 8).reshape(SIZE, 4, *shape)
        arguments["model_output"].requires_grad_()
        loss = arguments["model_output"].square().mean()
        mask = torch.ones(SIZE, 1, *shape)
        term = PerceptualObjective(latent_distance, **options)(**arguments, mask=mask, diffusion_loss=loss)
        found.append((term.loss, term.metrics["lpl/gradient_square"]))
    torch.testing.assert_close(*found)


# Packed latents.


def pack(x):
    """(B, C, h, w) to (B, h w / 4, 4 C), as pipelines of transformers do."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def test_the_line_that_the_error_has_unpacks(latent_distance):
    """Whatever is packed, the term is that of the unpacked; the diffusion loss may be of the packed output."""
    options, arguments = batch("flow, v = eps - x0", (8, 4), error=0.3)
    objective = PerceptualObjective(latent_distance, **options)
    loss = (arguments["model_output"] - 1).square().mean()
    plain = objective(**arguments, diffusion_loss=loss)
    packed = arguments | {"model_output": pack(arguments["model_output"].detach()).requires_grad_()}
    with pytest.raises(ValueError, match="unpack packed ones with unpack=") as error:
        objective(**packed)
    line = re.search(r"unpack=(lambda .*) \(where", str(error.value))[1]
    for changes in ({}, {"latents": pack(packed["latents"]), "noisy_latents": pack(packed["noisy_latents"])}):
        loss = (packed["model_output"] - 1).square().mean()
        term = objective(**packed | changes, unpack=eval(line), diffusion_loss=loss)
        assert torch.equal(term.loss, plain.loss)
        torch.testing.assert_close(term.metrics, plain.metrics)
    term.loss.backward()
    plain.loss.backward()
    torch.testing.assert_close(packed["model_output"].grad, pack(arguments["model_output"].grad))


def test_packed_all_over_is_found_by_the_channels(get_vae):
    options, arguments = batch("flow, v = eps - x0")
    packed = {name: pack(value) if value.dim() == 4 else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=r"model_output: float32 \(6, 16, 16\) .* unpack packed ones"):
        PerceptualObjective(LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1), **options)(**packed)


# Samples that LPL may not apply to.


def test_inactive_samples_are_as_if_the_gate_were_shut(latent_distance):
    """Their noise levels are not looked at, and B counts them."""
    options, arguments = batch("flow, v = eps - x0", error=0.3)
    objective = PerceptualObjective(latent_distance, **options)
    active = torch.tensor([True, False, True, False, False, True])
    rows = {name: value[active] for name, value in arguments.items()}
    rows["model_output"] = rows["model_output"].detach().requires_grad_()
    expected = objective(**rows)
    levels = arguments["sigmas"].where(active, 0.1)  # of another meaning
    term = PerceptualObjective(latent_distance, **options)(**arguments | {"sigmas": levels}, active=active[:, None])
    assert term.num_samples == expected.num_samples == 2
    assert term.loss.item() == pytest.approx(expected.loss.item() / 2)
    term.loss.backward()
    assert arguments["model_output"].grad.flatten(1).abs().amax(1).gt(0).tolist() == [1, 0, 1, 0, 0, 0]
    none = objective(**arguments, active=torch.zeros(SIZE, dtype=torch.bool))
    assert none.loss == 0
    assert not none.loss.requires_grad
    assert none.num_samples == 0


# The probability of passing.


def logit_normal(n, shift=1.0, mean=0.0):
    u = torch.sigmoid(mean + torch.randn(n, generator=torch.Generator().manual_seed(0)))
    return shift * u / (1 + (shift - 1) * u)


@pytest.mark.parametrize(
    ("distribution", "sampler"),
    [
        (Distribution(), lambda n: torch.rand(n, generator=torch.Generator().manual_seed(0))),
        (Distribution("logit_normal"), logit_normal),
        (Distribution("logit_normal", logit_mean=-0.5, shift=3.0), lambda n: logit_normal(n, 3.0, -0.5)),
        (
            Distribution("mode"),
            lambda n: (lambda p: p - 1.29 * (torch.sin(math.pi * p / 2) ** 2 - p))(
                torch.rand(n, generator=torch.Generator().manual_seed(0))
            ),
        ),
    ],
)
def test_closed_forms_are_what_drawing_finds(latent_distance, distribution, sampler):
    gate = Gate(None, sigma_threshold=3.0)
    closed, drawn = (
        PerceptualObjective(latent_distance, prediction_type="flow", p_gate=p).p_gate for p in (distribution, sampler)
    )
    assert closed == pytest.approx(drawn, abs=4e-3)
    assert drawn == probability_of(gate, sampler)


def test_probability_of_a_process_of_ones_own():
    """tan(pi t / 2) <= 3 for uniform t."""
    exact = 2 / math.pi * math.atan(3)
    draw = lambda n: torch.rand(n, generator=torch.Generator().manual_seed(0))  # noqa: E731
    assert probability_of(Gate(alpha_sigma=cosine), draw) == pytest.approx(exact, abs=4e-3)
    pairs = probability_of(Gate(alpha_sigma=OwnProcess()), lambda n: cosine(draw(n)))
    assert pairs == pytest.approx(exact, abs=4e-3)


def test_draws_that_p_gate_does_not_fit_are_told_once(latent_distance, caplog):
    """A shift of 3 under the default p_gate of uniform sigmas: LPL would act with two thirds of its weight."""
    sigmas = logit_normal(1200, 3.0)
    latents, noise, error = randn(3, 1200, 4, 4, 4)
    noisy = (1 - expand(sigmas, noise)) * latents + expand(sigmas, noise) * noise
    arguments = ((noise - latents + 0.1 * error).requires_grad_(), noisy, latents)
    for p_gate, told in ((None, 1), (Distribution("logit_normal", shift=3.0), 0)):
        objective = PerceptualObjective(latent_distance, prediction_type="flow", p_gate=p_gate)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for rows in torch.arange(1200).split(100):
                objective(*(x[rows] for x in arguments), sigmas=sigmas[rows])
        assert [("p_gate says 75 %" in record.getMessage()) for record in caplog.records] == [True] * told


# Wrong uses.

WRONG_CALLS = [
    ("epsilon", {}, {"sigmas": T}, "the objective has alpha_sigma for them; pass timesteps"),
    ("epsilon", {}, {"alphas": T}, "the objective has alpha_sigma for them; pass timesteps"),
    ("epsilon", {}, {"timesteps": None}, "timesteps: a NoneType"),
    ("epsilon", {"alpha_sigma": lambda t: 1 - t}, {}, "alpha_sigma: a Tensor; give two tensors"),
    ("epsilon", {"alpha_sigma": lambda t: (t[:1], t[:1])}, {}, r"shapes \(1,\) and \(1,\); give one value a sample"),
    (
        "epsilon",
        {"alpha_sigma": lambda t: (1 - 2 * t, t)},
        {},
        "alpha ranges from -0.8 to 0.8; .* finite and 0 or more",
    ),
    ("epsilon", {"alpha_sigma": lambda t: cosine(1 - t)}, {}, "alpha_sigma imply, .* is time reversed .sigma rises"),
    ("v", {"alpha_sigma": lambda t: (1 - t, t)}, {}, r"alpha\^2 \+ sigma\^2 is 0\.5.*pass a function"),
    ("epsilon, each call", {"prediction_type": "flow"}, {}, "alphas: the objective has a schedule for them"),
    ("epsilon, each call", {}, {"alphas": None}, "pass alphas and sigmas of noisy_latents"),
    ("epsilon, each call", {}, {"sigmas": SIGMA[:2]}, r"sigmas: float32 \(2,\)"),
    ("epsilon, each call", {}, {"alphas": SIGMA, "sigmas": ALPHA}, "is time reversed"),
    ("flow, v = eps - x0", {}, {"alphas": 1 - T}, "alphas: the objective has a schedule for them; pass sigmas"),
    ("flow, v = eps - x0", {}, {"sigmas": 1 - T}, "pass sigmas=1 - t where t = 1 is data"),
    ("flow, v = eps - x0", {}, {"active": torch.ones(SIZE)}, "active: float32 .*pass booleans, such as r == t"),
    ("flow, v = eps - x0", {}, {"active": torch.ones(2).bool()}, r"active: bool \(2,\)"),
]


@pytest.mark.parametrize(("name", "options", "changes", "message"), WRONG_CALLS)
def test_wrong_call_is_refused(latent_distance, name, options, changes, message):
    own, arguments = batch(name)
    with pytest.raises(ValueError, match=message) as error:
        PerceptualObjective(latent_distance, **own | options)(**arguments | changes)
    assert "\n" not in str(error.value)


WRONG_OPTIONS = [
    ({"prediction_type": None}, "both None: say what the model predicts"),
    ({"prediction_type": "v"}, "'v' does not go with a process of your own, which has epsilon, v_prediction"),
    ({"prediction_type": "epsilon", "p_gate": None}, "no schedule to draw from: pass p_gate="),
    ({"p_gate": Distribution()}, "no schedule to draw from"),
    ({"p_gate": torch.ones(1000)}, "needs one per timestep of a discrete schedule"),
    ({"p_gate": lambda n: torch.rand(7)}, "drew 7 levels where it was asked for 200000"),
    ({"p_gate": lambda n: 1 - 0.001 * torch.rand(n)}, "p_gate is 0.0: no timestep that is drawn passes"),
    ({"noise_scheduler": DDPMScheduler()}, "alpha_sigma does not go with noise_scheduler"),
    ({"lpl_t_threshold": 200}, "alpha_sigma does not go with lpl_t_threshold, .*noise/signal"),
    ({"alpha_sigma": None, "prediction_type": "flow", "p_gate": lambda n: 1000 * torch.rand(n)}, "divided by 1000"),
    ({"alpha_sigma": None, "prediction_type": "flow", "p_gate": Distribution(shift="resolution")}, "as a number"),
    ({"alpha_sigma": None, "prediction_type": "flow", "p_gate": Distribution("cosine")}, "unknown timestep distr"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_wrong_option_is_refused(latent_distance, options, message):
    with pytest.raises(ValueError, match=message):
        PerceptualObjective(latent_distance, **{"prediction_type": "epsilon", **VP} | options)


def test_sigma_data_is_positive():
    with pytest.raises(ValueError, match="sigma_data must be a positive number, not 0"):
        edm(0)


def own(prediction_type, **options):
    distance = lambda pred, target, mask=None, **_: None  # noqa: E731
    return PerceptualObjective(distance, prediction_type=prediction_type, **{"p_gate": 0.5} | options)


def call_own(objective, alphas, sigmas):
    latents = torch.randn(2, 4, 4, 4)
    return objective(latents.clone().requires_grad_(), latents + 1, latents, alphas=alphas, sigmas=sigmas)


@pytest.mark.parametrize(
    ("convention", "said"),
    [
        (edm, r"pass edm\(sigma_data\), with the parentheses"),
        (lambda alpha, sigma: alpha, r"for 2 samples it returned \(2,\)"),
        (lambda alpha, sigma: None, "returned a NoneType"),
        (lambda alpha, sigma: (1.0, -sigma), r"a float and \(2,\)"),
        (lambda alpha, sigma: (alpha[:1], sigma), r"\(1,\)"),
    ],
)
def test_a_convention_that_gives_no_pair_is_named(convention, said):
    with pytest.raises(ValueError, match=said):
        call_own(own(convention, checked_calls=0), torch.ones(2), torch.ones(2))


def test_levels_without_signal_and_noise_are_an_error():
    """Their SNR is 0 / 0, and the loss was no number."""
    with pytest.raises(ValueError, match="sample 1 are both 0"):
        call_own(own("epsilon", checked_calls=0), torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("bound", [-1, float("nan"), "3"])
def test_gates_of_ones_own_process_have_bounds_too(bound):
    for name in ("lpl_sigma_threshold", "lpl_snr_threshold"):
        with pytest.raises(ValueError, match=f"{name} must be a number of 0 or more"):
            own("epsilon", **{name: bound})
