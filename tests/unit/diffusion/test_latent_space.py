from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_vae

from lpl.diffusion.latent_space import LatentSpace

CONFIGS = {
    "scale": {"scaling_factor": 0.13025},
    "scale_and_shift": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "shift_unset": {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None},
    "mean_and_std": {
        "scaling_factor": 0.5,
        "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
        "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        "shift_factor": 0.3,
    },
    "mean_alone_is_no_rule": {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0, 3.0, 4.0]},
}


@pytest.fixture(params=CONFIGS)
def space(request):
    return LatentSpace.from_config(SimpleNamespace(**CONFIGS[request.param]))


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (2, 4, 2, 3, 3)])
def test_round_trip_in_double_precision(space, shape):
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (space.from_raw(space.to_raw(latents)) - latents).abs().max() < 1e-14
    assert (space.to_raw(space.from_raw(latents)) - latents).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("scale", [0.26 / 0.13025] * 4),
        ("scale_and_shift", [0.26 / 1.5305 + 0.0609] * 4),
        ("shift_unset", [0.26 / 0.18215] * 4),
        ("mean_and_std", [2.758804, 4.955144, 2.022896, 5.235048]),
        ("mean_alone_is_no_rule", [0.52] * 4),
    ],
)
def test_values_by_hand(name, raw):
    """Of 0.26 in every channel; fails where the VAE's shift or latents_mean/std are ignored, both ways."""
    space = LatentSpace.from_config(SimpleNamespace(**CONFIGS[name]))
    latents, expected = torch.full((1, 4, 1, 1), 0.26), torch.tensor(raw).view(1, 4, 1, 1)
    torch.testing.assert_close(space.to_raw(latents), expected)
    torch.testing.assert_close(space.from_raw(expected), latents)


@pytest.mark.parametrize("name", ["scale_and_shift", "mean_and_std"])
def test_encoded_image_decodes_back_through_the_space(name):
    """Encoding and decoding name the same space: raw latents survive the way through model space."""
    vae = tiny_vae(widths=(8, 16), **CONFIGS[name])
    space = LatentSpace.from_config(vae.config)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    raw = vae.encode(image).latent_dist.mode()
    latents = space.from_raw(raw)
    assert not torch.allclose(latents, raw * vae.config.scaling_factor, atol=0.01)
    torch.testing.assert_close(vae.decode(space.to_raw(latents)).sample, vae.decode(raw).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision_is_the_inputs(space, dtype):
    latents = torch.ones(1, 4, 2, 2, dtype=dtype)
    assert space.to_raw(latents).dtype == space.from_raw(latents).dtype == dtype


def test_gradient_is_the_scale():
    space = LatentSpace.from_config(SimpleNamespace(**CONFIGS["mean_and_std"]))
    latents = torch.zeros(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(space.to_raw(latents).sum(), latents)
    std = torch.tensor(CONFIGS["mean_and_std"]["latents_std"], dtype=torch.float64)
    torch.testing.assert_close(gradient, (std / 0.5).view(1, 4, 1, 1).expand(1, 4, 2, 2))


@pytest.mark.parametrize("config", [{}, {"scaling_factor": None}])
def test_config_without_scaling_factor_is_refused(config):
    with pytest.raises(ValueError, match="no scaling_factor: pass latent_space="):
        LatentSpace.from_config(SimpleNamespace(**config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scaling_factor": 0}, "map no latents"),
        ({"scaling_factor": float("nan")}, "map no latents"),
        ({"scaling_factor": 1.0, "shift_factor": float("inf")}, "map no latents"),
        ({"scaling_factor": 1.0, "latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "map no latents"),
        ({"scaling_factor": 1.0, "latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "3 .* for 4 channels"),
    ],
)
def test_config_that_states_no_rule_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LatentSpace.from_config(SimpleNamespace(latent_channels=4, **config))
