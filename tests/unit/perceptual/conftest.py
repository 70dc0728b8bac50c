"""Tiny decoders and latents that the tests of this folder share, and a loss that needs no decoder."""

import functools

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_models import tiny_vae
from torch.utils._python_dispatch import TorchDispatchMode

from lpl.perceptual.loss import LPLOutput

VAE_CONFIGS = {
    "four_blocks": {},
    "no_post_quant_conv": {"use_post_quant_conv": False, "use_quant_conv": False},
    "shift": {"shift_factor": 0.3},
    "sixteen_channels": {"latent_channels": 16, "shift_factor": 0.1, "scaling_factor": 1.3},
    "mean_std": {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [1.5, 0.5, 2.0, 0.8]},
    "two_blocks": {"widths": (8, 16)},
    "three_blocks": {"widths": (8, 16, 16)},
    "five_blocks": {"widths": (4, 8, 8, 16, 16)},
}


@functools.cache
def build(name, dtype=torch.float32):
    return tiny_vae(**VAE_CONFIGS[name]).to(dtype)


@pytest.fixture(scope="session")
def get_vae():
    """A shared VAE by the name of its config (and dtype); tests that change a VAE make their own."""
    return build


@pytest.fixture(scope="session")
def vae():
    return build("four_blocks")


@pytest.fixture(scope="session", params=VAE_CONFIGS)
def any_vae(request):
    return build(request.param)


def _random_latents(vae, batch=2, size=(8, 8), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, vae.config.latent_channels, *size)
    target, error = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    target[..., 2, 1] *= 30
    return (target + 0.3 * error).to(dtype).requires_grad_(), target.to(dtype)


@pytest.fixture(scope="session")
def random_latents():
    """A function: (prediction that requires gradients, target); one location of the target is an outlier."""
    return _random_latents


@pytest.fixture(scope="session")
def sdxl_scheduler():
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


class LatentDistance:
    """Stands in for LatentPerceptualLoss where its value does not matter: L_i = mean (pred_i - target_i)^2."""

    reach = crop = None

    def __init__(self):
        self.batch_sizes = []

    def __call__(self, pred_latents, target_latents, mask=None, *, depth=None, windows=None):
        self.batch_sizes.append(len(pred_latents))
        error = pred_latents - target_latents
        per_sample = error.square().flatten(1).mean(1)
        return LPLOutput(per_sample, {}, {}, {}, {}, (2 * error / error[0].numel()).detach())


@pytest.fixture
def latent_distance():
    return LatentDistance()


class _Convolutions(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.weights.append(args[1].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="session")
def weights_used():
    """A function: where the weights lie that convolutions use while another function runs, in order."""

    def watch(function):
        with _Convolutions() as mode:
            function()
        return mode.weights

    return watch
