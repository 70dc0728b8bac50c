"""What only an accelerator can show: the same numbers as the CPU, no waiting, and half-precision decoders."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_models import tiny_vae

from lpl import LatentPerceptualLoss, PerceptualObjective
from lpl.diffusion.prediction import add_noise, alpha_sigma_table
from lpl.perceptual.distance import NORM_TYPES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
TIMESTEPS = torch.tensor([800, 150, 950, 20])
"""Two of the four pass the default gate."""


@pytest.fixture(autouse=True)
def exact_float32():
    """TF32 convolutions keep 10 bits: enough to train, not to compare."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def vaes():
    """The same weights on the CPU and on the device."""
    return tiny_vae(), tiny_vae().to(DEVICE)


def random_latents(device, batch=2):
    generator = torch.Generator().manual_seed(0)
    target, error = torch.randn(2, batch, 4, 8, 8, generator=generator)
    target[..., 2, 1] *= 30
    return (target + 0.3 * error).to(device).requires_grad_(), target.to(device)


def assert_gradients_agree(gradient, expected, tolerance):
    assert (gradient.cpu() - expected.cpu()).norm() < tolerance * expected.norm().cpu()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss_type", ["mse", "l1"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_cpu_and_device_agree(vaes, norm_type, loss_type, checkpointing):
    options = {"norm_type": norm_type, "loss_type": loss_type, "checkpointing": checkpointing}
    on_cpu = LatentPerceptualLoss(vaes[0], **options)(*random_latents("cpu"))
    on_device = LatentPerceptualLoss(vaes[1], **options)(*random_latents(DEVICE))
    assert on_device.per_sample.device.type == on_device.gradient.device.type == DEVICE
    torch.testing.assert_close(on_device.per_sample.cpu(), on_cpu.per_sample, rtol=1e-3, atol=0)
    assert_gradients_agree(on_device.gradient, on_cpu.gradient, tolerance=1e-2)
    for tap in on_cpu.per_layer:
        torch.testing.assert_close(on_device.per_layer[tap].cpu(), on_cpu.per_layer[tap], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_layouts_agree(vaes, dtype):
    first, last = (
        LatentPerceptualLoss(vaes[1], dtype=dtype, channels_last=layout)(*random_latents(DEVICE))
        for layout in (False, True)
    )
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(last.per_sample, first.per_sample, rtol=tolerance, atol=0)
    assert_gradients_agree(last.gradient, first.gradient, tolerance=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(vaes, dtype):
    """The decoder and its gradient keep float32; kernels that add in no fixed order are allowed their last bits."""
    loss_fn = LatentPerceptualLoss(vaes[1])
    outside = loss_fn(*random_latents(DEVICE))
    with torch.autocast(DEVICE, dtype=dtype):
        inside = loss_fn(*random_latents(DEVICE))
    torch.testing.assert_close(inside.per_sample, outside.per_sample, rtol=1e-5, atol=0)
    assert_gradients_agree(inside.gradient, outside.gradient, tolerance=1e-4)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_decoder_is_finite_and_close(vaes, dtype, norm_type):
    exact, half = (LatentPerceptualLoss(vaes[1], norm_type=norm_type, dtype=d) for d in (torch.float32, dtype))
    a, b = exact(*random_latents(DEVICE)), half(*random_latents(DEVICE))
    assert b.per_sample.dtype == b.gradient.dtype == torch.float32
    assert b.gradient.isfinite().all()
    torch.testing.assert_close(b.per_sample, a.per_sample, rtol=0.1, atol=0)
    assert torch.cosine_similarity(a.gradient.flatten(), b.gradient.flatten(), 0) > 0.95


def test_private_copy_follows_the_latents_to_the_device():
    """The loss is built on the CPU before the trainer moves anything."""
    loss_fn = LatentPerceptualLoss(tiny_vae(), dtype=torch.bfloat16)
    assert loss_fn(*random_latents(DEVICE)).per_sample.device.type == DEVICE


@pytest.fixture(params=["epsilon", "flow"])
def step(request, vaes):
    """One call of the objective with its backward pass, everything on the device but the timesteps and sigmas."""
    flow = request.param == "flow"
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDPMScheduler()
    objective = PerceptualObjective(LatentPerceptualLoss(vaes[1]), scheduler, "auto", lpl_max_samples=2)
    sigmas = TIMESTEPS / 1000 if flow else None
    model_output, latents = random_latents(DEVICE, batch=4)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    alpha, sigma = (1 - sigmas, sigmas) if flow else (c[TIMESTEPS].float() for c in alpha_sigma_table(scheduler))
    noisy_latents = add_noise(latents, noise, alpha, sigma)
    mask, weight = torch.ones(4, 1, 8, 8).to(DEVICE), torch.ones(4).to(DEVICE)

    def run():
        diffusion_loss = model_output.square().mean()
        arguments = model_output, noisy_latents, latents, TIMESTEPS, sigmas, weight, mask, diffusion_loss
        term = objective(*arguments)
        (diffusion_loss + term.loss).backward()
        objective.end_step()
        return term

    return run


def test_a_step_never_waits_for_the_device(step):
    """Fails at an .item() a layer or step, and at a blocking copy; the first three calls look at what they are fed."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        term = step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert term.num_samples == 2
    assert term.loss.isfinite()
    assert all(isinstance(v, float) or v.isfinite().all() for v in term.metrics.values())


@pytest.mark.parametrize("reduction", ["expected", "gated"])
def test_objective_agrees_with_the_cpu(vaes, reduction):
    losses, gradients = [], []
    for vae, device in zip(vaes, ("cpu", DEVICE), strict=True):
        objective = PerceptualObjective(LatentPerceptualLoss(vae), DDPMScheduler(), lpl_reduction=reduction)
        model_output, latents = random_latents(device, batch=4)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(device)
        noisy_latents = DDPMScheduler().add_noise(latents, noise, TIMESTEPS.to(device))
        for timesteps in (TIMESTEPS, TIMESTEPS.to(device)):
            term = objective(model_output, noisy_latents, latents, timesteps)
            losses.append(term.loss.item())
            gradients.append(torch.autograd.grad(term.loss, model_output)[0])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)
    for gradient in gradients[1:]:
        assert_gradients_agree(gradient, gradients[0], tolerance=1e-2)


def test_nothing_gated_is_zero_on_the_device(vaes):
    objective = PerceptualObjective(LatentPerceptualLoss(vaes[1]), DDPMScheduler())
    model_output, latents = random_latents(DEVICE, batch=4)
    term = objective(model_output, latents, latents, torch.full((4,), 900))
    assert term.loss.device.type == DEVICE
    assert term.loss.item() == 0
    assert not term.loss.requires_grad
