import itertools

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import tiny_vae
from torch.utils._python_dispatch import TorchDispatchMode

from lpl import LatentPerceptualLoss, PerceptualObjective
from lpl.diffusion.draws import timestep_probabilities
from lpl.diffusion.prediction import PREDICTION_TYPES, add_noise, alpha_sigma_table, target_of, x0_from_output
from lpl.perceptual.term import gradient_share

TIMESTEPS = torch.tensor([800, 600, 20, 673, 950, 760, 3, 751])
"""Four of the eight have noise/signal of at most 3, spread unevenly: t < 674 on SDXL's schedule, t <= 750 of a flow."""
GATED = [1, 2, 3, 6]
DISCRETE = ("epsilon", "v_prediction", "sample")


class Batch:
    """Latents, noise and an imperfect model output for timesteps of a schedule (or sigmas of a flow)."""

    def __init__(self, scheduler, prediction_type="epsilon", timesteps=TIMESTEPS, seed=0, error=0.1):
        generator = torch.Generator().manual_seed(seed)
        shape = (3, len(timesteps), 4, 8, 8)
        self.latents, self.noise, self.error = torch.randn(shape, generator=generator)
        self.timesteps, self.prediction_type = timesteps, prediction_type
        if prediction_type.startswith("flow"):
            self.sigma = (timesteps / 1000).float()
            self.alpha = 1 - self.sigma
        else:
            self.alpha, self.sigma = (table[timesteps].float() for table in alpha_sigma_table(scheduler))
        self.noisy_latents = add_noise(self.latents, self.noise, self.alpha, self.sigma)
        self.target = target_of(self.latents, self.noise, self.alpha, self.sigma, prediction_type)
        self.model_output = (self.target + error * self.error).requires_grad_()
        self.sigmas = self.sigma if prediction_type.startswith("flow") else None

    def arguments(self, rows=None):
        arguments = self.model_output, self.noisy_latents, self.latents, self.timesteps, self.sigmas
        return arguments if rows is None else tuple(None if x is None else x[rows] for x in arguments)

    def diffusion_loss(self):
        return (self.model_output - self.target).square().mean()

    def snr(self):
        return (self.alpha.double() / self.sigma.double()).square()

    def latent_errors(self):
        """mean (x0_hat - x0)^2 per sample: what LatentDistance gives, (B,)."""
        x0 = x0_from_output(self.model_output, self.noisy_latents, self.alpha, self.sigma, self.prediction_type)
        return (x0 - self.latents).square().flatten(1).mean(1)


def scheduler_for(prediction_type):
    if prediction_type.startswith("flow"):
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


@pytest.fixture(params=PREDICTION_TYPES)
def each_type(request):
    """A scheduler, the options that select a prediction type on it, and a batch."""
    scheduler = scheduler_for(request.param)
    return scheduler, {"prediction_type": request.param}, Batch(scheduler, request.param)


# The equation.


def test_term_is_the_weighted_sum_over_gated_samples(each_type, latent_distance):
    """weight * sum_gated min(1, 5 / SNR) L / (B p_gate), for every parameterisation alike."""
    scheduler, options, batch = each_type
    term = PerceptualObjective(latent_distance, scheduler, lpl_weight=3.0, **options)(*batch.arguments())
    scale = (5 / batch.snr()).clamp(max=1)
    expected = 3.0 * (scale * batch.latent_errors())[GATED].sum() / (8 * (0.75 if batch.sigmas is not None else 0.674))
    assert term.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert term.loss.dtype == torch.float32
    assert term.num_samples == 4
    assert latent_distance.batch_sizes == [4]


def test_perfect_output_has_loss_zero(each_type, vae):
    """Fails where x0 is not what the parameterisation says, such as noise taken from a `sample` prediction."""
    scheduler, options, batch = each_type
    batch.model_output = batch.target.clone().requires_grad_()
    term = PerceptualObjective(LatentPerceptualLoss(vae, num_blocks=1), scheduler, **options)(*batch.arguments())
    assert term.num_samples == 4
    assert term.loss.item() < 1e-8


def test_gradient_arrives_at_the_gated_outputs_only(each_type, vae):
    scheduler, options, batch = each_type
    term = PerceptualObjective(LatentPerceptualLoss(vae, num_blocks=1), scheduler, **options)(*batch.arguments())
    term.loss.backward()
    assert batch.model_output.grad.flatten(1).abs().amax(1).gt(0).nonzero().flatten().tolist() == GATED


@pytest.mark.parametrize("snr_gamma", [None, 1.0, 40.0])
def test_scale_by_snr(each_type, latent_distance, snr_gamma):
    """Fails where the scale needs snr_gamma to act, or where the SNR of other samples than the gated ones is taken."""
    scheduler, options, batch = each_type
    options |= {"snr_gamma": snr_gamma, "lpl_reduction": "gated"}
    on, off = (
        PerceptualObjective(latent_distance, scheduler, lpl_scale=s, **options)(*batch.arguments())
        for s in (True, False)
    )
    errors, snr = batch.latent_errors()[GATED].double(), batch.snr()[GATED]
    assert off.loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    assert on.loss.item() == pytest.approx((((snr_gamma or 5) / snr).clamp(max=1) * errors).mean().item(), rel=1e-5)
    assert on.loss < off.loss


# The reduction.


@pytest.mark.parametrize("p_gate", [None, 0.37])
@pytest.mark.parametrize("sizes", [[8], [4, 4], [2, 2, 2, 2], [1] * 8])
def test_expected_reduction_does_not_know_of_micro_batches(sdxl_scheduler, latent_distance, sizes, p_gate):
    """Fails where a sample's weight depends on how many others of its micro-batch pass the gate."""
    batch = Batch(sdxl_scheduler)
    objective = PerceptualObjective(latent_distance, sdxl_scheduler, p_gate=p_gate)
    whole = objective(*batch.arguments()).loss
    rows = torch.arange(8).split(sizes)
    parts = torch.stack([objective(*batch.arguments(r)).loss for r in rows])
    assert parts.mean().item() == pytest.approx(whole.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, batch.model_output, retain_graph=True)[0] for loss in (parts.mean(), whole)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)


def test_expected_reduction_at_uneven_micro_batches_weighs_samples_alike(sdxl_scheduler, latent_distance):
    batch = Batch(sdxl_scheduler)
    objective = PerceptualObjective(latent_distance, sdxl_scheduler)
    parts = [len(r) / 8 * objective(*batch.arguments(r)).loss for r in torch.arange(8).split([1, 4, 3])]
    assert sum(parts).item() == pytest.approx(objective(*batch.arguments()).loss.item(), rel=1e-6)


def test_expected_reduction_is_the_mean_over_gated_in_expectation(sdxl_scheduler, latent_distance):
    """Over every timestep once, the expected reduction is what `gated` gives on that one large batch."""
    batch = Batch(sdxl_scheduler, timesteps=torch.arange(0, 1000, 4))
    expected, gated = (
        PerceptualObjective(latent_distance, sdxl_scheduler, lpl_t_threshold=200, lpl_reduction=r)(
            *batch.arguments()
        ).loss.item()
        for r in ("expected", "gated")
    )
    assert expected == pytest.approx(gated, rel=1e-5)


def test_gated_reduction_is_the_mean_over_gated(sdxl_scheduler, latent_distance):
    batch = Batch(sdxl_scheduler)
    objective = PerceptualObjective(latent_distance, sdxl_scheduler, lpl_scale=False, lpl_reduction="gated", p_gate=0.9)
    for rows in ([1, 2, 3, 6], [0, 1, 3], [5, 6, 7]):
        gated = [r for r in rows if r in GATED]
        expected = batch.latent_errors()[gated].mean().item()
        assert objective(*batch.arguments(rows)).loss.item() == pytest.approx(expected, rel=1e-5)


def test_p_gate_from_a_number_or_from_weights(sdxl_scheduler, latent_distance):
    weights = timestep_probabilities(1000, "earlier", multiplier=3.0, portion=0.2)
    objectives = [PerceptualObjective(latent_distance, sdxl_scheduler, p_gate=p) for p in (None, 0.5, weights)]
    p_gates = [0.674, 0.5, (0.6 + 0.474) / 1.4]
    assert [o.p_gate for o in objectives] == pytest.approx(p_gates)
    losses = [o(*Batch(sdxl_scheduler).arguments()).loss.item() for o in objectives]
    assert [loss * p for loss, p in zip(losses, p_gates, strict=True)] == pytest.approx(
        3 * [losses[0] * 0.674], rel=1e-6
    )


@pytest.mark.parametrize("reduction", ["expected", "gated"])
@pytest.mark.parametrize("max_samples", [1, 2, 3])
def test_max_samples_is_unbiased(sdxl_scheduler, latent_distance, reduction, max_samples):
    """The mean over all orders of the batch is the term without a limit; value and gradient."""
    options = {"lpl_reduction": reduction}
    batch = Batch(sdxl_scheduler, timesteps=torch.tensor([700, 150, 20, 3]))
    objective = PerceptualObjective(latent_distance, sdxl_scheduler, **options)
    limited = PerceptualObjective(latent_distance, sdxl_scheduler, lpl_max_samples=max_samples, **options)
    whole = objective(*batch.arguments()).loss
    terms = [limited(*batch.arguments(list(order))) for order in itertools.permutations(range(4))]
    assert {term.num_samples for term in terms} == {max_samples}
    assert max(latent_distance.batch_sizes[1:]) == max_samples
    assert terms[0].metrics["lpl/num_samples"] == 3
    mean = torch.stack([term.loss for term in terms]).mean()
    assert mean.item() == pytest.approx(whole.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, batch.model_output, retain_graph=True)[0] for loss in (mean, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


def test_max_samples_above_the_gated_changes_nothing(sdxl_scheduler, latent_distance):
    batch = Batch(sdxl_scheduler)
    limited, free = (PerceptualObjective(latent_distance, sdxl_scheduler, lpl_max_samples=n) for n in (4, None))
    assert torch.equal(limited(*batch.arguments()).loss, free(*batch.arguments()).loss)


def test_sample_weight_multiplies_its_sample(sdxl_scheduler, latent_distance):
    batch = Batch(sdxl_scheduler)
    objective = PerceptualObjective(latent_distance, sdxl_scheduler, lpl_scale=False, p_gate=0.5)
    weight = torch.tensor([9.0, 0.5, 9.0, 0.0, 9.0, 2.0, 9.0, 1.0])
    term = objective(*batch.arguments(), sample_weight=weight)
    expected = (weight * batch.latent_errors())[GATED].sum() / (8 * 0.5)
    assert term.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_mask_reaches_the_loss_for_the_gated_samples(sdxl_scheduler, vae):
    batch = Batch(sdxl_scheduler)
    loss_fn = LatentPerceptualLoss(vae, num_blocks=1)
    objective = PerceptualObjective(loss_fn, sdxl_scheduler, lpl_scale=False, lpl_reduction="gated")
    mask = (torch.arange(64).view(8, 8) % 3 == 0).expand(8, 1, 8, 8) * torch.linspace(0, 1, 8).view(8, 1, 1, 1)
    arguments = batch.model_output, batch.noisy_latents, batch.alpha, batch.sigma, "epsilon"
    x0 = x0_from_output(*arguments)[GATED]
    expected = loss_fn(x0, batch.latents[GATED], mask[GATED]).per_sample.mean()
    assert objective(*batch.arguments(), mask=mask).loss.item() == pytest.approx(expected.item(), rel=1e-5)


# Nothing gated.


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_exact_zero_where_nothing_passes(prediction_type, random_latents):
    """No graph, and the decoder is never called."""
    scheduler = scheduler_for(prediction_type)
    batch = Batch(scheduler, prediction_type, timesteps=torch.tensor([760, 999]))
    vae, calls = tiny_vae(widths=(8, 16)), []
    for module in vae.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    term = PerceptualObjective(LatentPerceptualLoss(vae, num_blocks=2), scheduler)(*batch.arguments())
    assert term.loss.item() == 0
    assert term.loss.shape == ()
    assert not term.loss.requires_grad
    assert term.num_samples == 0
    assert calls == []
    assert term.metrics["lpl/num_samples"] == term.metrics["lpl/application_ratio"] == 0
    (batch.diffusion_loss() + term.loss).backward()
    assert batch.model_output.grad is not None


# Precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_noisy_latents_are_refused(sdxl_scheduler, latent_distance, dtype):
    """Also where no sample passes the gate, so that it shows at the first step."""
    batch = Batch(sdxl_scheduler)
    objective = PerceptualObjective(latent_distance, sdxl_scheduler)
    for timesteps in (TIMESTEPS, torch.full((8,), 999)):
        with pytest.raises(ValueError, match="noisy_latents"):
            objective(batch.model_output, batch.noisy_latents.to(dtype), batch.latents, timesteps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_model_output_gives_float32(sdxl_scheduler, vae, dtype):
    batch = Batch(sdxl_scheduler)
    objective = PerceptualObjective(LatentPerceptualLoss(vae, num_blocks=1), sdxl_scheduler)
    batch.model_output = batch.model_output.detach().to(dtype).requires_grad_()
    half = objective(*batch.arguments()).loss
    half.backward()
    assert half.dtype == torch.float32
    assert batch.model_output.grad.dtype == dtype
    batch.model_output = batch.model_output.detach().float().requires_grad_()
    assert torch.equal(half.detach(), objective(*batch.arguments()).loss)


def test_autocast_changes_no_bit(sdxl_scheduler, vae):
    batch = Batch(sdxl_scheduler)
    objective = PerceptualObjective(LatentPerceptualLoss(vae, num_blocks=1), sdxl_scheduler)
    outside = objective(*batch.arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective(*batch.arguments())
    assert torch.equal(inside.loss, outside.loss)
    gradients = [torch.autograd.grad(term.loss, batch.model_output)[0] for term in (inside, outside)]
    assert torch.equal(*gradients)


# The gate and the schedule.


def test_a_gate_that_is_given_replaces_the_default(sdxl_scheduler, latent_distance):
    for gate, passed in (
        (("lpl_sigma_threshold", 4.2), 5),
        (("lpl_t_threshold", 200), 2),
        (("lpl_snr_threshold", 16), 2),
    ):
        objective = PerceptualObjective(latent_distance, sdxl_scheduler, **dict([gate]))
        assert objective(*Batch(sdxl_scheduler).arguments()).num_samples == passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lpl_t_threshold": 200, "lpl_sigma_threshold": 3.0}, "contradictory gates"),
        ({"lpl_snr_threshold": 1.0, "lpl_sigma_threshold": 3.0}, "contradictory gates"),
        ({"lpl_t_threshold": 2000}, "outside the schedule"),
        ({"lpl_snr_threshold": 1e9}, "no timestep"),
        ({"lpl_reduction": "mean"}, "lpl_reduction 'mean'"),
        ({"p_gate": 0.0}, "p_gate"),
    ],
)
def test_contradicting_options_are_refused(sdxl_scheduler, latent_distance, options, message):
    with pytest.raises(ValueError, match=message):
        PerceptualObjective(latent_distance, sdxl_scheduler, **options)


def test_epsilon_at_zero_terminal_snr_is_refused_inside_the_gate_only(latent_distance):
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    assert alpha_sigma_table(scheduler)[0][-1] == 0
    with pytest.raises(ValueError, match="zero-terminal SNR"):
        PerceptualObjective(latent_distance, scheduler, lpl_t_threshold=1000)
    PerceptualObjective(latent_distance, scheduler, lpl_t_threshold=999)
    open_everywhere = PerceptualObjective(
        latent_distance, scheduler, lpl_t_threshold=1000, prediction_type="v_prediction"
    )
    last = torch.full((8,), 999)
    batch = Batch(scheduler, "v_prediction", timesteps=last)
    assert open_everywhere(*batch.arguments()).loss.isfinite()


def test_flow_needs_its_sigmas(latent_distance):
    batch = Batch(None, "flow")
    objective = PerceptualObjective(latent_distance, FlowMatchEulerDiscreteScheduler())
    assert objective.prediction_type == "flow"
    with pytest.raises(ValueError, match="pass sigmas"):
        objective(batch.model_output, batch.noisy_latents, batch.latents, batch.timesteps)


def test_flow_gates_by_sigma_not_by_the_timesteps_given(latent_distance):
    batch = Batch(None, "flow")
    objective = PerceptualObjective(latent_distance, FlowMatchEulerDiscreteScheduler())
    shifted = objective(batch.model_output, batch.noisy_latents, batch.latents, batch.timesteps * 0 + 999, batch.sigmas)
    assert torch.equal(shifted.loss, objective(*batch.arguments()).loss)


def test_prediction_type_is_the_schedulers(latent_distance):
    for prediction_type in DISCRETE:
        assert PerceptualObjective(latent_distance, scheduler_for(prediction_type)).prediction_type == prediction_type


# The meter.


def mean_square(term, output):
    """Mean over samples of |d own loss / d output|^2, the term being the mean of their losses."""
    gradient = torch.autograd.grad(term, output, retain_graph=True)[0] * len(output)
    return (gradient.square().sum() / len(output)).item()


@pytest.mark.parametrize("options", [{}, {"lpl_reduction": "gated"}, {"lpl_max_samples": 2, "lpl_scale": False}])
def test_gradient_meter_is_what_autograd_measures(each_type, vae, options):
    scheduler, of_type, batch = each_type
    objective = PerceptualObjective(
        LatentPerceptualLoss(vae, num_blocks=1), scheduler, lpl_weight=7.0, **of_type, **options
    )
    weight = torch.linspace(0.5, 2, 8)
    diffusion_loss = batch.diffusion_loss()
    term = objective(*batch.arguments(), sample_weight=weight, diffusion_loss=diffusion_loss)
    measured = term.metrics["diffusion/gradient_square"], term.metrics["lpl/gradient_square"]
    plain = (mean_square(t, batch.model_output) for t in (diffusion_loss, term.loss))
    for value, expected in zip(measured, plain, strict=True):
        assert not value.requires_grad
        assert value.item() == pytest.approx(expected, rel=1e-4)
    (diffusion_loss + term.loss).backward()


def test_meter_changes_nothing(sdxl_scheduler, vae):
    batch = Batch(sdxl_scheduler)
    objective = PerceptualObjective(LatentPerceptualLoss(vae, num_blocks=1), sdxl_scheduler)
    gradients = []
    for with_meter in (True, False):
        diffusion_loss = batch.diffusion_loss()
        term = objective(*batch.arguments(), diffusion_loss=diffusion_loss if with_meter else None)
        gradients.append(torch.autograd.grad(diffusion_loss + term.loss, batch.model_output)[0])
        assert ("lpl/gradient_square" in term.metrics) == with_meter
    assert torch.equal(*gradients)


def test_gradient_share():
    assert gradient_share(1.0, 9.0) == pytest.approx(0.25)
    assert gradient_share(0.0, 0.0) == gradient_share(0.0, 1.0) == 0
    assert gradient_share(4.0, 0.0) == 1


def test_metrics(sdxl_scheduler, vae):
    batch = Batch(sdxl_scheduler)
    loss_fn = LatentPerceptualLoss(vae)
    term = PerceptualObjective(loss_fn, sdxl_scheduler, lpl_weight=2.0)(*batch.arguments())
    x0 = x0_from_output(*batch.arguments()[:2], batch.alpha, batch.sigma, "epsilon")
    out = loss_fn(x0[GATED], batch.latents[GATED])
    snr = batch.snr()[GATED]
    expected = {
        "lpl/num_samples": 4,
        "lpl/application_ratio": 0.5,
        "lpl/weight": 2.0,
        "lpl/weighted_loss": term.loss.item(),
        "lpl/loss": out.per_sample.mean().item(),
        "lpl/snr_mean": snr.mean().item(),
        "lpl/snr_min": snr.min().item(),
        "lpl/snr_max": snr.max().item(),
        "lpl/features/layer_0/distance": out.per_layer["mid"].mean().item(),
        "lpl/features/layer_4/outlier_ratio": out.outlier_fraction["up_3"].mean().item(),
        "lpl/features/layer_2/mean": out.feature_mean["up_1"].mean().item(),
        "lpl/features/layer_3/std": out.feature_std["up_2"].mean().item(),
    }
    for name, value in expected.items():
        assert float(term.metrics[name]) == pytest.approx(value, rel=1e-5), name
    assert len([name for name in term.metrics if name.startswith("lpl/features/")]) == 5 * 4
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in term.metrics.values())


class RefuseBlockingCopies(TorchDispatchMode):
    """Raises at a copy between devices that would wait for the device."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            self.copies += 1
            assert kwargs.get("non_blocking"), f"blocking copy of {tuple(args[0].shape)}"
        return func(*args, **kwargs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "flow"])
def test_no_value_is_read_back_and_no_copy_waits(prediction_type):
    """Fails at an .item() a layer or step: the meta device has no values, and only the timesteps are on the CPU.

    As after the first calls, of which test_input_checks shows that they alone look at values.
    """
    vae = tiny_vae(widths=(8, 16)).to("meta")
    loss_fn = LatentPerceptualLoss(vae, num_blocks=2)
    loss_fn._unread_masks = 0
    objective = PerceptualObjective(loss_fn, scheduler_for(prediction_type), "auto", lpl_max_samples=3, checked_calls=0)
    output = torch.zeros(8, 4, 8, 8, device="meta", requires_grad=True)
    latents, mask, weight = (torch.zeros(8, *s, device="meta") for s in ((4, 8, 8), (1, 8, 8), ()))
    sigmas = TIMESTEPS / 1000 if prediction_type == "flow" else None
    with RefuseBlockingCopies() as watch:
        diffusion_loss = output.square().mean()
        term = objective(
            output, latents, latents, TIMESTEPS, sigmas, sample_weight=weight, mask=mask, diffusion_loss=diffusion_loss
        )
        (diffusion_loss + term.loss).backward()
        objective.end_step()
    assert watch.copies > 0
    assert term.num_samples == 3
    assert term.loss.device.type == output.grad.device.type == "meta"


def test_sigma_of_a_sample_is_its_own(each_type, latent_distance):
    """The order of a batch does not matter: nothing of one sample is applied to another."""
    scheduler, options, batch = each_type
    objective = PerceptualObjective(latent_distance, scheduler, **options)
    order = torch.tensor([7, 2, 5, 0, 1, 6, 3, 4])
    shuffled = objective(*batch.arguments(order)).loss
    assert shuffled.item() == pytest.approx(objective(*batch.arguments()).loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lpl_max_samples": 0}, "lpl_max_samples"),
        ({"snr_gamma": 0.0}, "snr_gamma"),
        ({"prediction_type": "flow"}, "discrete"),
        ({"prediction_type": "x0"}, "x0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_at_once(sdxl_scheduler, get_vae, options, message):
    with pytest.raises(ValueError, match=message):
        PerceptualObjective(LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=1), sdxl_scheduler, **options)
