"""One frame of the causal video decoders, and HunyuanImage: frozen operations against the plain blocks."""

import copy
import logging

import pytest
import torch
from tiny_vaes import vae_of
from torch import nn

from benchmarks import loss_cost
from lpl import LatentPerceptualLoss
from lpl.perceptual import strips
from lpl.perceptual.decoders.folding import duplicate
from lpl.perceptual.frozen import NormSiLUConvolution, Plain, differentiable
from lpl.perceptual.precision import walk_difference


def latents(seed, dtype=torch.float64, channels=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, 6, 5, generator=generator, dtype=torch.float64).to(dtype)


def check_frozen_is_plain(vae, dtype=torch.float64, tolerance=1e-6, **options):
    """The classes' own upsampling rounds to float32, so that float64 differs by its rounding."""
    channels = vae.decoder.conv_in.in_channels
    target = latents(1, dtype, channels)
    pred = (target + 0.3 * latents(0, dtype, channels)).requires_grad_()
    mask = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(2))
    loss_fn = LatentPerceptualLoss(vae, num_blocks=3, dtype=dtype, **options)
    frozen = loss_fn(pred, target, mask)
    loss_fn.segments = loss_fn.clip_segments
    plain = loss_fn(pred, target, mask)
    torch.testing.assert_close(frozen.per_sample, plain.per_sample, rtol=tolerance, atol=0)
    assert (frozen.gradient - plain.gradient).norm() < tolerance * plain.gradient.norm()
    assert float(plain.gradient.norm()) > 0


@pytest.mark.parametrize("strip_bytes", [2**23, 256])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen", "wan22", "hunyuan_image"])
def test_frozen_operations_are_exact(monkeypatch, name, checkpointing, strip_bytes):
    monkeypatch.setitem(strips.STRIP_BYTES, "cpu", strip_bytes)
    check_frozen_is_plain(vae_of(name), checkpointing=checkpointing)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_other_precisions(dtype, tolerance):
    for name in ("wan", "hunyuan_image"):
        check_frozen_is_plain(vae_of(name), dtype, tolerance, norm_type="shared")


def test_frozen_operations_to_the_end_are_decode():
    for name in ("qwen", "wan22"):
        for raw in (latents(0, torch.float32), latents(0, torch.float32).unsqueeze(2).repeat(1, 1, 2, 1, 1)):
            assert walk_difference(vae_of(name), raw) < 1e-4


def test_a_third_of_what_autograd_keeps_is_kept():
    """Qwen-Image's decoder at full width, counted on the meta device at 64 px."""
    _, vae, channels, stride = next(loss_cost.causal_vaes("meta"))
    loss_fn, kept = LatentPerceptualLoss(vae), []
    pred = torch.empty(1, channels, 64 // stride, 64 // stride, device="meta").requires_grad_()
    for segments in (loss_fn.clip_segments, loss_fn.segments):
        loss_fn.segments = list(segments)
        kept.append(loss_cost.count_call(loss_fn, pred)[1])
    assert kept[1] < 0.30 * kept[0]


def test_all_but_attention_is_frozen():
    for name, plain in (("qwen", 1), ("wan", 1), ("wan22", 1), ("qwen21", 4), ("hunyuan_image", 0)):
        segments = LatentPerceptualLoss(vae_of(name), num_blocks=3).segments
        assert sum(isinstance(o, Plain) for segment in segments for o in segment.operations) == plain


def test_blocks_of_another_build_run_as_plain_ones_and_the_log_says_so(caplog):
    vae = copy.deepcopy(vae_of("wan"))
    vae.decoder.up_blocks[1].resnets[0].nonlinearity = nn.ReLU()
    vae.decoder.up_blocks[0].upsamplers[0].resample[0].mode = "bilinear"
    vae.decoder.mid_block.resnets[1].nonlinearity = nn.GELU()
    vae.eval()  # modules are made in training mode
    with caplog.at_level(logging.INFO, logger="lpl"):
        check_frozen_is_plain(vae)
    for name in ("mid", "up_0", "up_1"):
        assert f"{name} has no frozen operations" in caplog.text
    assert "up_2" not in caplog.text
    caplog.clear()
    vae = copy.deepcopy(vae_of("hunyuan_image"))
    vae.decoder.up_blocks[0].nonlinearity = nn.GELU()
    with caplog.at_level(logging.INFO, logger="lpl"):
        check_frozen_is_plain(vae.eval())
    assert caplog.text.count("no frozen operations") == caplog.text.count("up_0 has") > 0


def test_weights_are_those_of_the_module_at_each_call():
    """Fails where a slice that is cut out once goes stale: changed in place, loaded, or moved to another precision."""
    vae = copy.deepcopy(vae_of("qwen"))
    loss_fn = LatentPerceptualLoss(vae)
    pred, target = latents(0, torch.float32), latents(1, torch.float32)
    before = loss_fn(pred, target).per_sample
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(-2)
    changed = loss_fn(pred, target).per_sample
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(changed, LatentPerceptualLoss(vae)(pred, target).per_sample)
    vae.decoder.conv_in.weight.data = vae.decoder.conv_in.weight.data / -2
    torch.testing.assert_close(loss_fn(pred, target).per_sample, before)


@pytest.mark.parametrize("bias", [False, True])
def test_rms_norm_is_autograds(bias):
    """Also where all channels are 0, with and without a bias."""
    torch.manual_seed(0)

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.randn(6, 1, 1, dtype=torch.float64))
            self.bias = nn.Parameter(torch.randn(6, 1, 1, dtype=torch.float64)) if bias else 0.0

    norm, convolution = Norm(), nn.Conv2d(6, 3, 3, padding=1).double()
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    x[0, :, 1, 2] = 1e-9
    x.requires_grad_()
    normal = nn.functional.normalize(x, dim=1) * 6**0.5 * norm.gamma + norm.bias
    expected = convolution(nn.functional.silu(normal))
    found = differentiable(NormSiLUConvolution(norm, convolution, lambda f: f))(x)
    torch.testing.assert_close(found, expected)
    slope = torch.randn(expected.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad(y, x, slope)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_shortcut_is_the_blocks_own():
    shortcut = vae_of("wan22").decoder.up_blocks[0].avg_shortcut
    x = torch.randn(2, shortcut.in_channels, 3, 2, dtype=torch.float64).requires_grad_()
    expected = shortcut(x.unsqueeze(2), first_chunk=True).squeeze(2)
    found = differentiable(duplicate(shortcut))(x)
    assert torch.equal(found, expected)
    slope = torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(*[torch.autograd.grad(y, x, slope)[0] for y in (found, expected)])
