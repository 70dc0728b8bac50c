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


# What VAEs state in other ways; the formulas are those of diffusers' pipelines, written out.


def numbers(count, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_statistics_of_a_batch_norm_hold_per_channel_and_phase():
    """Flux.2: cells of 2 x 2 as 4 C channels, in the order of Flux2Pipeline._patchify_latents."""
    norm = torch.nn.BatchNorm2d(12, eps=1e-4, affine=False)
    norm.running_mean, norm.running_var = numbers(12, 0).float(), numbers(12, 1).square().float() + 0.1
    vae = torch.nn.Module()
    vae.bn, vae.config = norm, SimpleNamespace(batch_norm_eps=1e-4)
    space, latents = LatentSpace.from_vae(vae), numbers(2 * 3 * 4 * 6, 2).view(2, 3, 4, 6)
    packed = latents.view(2, 3, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 2, 3)
    std = (norm.running_var.double() + 1e-4).sqrt().view(1, -1, 1, 1)
    packed = packed * std + norm.running_mean.double().view(1, -1, 1, 1)
    raw = packed.reshape(2, 3, 2, 2, 2, 3).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 4, 6)
    torch.testing.assert_close(space.to_raw(latents), raw)
    torch.testing.assert_close(space.from_raw(raw), latents)
    latents.requires_grad_()
    slope = numbers(latents.numel(), 3).view_as(latents)
    (expected,) = torch.autograd.grad(space.to_raw(latents), latents, slope)
    torch.testing.assert_close(space.gradient_from_raw(slope), expected)
    with pytest.raises(ValueError, match="3 x 2 cells: this latent space takes multiples of 2"):
        space.to_raw(torch.zeros(1, 3, 3, 2))


@pytest.mark.parametrize("factor", [None, 0.5])
def test_statistics_in_buffers(factor):
    """LTX: latents * std / scaling_factor + mean, of buffers that its config does not hold."""
    vae = torch.nn.Module()
    vae.register_buffer("latents_mean", numbers(4, 0).float())
    vae.register_buffer("latents_std", numbers(4, 1).abs().float() + 0.1)
    vae.config = SimpleNamespace(scaling_factor=factor)
    latents, shape = numbers(24, 2).view(1, 4, 2, 3), (1, 4, 1, 1)
    expected = latents * vae.latents_std.double().view(shape) / (factor or 1) + vae.latents_mean.double().view(shape)
    torch.testing.assert_close(LatentSpace.from_vae(vae).to_raw(latents), expected)


@pytest.mark.parametrize("name", ["z_dim", "latent_channels"])
def test_mean_and_std_alone(name):
    """Qwen-Image, Wan: no scaling_factor; GLM-Image: one that its pipeline does not use."""
    mean, std = [0.1, -0.2, 0.3], [1.5, 0.5, 2.0]
    latents = numbers(9, 0).view(1, 3, 3)
    expected = latents * torch.tensor(std).double().view(1, 3, 1) + torch.tensor(mean, dtype=torch.float64).view(
        1, 3, 1
    )
    config = SimpleNamespace(latents_mean=mean, latents_std=std, **{name: 3})
    torch.testing.assert_close(LatentSpace.from_config(config).to_raw(latents), expected)
    torch.testing.assert_close(LatentSpace.standardised(mean, std).to_raw(latents), expected)
    with pytest.raises(ValueError, match="3 latents_std for 5 channels"):
        LatentSpace.from_config(SimpleNamespace(latents_mean=mean, latents_std=std, **{name: 5}))


def test_rules_by_hand():
    latents = numbers(8, 0).view(2, 4)
    assert torch.equal(LatentSpace.identity().to_raw(latents), latents)
    torch.testing.assert_close(LatentSpace.scaled(0.5, 0.1).to_raw(latents), latents / 0.5 + 0.1)
    with pytest.raises(ValueError, match="map no latents"):
        LatentSpace.scaled(0)


@pytest.mark.parametrize("count", [1, 4])
def test_latents_of_other_channels_are_refused(count):
    """Of one channel they would become five."""
    space = LatentSpace.standardised([0.0] * 5, [1.0] * 5)
    for way in (space.to_raw, space.from_raw, space.gradient_from_raw):
        with pytest.raises(ValueError, match=f"latents have {count} channels, the latent space has 5"):
            way(torch.zeros(2, count, 4, 4))
