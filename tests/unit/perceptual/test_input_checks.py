"""What an objective is fed wrongly is said, with what was given; what is unusual but right is not."""

import itertools
import logging
import types

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

import lpl.perceptual.loss
from lpl import LatentPerceptualLoss, PerceptualObjective
from lpl.diffusion.draws import pyramid_noise
from lpl.diffusion.prediction import add_noise, alpha_sigma_table
from lpl.perceptual.input_checks import FirstCalls, check_mask_values
from lpl.perceptual.loss import LPLOutput

SIGMAS = torch.tensor([0.1, 0.3, 0.5, 0.9])
TIMESTEPS = torch.tensor([20, 100, 150, 950])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(objective, **changes):
    """A right call of four samples (one gate is shut), with changes: a value, or a function of all arguments."""
    latents, noise, error = randn(3, 4, 4, 8, 8)
    if objective.gate.is_flow:
        arguments, alpha, sigma = {"sigmas": SIGMAS}, 1 - SIGMAS, SIGMAS
    else:
        alpha, sigma = (table[TIMESTEPS].float() for table in alpha_sigma_table(DDPMScheduler()))
        arguments = {"timesteps": TIMESTEPS}
    output = noise - latents if objective.gate.is_flow else noise
    output = (output + 0.1 * error).requires_grad_()
    arguments |= {"model_output": output, "noisy_latents": add_noise(latents, noise, alpha, sigma), "latents": latents}
    if objective.auto is not None:
        arguments["diffusion_loss"] = output.square().mean()
    arguments |= {name: value(arguments) if callable(value) else value for name, value in changes.items()}
    return objective(**arguments)


def flow(loss_fn, **options):
    options = {"prediction_type": "flow", "lpl_sigma_threshold": 3.0} | options
    return PerceptualObjective(loss_fn, options.pop("noise_scheduler", None), **options)


def discrete(loss_fn, **options):
    return PerceptualObjective(loss_fn, DDPMScheduler(), **options)


# Calls.

WRONG_CALLS = [
    # (objective, its options, changes of the call, what the message says)
    (flow, {}, {"sigmas": None}, r"pass sigmas, .* noise fraction"),
    (flow, {}, {"sigmas": SIGMAS[:1]}, r"sigmas: float32 \(1,\) on cpu; pass one value a sample, .*\(4,\)"),
    (flow, {}, {"sigmas": SIGMAS.view(1, 4)}, r"sigmas: float32 \(1, 4\)"),
    (flow, {}, {"sigmas": SIGMAS.view(4, 1).expand(4, 4)}, r"sigmas: float32 \(4, 4\)"),
    (flow, {}, {"sigmas": torch.tensor(0.3)}, r"sigmas: float32 \(\)"),
    (flow, {}, {"sigmas": 0.3}, "sigmas: a float"),
    (flow, {}, {"sigmas": SIGMAS * 1000}, "range from 100 to 900: .* divided by 1000"),
    (flow, {}, {"sigmas": -SIGMAS}, "range from -0.9 to -0.1"),
    (flow, {}, {"sigmas": SIGMAS * torch.nan}, "range from nan"),
    (flow, {}, {"sigmas": torch.tensor([0, 0, 1, 1])}, "sigmas: int64"),
    (flow, {}, {"sigmas": 1 - SIGMAS}, r"sigmas imply, .* deviation of .* where sigma is 0\.1, .* time reversed"),
    (flow, {}, {"noisy_latents": lambda a: a["latents"]}, "noisy_latents equal latents"),
    (flow, {}, {"latents": lambda a: 6 * a["latents"]}, "of another space"),
    (flow, {}, {"latents": lambda a: a["latents"] / 0}, "not finite"),
    (
        flow,
        {},
        {"latents": lambda a: a["noisy_latents"], "noisy_latents": lambda a: 3 * a["latents"]},
        "swapped, of another space",
    ),
    (discrete, {}, {"timesteps": None}, "timesteps: a NoneType"),
    (discrete, {}, {"timesteps": TIMESTEPS[:1]}, r"timesteps: int64 \(1,\) on cpu; .*\(4,\)"),
    (discrete, {}, {"timesteps": TIMESTEPS.tolist()}, "timesteps: a list"),
    (discrete, {}, {"timesteps": TIMESTEPS / 1000}, r"timesteps: float32 .* pass the integer timesteps .*0\.\.999"),
    (discrete, {}, {"timesteps": TIMESTEPS > 100}, "timesteps: bool"),
    (discrete, {}, {"timesteps": TIMESTEPS + 500}, "range from 520 to 1450: .*0..999"),
    (discrete, {}, {"timesteps": TIMESTEPS - 100}, "range from -80"),
    (discrete, {}, {"timesteps": 999 - TIMESTEPS}, r"timesteps imply, .* \(timestep 0 is the least noise\)"),
    (discrete, {}, {"sigmas": SIGMAS}, "sigmas are for flow matching"),
    (flow, {}, {"noisy_latents": lambda a: a["noisy_latents"].bfloat16()}, "noisy_latents are torch.bfloat16"),
    (flow, {}, {"latents": lambda a: a["latents"].long()}, "latents: int64"),
    (flow, {}, {"model_output": lambda a: a["model_output"].flatten(2).mT}, r"float32 \(4, 64, 4\) .* unpack packed"),
    (flow, {}, {"model_output": lambda a: a["model_output"][:, :2]}, r"shapes differ: model_output \(4, 2, 8, 8\)"),
    (flow, {}, {"model_output": lambda a: a["model_output"].repeat(1, 2, 1, 1)}, "variance"),
    (flow, {}, {"latents": lambda a: a["latents"][:1]}, r"latents \(1, 4, 8, 8\)"),
    (flow, {}, {"latents": lambda a: a["latents"].to("meta")}, "devices differ: .*latents on meta"),
    (flow, {}, {"model_output": lambda a: a["model_output"].detach()}, "no gradient, .*detached"),
    (flow, {}, {"diffusion_loss": lambda a: a["model_output"].square().mean().detach()}, "diffusion_loss is detached"),
    (flow, {}, {"diffusion_loss": lambda a: a["model_output"].square()}, r"diffusion_loss: float32 \(4, 4, 8, 8\)"),
    (flow, {}, {"diffusion_loss": lambda a: a["model_output"].square().mean().item()}, "diffusion_loss: a float"),
    (flow, {}, {"diffusion_loss": torch.ones((), requires_grad=True)}, "does not depend on model_output"),
    (flow, {"lpl_weight": "auto"}, {"diffusion_loss": None}, "pass diffusion_loss="),
    (flow, {}, {"sample_weight": torch.ones(1)}, r"sample_weight: float32 \(1,\)"),
    (flow, {}, {"sample_weight": torch.tensor([1, 1, torch.inf, 1])}, "sample_weight is not finite"),
    (flow, {}, {"mask": torch.ones(1, 1, 8, 8)}, r"mask: float32 \(1, 1, 8, 8\) on cpu; pass \(4, 1, 8, 8\) on cpu"),
    (flow, {}, {"mask": torch.ones(4, 1, 8, 8, device="meta")}, "mask: .* on meta"),
    (flow, {}, {"mask": -torch.ones(4, 1, 8, 8)}, "mask has values from -1 to -1"),
    (flow, {}, {"mask": torch.full((4, 1, 8, 8), torch.nan)}, "mask has values from nan"),
    (flow, {}, {"windows": torch.zeros(2, 2)}, r"windows: float32 \(2, 2\)"),
    (flow, {"lpl_warmup_steps": 3}, {}, "needs step="),
]


@pytest.mark.parametrize(("build", "options", "changes", "message"), WRONG_CALLS)
def test_wrong_call_is_refused(get_vae, build, options, changes, message):
    objective = build(LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1), **options)
    with pytest.raises(ValueError, match=message) as error:
        call(objective, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 1, 1)])
def test_a_value_a_sample_of_more_dimensions_means_the_same(latent_distance, shape):
    """What diffusers' scripts for SD3 and Flux have gave three to ten times the gradient."""
    for build, name, value in ((flow, "sigmas", SIGMAS), (discrete, "timesteps", TIMESTEPS)):
        right = call(build(latent_distance), sample_weight=SIGMAS)
        wide = call(build(latent_distance), sample_weight=SIGMAS.view(shape), **{name: value.view(shape)})
        assert torch.equal(wide.loss, right.loss)
        assert wide.num_samples == right.num_samples == 3


def test_flow_matching_needs_neither_scheduler_nor_timesteps(latent_distance):
    """None is what a flow-matching scheduler of 1000 timesteps gives, for either gate and direction."""
    for options in ({}, {"lpl_sigma_threshold": None}, {"lpl_sigma_threshold": None, "lpl_t_threshold": 400}):
        terms = [
            call(flow(latent_distance, noise_scheduler=s, **options)) for s in (None, FlowMatchEulerDiscreteScheduler())
        ]
        assert terms[0].num_samples == terms[1].num_samples > 0
        assert torch.equal(terms[0].loss, terms[1].loss)
    mirrored = call(flow(latent_distance, prediction_type="flow_to_data"), model_output=lambda a: -a["model_output"])
    assert torch.equal(mirrored.loss, call(flow(latent_distance)).loss)


@pytest.mark.parametrize("lpl_weight", [1.0, "auto"])
def test_an_empty_batch_is_an_exact_0(latent_distance, lpl_weight):
    for build, name in ((flow, "sigmas"), (discrete, "timesteps")):
        objective = build(latent_distance, lpl_weight=lpl_weight)
        none = {n: (lambda a, n=n: a[n][:0]) for n in ("model_output", "noisy_latents", "latents", name)}
        term = call(objective, **none, diffusion_loss=torch.zeros((), requires_grad=True), mask=torch.ones(0, 1, 8, 8))
        assert term.loss == 0
        assert not term.loss.requires_grad
        assert term.num_samples == 0
        assert set(term.read().values()) == {0.0, float(objective.weight)}
        if lpl_weight == "auto":  # it takes part in the sum over processes, as the others do
            objective.end_step(lambda summed: summed + torch.tensor([1.0, 4.0, 3.0]))
            assert objective.auto.measured == 3


# Options.

WRONG_OPTIONS = [
    ({"lpl_weight": "Auto"}, "'Auto' is neither a number nor 'auto'"),
    ({"lpl_weight": None}, "None is neither"),
    ({"lpl_weight": "1.0"}, "'1.0' is neither"),
    ({"lpl_weight": float("nan")}, "lpl_weight must be 0 or more and finite, not nan"),
    ({"lpl_weight": -1.0}, "not -1"),
    ({"lpl_weight": "auto", "lpl_target_share": 20}, "lpl_target_share must lie between 0 and 1"),
    ({"lpl_reduction": "mean"}, "'mean' is neither expected nor gated"),
    ({"prediction_type": "velocity"}, "'velocity' does not go with a process of your own, which has epsilon.*edm"),
    ({"prediction_type": "v", "noise_scheduler": FlowMatchEulerDiscreteScheduler()}, "'v' .* which has flow, flow_to"),
    ({"noise_scheduler": None, "prediction_type": None}, "noise_scheduler and prediction_type are both None: say what"),
    ({"noise_scheduler": None, "prediction_type": "epsilon"}, "process of your own has no schedule .*pass p_gate="),
    ({"noise_scheduler": EDMEulerScheduler()}, "EDMEulerScheduler has no alphas_cumprod, and sigmas of up to 80"),
    ({"noise_scheduler": types.SimpleNamespace(scheduler=None)}, "SimpleNamespace: pass its .scheduler"),
    ({"noise_scheduler": DDPMScheduler()}, "'flow' does not go with a discrete .*pass noise_scheduler=None"),
    ({"lpl_sigma_threshold": None, "lpl_t_threshold": 0.2}, "counts timesteps .* not 0.2"),
    ({"lpl_max_samples": 2.5}, "integer of 1 or more"),
    ({"snr_gamma": float("nan")}, "snr_gamma must be a positive number"),
    ({"lpl_start": -1}, "lpl_start must be an integer of 0 or more"),
    ({"p_gate": float("nan")}, "p_gate is nan"),
    ({"p_gate": [1.0] * 1000}, "p_gate is a list: pass"),
    ({"lpl_weight": [1.0]}, "neither a number nor 'auto'"),
    ({"lpl_warmup_steps": None}, "lpl_warmup_steps must be an integer"),
    ({"lpl_warmup_steps": 2.5}, "lpl_warmup_steps must be an integer"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_wrong_option_is_refused(latent_distance, options, message):
    with pytest.raises(ValueError, match=message):
        flow(latent_distance, **options)


class Pipeline:
    """Stands for a pipeline of diffusers, which is no module."""

    vae = None


class AutoencoderKL(nn.Module):
    """What another library calls by this name."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Module()


@pytest.mark.parametrize(
    ("vae", "options", "message"),
    [
        (Pipeline(), {}, "vae is a Pipeline: pass its .vae"),
        ("vae", {}, "vae is a str: pass the loaded VAE"),
        (AutoencoderKL().eval(), {}, "AutoencoderKL is not diffusers' AutoencoderKL"),
        (nn.Linear(1, 1).eval(), {}, "no walk through the decoder of Linear"),
        (None, {"dtype": "float16"}, "'float16' is no floating-point torch.dtype"),
        (None, {"dtype": torch.int8}, "torch.int8 is no floating-point"),
        (None, {"norm_type": "Channel"}, "norm_type 'Channel' is none of .*channel_detached"),
        (None, {"crop": 0}, "crop must be an integer of 1 or more"),
        (None, {"chunk": 1.5}, "chunk must be an integer of 1 or more, not 1.5"),
    ],
)
def test_wrong_vae_or_option_of_the_loss_is_refused(get_vae, vae, options, message):
    with pytest.raises(ValueError, match=message):
        LatentPerceptualLoss(get_vae("two_blocks") if options else vae, num_blocks=1, **options)


def test_wrapped_vae_is_refused_with_what_to_pass(get_vae):
    for wrapped in (torch.compile(get_vae("two_blocks")), nn.DataParallel(get_vae("two_blocks")).eval()):
        with pytest.raises(ValueError, match="pass the AutoencoderKL inside it"):
            LatentPerceptualLoss(wrapped)


def test_validation_with_auto_needs_no_diffusion_loss(latent_distance):
    objective = flow(latent_distance, lpl_weight="auto")
    with torch.no_grad():
        assert call(objective, diffusion_loss=None).num_samples == 3
    with pytest.raises(ValueError, match="pass diffusion_loss="):
        call(objective, diffusion_loss=None)


def test_wrong_latents_of_the_loss_are_refused(get_vae):
    loss_fn = LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1)
    z = randn(2, 4, 8, 8)
    for pair, message in [
        ((z, None), "a NoneType; pass two"),
        ((z[:0], z[:0]), r"\(0, 4, 8, 8\)"),
        ((z.flatten(2).mT, z.flatten(2).mT), r"\(2, 64, 4\) on cpu .*pass two \(B, C, h, w\)"),
        ((z, z.to("meta")), "on meta"),
        ((z.to("meta"), z.to("meta")), "the VAE is on cpu, the latents on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss_fn(*pair)
    with pytest.raises(ValueError, match="mask has values from -1"):
        loss_fn(z, z, -torch.ones(2, 1, 8, 8))


def test_vae_or_tensor_for_a_loss_is_refused(get_vae, latent_distance):
    for wrong in (get_vae("two_blocks"), torch.zeros(())):
        with pytest.raises(ValueError, match=r"loss_fn is .*: pass LatentPerceptualLoss\(vae\)"):
            flow(wrong)
    with pytest.raises(ValueError, match=r"loss_fn returned float32 \(\) on cpu; it must return an LPLOutput"):
        call(flow(lambda pred, target, mask, **_: (pred - target).square().mean()))


def test_masks_over_1_weigh_a_mean(get_vae):
    """Region weights of any size, whole numbers too: only their ratios count."""
    pred, target = randn(2, 2, 4, 8, 8)
    mask = torch.randint(0, 3, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    loss_fn = LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1)
    torch.testing.assert_close(loss_fn(pred, target, 100 * mask).per_sample, loss_fn(pred, target, mask).per_sample)


# Time.


def flows(seed, batch):
    """noisy_latents, latents and sigmas that are uniform in (0, 1)."""
    latents, noise = randn(2, batch, 4, 8, 8, seed=seed)
    sigma = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    return add_noise(latents, noise, 1 - sigma, sigma), latents, sigma


def test_reversed_time_is_found_at_every_clear_noise_level():
    """At the first call that has a sample there, one a call; the same calls pass the right way."""
    seen = 0
    for seed in range(200):
        noisy, latents, sigma = flows(seed, 1)
        FirstCalls(1).noise(noisy, latents, 1 - sigma, sigma, "sigmas")
        if 0.05 <= 1 - sigma <= 0.3:
            seen += 1
            with pytest.raises(ValueError, match="is time reversed"):
                FirstCalls(1).noise(noisy, latents, sigma, 1 - sigma, "sigmas")
    assert seen > 40


@pytest.mark.parametrize("loss", [torch.nn.functional.mse_loss, torch.nn.functional.l1_loss])
def test_velocity_of_the_other_sign_is_said_once(latent_distance, caplog, loss):
    """From the diffusion loss, for a model that knows nothing yet; the right sign says nothing."""
    velocity = randn(3, 4, 4, 8, 8)[1] - randn(3, 4, 4, 8, 8)[0]
    for sign, kind, records in ((1, "flow", 0), (-1, "flow_to_data", 0), (1, "flow_to_data", 1), (-1, "flow", 1)):
        caplog.clear()
        objective, output = flow(latent_distance, prediction_type=kind), (0.1 * randn(4, 4, 8, 8)).requires_grad_()
        for _ in range(3):
            call(objective, model_output=output, diffusion_loss=loss(output, sign * velocity))
        assert len(caplog.records) == records, (sign, kind)
        assert not records or f"prediction_type {kind!r} says" in caplog.text or f"not {kind!r} (" in caplog.text


def test_another_prediction_than_the_loss_trains_is_said_once(latent_distance, caplog):
    """However well the model is trained, and whatever weighs its samples; the declared one says nothing."""
    latents, noise, error = randn(3, 4, 4, 8, 8)
    alpha, sigma = (table[TIMESTEPS].float().view(4, 1, 1, 1) for table in alpha_sigma_table(DDPMScheduler()))
    targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}
    for declared, (trained, target), part in itertools.product(targets, targets.items(), (0.01, 1.0)):
        caplog.clear()
        output = (target + part * error).requires_grad_()
        loss = ((output - target).square().mean((1, 2, 3)) * torch.tensor([0.1, 1.0, 5.0, 0.3])).mean()
        objective = discrete(latent_distance, prediction_type=declared)
        for _ in range(3):
            call(objective, model_output=output, diffusion_loss=loss)
        assert len(caplog.records) == (declared != trained), (declared, trained, part)
        assert declared == trained or f"pass prediction_type={trained!r}" in caplog.text


KINDS_OF_NOISE = {
    "white": lambda x0, eps, seed: (x0, eps),
    "offset": lambda x0, eps, seed: (x0, eps + 2 * randn(*eps.shape[:2], 1, 1, seed=seed + 1)),
    "pyramid": lambda x0, eps, seed: (x0, torch.stack([pyramid_noise(e, 10, 0.9, seed, i) for i, e in enumerate(eps)])),
    "perturbed": lambda x0, eps, seed: (x0, eps + 0.3 * randn(*eps.shape, seed=seed + 1)),
    "small latents": lambda x0, eps, seed: (0.01 * x0, eps),
    "large latents": lambda x0, eps, seed: (30 * x0, eps),
    "half-precision latents": lambda x0, eps, seed: (x0.bfloat16().float() + 0.01 * eps, eps),
}


@pytest.mark.parametrize("kind", KINDS_OF_NOISE)
def test_unusual_noise_is_no_false_alarm(kind):
    """A thousand samples each of flow matching and of a discrete schedule, every one looked at."""
    alphas, sigmas = alpha_sigma_table(DDPMScheduler())
    first = FirstCalls(10**6)
    for seed in range(40):
        latents, noise = randn(2, 25, 4, 8, 8, seed=seed)
        clean, eps = KINDS_OF_NOISE[kind](latents, noise, seed)
        s = torch.rand(25, generator=torch.Generator().manual_seed(seed))
        t = (1000 * s).long()
        for alpha, sigma in ((1 - s, s), (alphas[t].float(), sigmas[t].float())):
            first.noise(add_noise(clean, eps, alpha, sigma), clean, alpha, sigma, "sigmas")


def test_noise_inside_a_mask_alone_is_no_false_alarm():
    """Inpainting: an eighth of the image is noised, one sample not at all."""
    latents, noise = randn(2, 8, 4, 8, 8)
    mask = torch.zeros(8, 1, 8, 8)
    mask[1:, ..., :1] = 1
    for alpha in (1 - torch.full((8,), 0.3), (1 - torch.full((8,), 0.09)).sqrt()):
        sigma = torch.full((8,), 0.3)
        noisy = mask * add_noise(latents, noise, alpha, sigma) + (1 - mask) * latents
        FirstCalls(1).noise(noisy, latents, alpha, sigma, "sigmas")


# Readings.


def test_only_the_first_calls_look_at_values(get_vae):
    """So the others never wait for the device: what is wrong from the fourth call on, no one sees."""
    wrong = [{"sigmas": 1 - SIGMAS}, {"sample_weight": SIGMAS * torch.nan}, {"mask": -torch.ones(4, 1, 8, 8)}]
    right = {"sample_weight": torch.ones(4), "mask": torch.ones(4, 1, 8, 8)}
    for objective, calls in [
        (flow(LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1)), 3),
        (flow(LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1), checked_calls=1), 3),
    ]:
        for _ in range(calls):
            call(objective, **right)
        for changes in wrong:
            call(objective, **changes)
    check_mask_values(torch.ones(0, 1, 8, 8))


# A gradient of exactly 0.


def detached(pred, target, mask=None, **_):
    """Features of the prediction are stored detached: the fault of a study that lasted a month."""
    return LPLOutput((pred.detach() - target).square().flatten(1).mean(1), {}, {}, {}, {}, None)


def half_detached(pred, target, mask=None, **_):
    """The graph is there, and its gradient is 0."""
    out = detached(pred, target)
    return out._replace(per_sample=out.per_sample + 0 * pred.flatten(1).sum(1))


def unrelated(pred, target, mask=None, **_):
    """The graph is another's."""
    out = detached(pred, target)
    return out._replace(per_sample=out.per_sample * torch.ones((), requires_grad=True))


@pytest.fixture
def broken(get_vae, monkeypatch):
    """Our own loss, whose decoder loses the gradient."""

    def compare(*args):
        found = original(*args)
        return found if found.gradient is None else found._replace(gradient=torch.zeros_like(found.gradient))

    original = lpl.perceptual.loss.compare
    monkeypatch.setattr(lpl.perceptual.loss, "compare", compare)
    return LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1)


@pytest.mark.parametrize("lpl_weight", [1.0, "auto"])
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (detached, "without graph: .* detached"),
        (half_detached, "gradient .* is exactly 0"),
        (unrelated, "gradient .* is exactly 0"),
        (None, "gradient .* is exactly 0"),
    ],
)
def test_gradient_of_0_is_an_error_at_the_first_call(broken, loss_fn, message, lpl_weight):
    objective = flow(loss_fn or broken, lpl_weight=lpl_weight)
    with pytest.raises(RuntimeError, match=message):
        call(objective)
    with torch.no_grad():
        assert call(objective, diffusion_loss=torch.ones(())).num_samples == 3


def test_gradient_of_0_is_an_error_wherever_metrics_are_read(broken):
    """Also after the first calls, and of some samples it is none."""
    objective = flow(broken, checked_calls=0)
    term = call(objective)
    assert (term.metrics["lpl/samples_with_loss"], term.metrics["lpl/samples_without_gradient"]) == (3, 3)
    with pytest.raises(RuntimeError, match="exactly 0"):
        term.read()


def test_gradient_of_0_that_is_right_is_no_error(broken, latent_distance):
    for options, changes in [
        ({"lpl_weight": 0.0}, {}),
        ({"lpl_start": 5}, {"step": 3}),
        ({}, {"sample_weight": torch.zeros(4)}),
        ({}, {"mask": torch.zeros(4, 1, 8, 8)}),
        ({"lpl_sigma_threshold": 0.05}, {}),
    ]:
        call(flow(broken, **options), **changes).read()
    exact = flow(lambda pred, target, *_, **__: latent_distance(target + 0 * pred, target))
    assert call(exact).read()["lpl/samples_with_loss"] == 0
    first = torch.tensor([0, 1, 0]).view(-1, 1, 1, 1)
    some = flow(lambda *a, **k: (out := latent_distance(*a, **k))._replace(gradient=out.gradient * first))
    assert call(some).read()["lpl/samples_without_gradient"] == 2


def test_auto_measures_a_loss_that_states_no_gradient(latent_distance):
    """By differentiating it; else its weight would stay 0 for ever."""
    weights = []
    for loss_fn in (latent_distance, lambda *a, **k: latent_distance(*a, **k)._replace(gradient=None)):
        objective = flow(loss_fn, lpl_weight="auto")
        for _ in range(90):
            call(objective)
            objective.end_step()
        assert objective.auto.fixed
        weights.append(objective.weight)
    assert weights[1] == pytest.approx(weights[0]) != 0


# What is never measured, or never applied.


def test_gate_that_never_opens_is_said_once(latent_distance, caplog):
    """Timesteps of another schedule; not in a run that is merely short, or of which one sample passed."""
    objective, shut = discrete(latent_distance), torch.full((4,), 900)
    lucky = discrete(latent_distance, checked_calls=0)
    call(lucky)
    with caplog.at_level(logging.WARNING):
        for _ in range(300):
            call(lucky, timesteps=shut)
        for step in range(300):
            call(objective, timesteps=shut)
            assert len(caplog.records) == (step >= 52), step
    assert "applied to none of 212 samples" in caplog.text
    assert "the timesteps that made noisy_latents" in caplog.text
