"""What a call costs and keeps: chunks, checkpointing, layouts, windows, live memory."""

import pytest
import torch
from tiny_models import tiny_vae

from lpl import LatentPerceptualLoss
from lpl.base.counter import StepCounter
from lpl.perceptual import strips
from lpl.perceptual.convolution import Convolution, Upsampling
from lpl.perceptual.distance import NORM_TYPES
from lpl.perceptual.frozen import Attention, Plain, Resnet
from lpl.perceptual.sweep import Crop


def equal(a, b, rtol=1e-5):
    torch.testing.assert_close(a.per_sample, b.per_sample, rtol=rtol, atol=0)
    assert (a.gradient - b.gradient).norm() <= rtol * b.gradient.norm()
    for mine, other in zip(a[1:5], b[1:5], strict=True):
        assert list(mine) == list(other)
        for name in mine:
            torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_chunks_change_nothing(vae, random_latents, norm_type):
    """Norm batch too, whose statistics are those of all samples."""
    pred, target = random_latents(vae, batch=5)
    mask = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = LatentPerceptualLoss(vae, norm_type=norm_type, chunk=5)(pred, target, mask)
    for chunk in (1, 2, None):
        equal(LatentPerceptualLoss(vae, norm_type=norm_type, chunk=chunk)(pred, target, mask), whole)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_and_strips_change_nothing(monkeypatch, vae, random_latents, checkpointing, channels_last):
    pred, target = random_latents(vae)
    options = {"checkpointing": checkpointing, "channels_last": channels_last}
    whole = LatentPerceptualLoss(vae)(pred, target)
    equal(LatentPerceptualLoss(vae, **options)(pred, target), whole)
    monkeypatch.setattr(strips, "STRIP_BYTES", {"cpu": 1})
    equal(LatentPerceptualLoss(vae, **options)(pred, target), whole)


def test_automatic_chunk_fills_256_pixels(vae, random_latents, weights_used):
    """64-pixel samples go 16 at a time."""
    conv_in = vae.decoder.conv_in.weight.data_ptr()
    for batch, calls in ((1, 1), (16, 1), (17, 2)):
        pred, target = random_latents(vae, batch=batch)
        used = weights_used(lambda pred=pred, target=target: LatentPerceptualLoss(vae, num_blocks=0)(pred, target))
        assert used.count(conv_in) == 2 * calls


def test_sdxl_decoder_runs_on_frozen_operations(get_vae, caplog):
    """No plain block in any of the decoders that SDXL's config describes."""
    for name in ("four_blocks", "no_post_quant_conv", "two_blocks"):
        kinds = {type(o) for s in LatentPerceptualLoss(get_vae(name), num_blocks=9).segments for o in s.operations}
        kinds |= {type(s.head) for s in LatentPerceptualLoss(get_vae(name), num_blocks=9).segments}
        assert Plain not in kinds
        assert {Convolution, Resnet, Attention, Upsampling} <= kinds


@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_blocks_fall_back_to_plain_ones_and_say_so(random_latents, caplog, checkpointing):
    """An attention up block has no frozen operations; the result is the textbook's all the same."""
    from lpl.perceptual.textbook import textbook_lpl

    vae = tiny_vae(widths=(8, 16))
    from diffusers.models.unets.unet_2d_blocks import AttnUpDecoderBlock2D

    torch.manual_seed(0)
    vae.decoder.up_blocks[0] = AttnUpDecoderBlock2D(
        16, 16, num_layers=2, resnet_groups=4, attention_head_dim=8, add_upsample=True
    ).eval()
    with caplog.at_level("INFO", logger="lpl"):
        loss_fn = LatentPerceptualLoss(vae, num_blocks=2, checkpointing=checkpointing)
    assert [r.getMessage() for r in caplog.records] == ["LPL: up_0 has no frozen operations and runs as plain blocks"]
    pred, target = random_latents(vae)
    expected = textbook_lpl(vae, pred, target, num_blocks=2)
    out = loss_fn(pred, target)
    torch.testing.assert_close(out.per_sample, expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(expected.sum(), pred)
    assert (out.gradient - gradient).norm() < 1e-5 * gradient.norm()


def meta_loss(widths=(32, 64, 128, 128), dtype=torch.float32, **options):
    with torch.device("meta"):
        vae = tiny_vae_on_meta(widths).to(dtype)
    return LatentPerceptualLoss(vae, dtype=dtype, **options)


def tiny_vae_on_meta(widths):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths, layers_per_block=2, latent_channels=4,
    ).eval()  # fmt: skip


def peak(loss_fn, batch=1, pixels=256):
    pred = torch.empty(batch, 4, pixels // 8, pixels // 8, device="meta").requires_grad_()
    return count_peak_bytes(lambda: loss_fn(pred, pred.detach()))


def count_peak_bytes(run):
    with StepCounter() as counter:
        run()
    return counter.peak


def test_peak_is_flat_in_the_number_of_samples():
    loss_fn = meta_loss()
    one = peak(loss_fn)
    assert peak(loss_fn, batch=8) == pytest.approx(one, rel=0.01)
    for options, pixels in (({"norm_type": "channel"}, 256), ({}, 512)):  # own's strips are a part of a small image's
        one = peak(meta_loss(**options), pixels=pixels)
        assert peak(meta_loss(chunk=8, **options), batch=8, pixels=pixels) > 6 * one


@pytest.mark.slow
def test_checkpointing_halves_the_peak_and_windows_lower_it():
    plain = peak(meta_loss(), pixels=512)
    assert peak(meta_loss(checkpointing=True), pixels=512) < 0.55 * plain
    loss_fn = meta_loss(crop=256)
    pred = torch.empty(1, 4, 64, 64, device="meta").requires_grad_()
    cropped = count_peak_bytes(lambda: loss_fn(pred, pred.detach(), windows=torch.zeros(1, 2)))
    assert cropped < 0.4 * plain


@pytest.mark.slow
def test_sample_of_1024_pixels_in_bfloat16_takes_under_2_gib():
    """SDXL's decoder, all blocks, outliers removed, with checkpointing."""
    loss_fn = meta_loss((128, 256, 512, 512), torch.bfloat16, checkpointing=True)
    assert peak(loss_fn, pixels=1024) < 2 * 2**30


# Windows.


def test_window_over_the_whole_map_changes_nothing(vae, random_latents):
    pred, target = random_latents(vae)
    windows = torch.tensor([[0.2, 0.9], [0.5, 0.0]])
    equal(LatentPerceptualLoss(vae, crop=64)(pred, target, windows=windows), LatentPerceptualLoss(vae)(pred, target))


def test_windows_lie_where_the_draws_say():
    x = torch.arange(2 * 6 * 8.0).view(2, 1, 6, 8)
    crop = Crop(3, torch.tensor([[0.0, 0.0], [0.999, 0.999]]), (6, 8))
    assert torch.equal(crop.cut(x), torch.stack([x[0, :, :3, :3], x[1, :, 3:, 5:]]))
    assert Crop(7, torch.tensor([[0.5, 0.5]]), (6, 8)).shape == [6, 7]
    y, saved = crop.forward(x, keep=True)
    back = crop.backward(saved, torch.ones_like(y))
    assert back.sum() == y.numel()
    assert (back[0, 0, :3, :3] == 1).all()
    assert (back[1, 0, 3:, 5:] == 1).all()


def test_middle_block_is_compared_whole_and_the_rest_in_the_window(vae, random_latents):
    pred, target = random_latents(vae, batch=1)
    whole = LatentPerceptualLoss(vae)(pred, target)
    out = LatentPerceptualLoss(vae, crop=32)(pred, target, windows=torch.zeros(1, 2))
    assert torch.equal(out.per_layer["mid"], whole.per_layer["mid"])
    assert not torch.allclose(out.per_layer["up_0"], whole.per_layer["up_0"])
    assert out.gradient.isfinite().all()


def test_window_gradient_is_the_derivative_of_its_value(get_vae, random_latents):
    vae = get_vae("two_blocks", torch.float64)
    pred, target = random_latents(vae, size=(6, 5), dtype=torch.float64)
    loss_fn = LatentPerceptualLoss(vae, num_blocks=2, crop=6, dtype=torch.float64)
    windows, mask = torch.tensor([[0.1, 0.9], [0.7, 0.4]]), torch.ones(2, 1, 6, 5)
    mask[:, :, :2] = 0.5
    assert torch.autograd.gradcheck(
        lambda pred: loss_fn(pred, target, mask, windows=windows).per_sample, pred, fast_mode=True
    )


def test_crop_and_windows_go_together(vae, random_latents):
    pred, target = random_latents(vae)
    for loss_fn, windows in (
        (LatentPerceptualLoss(vae, crop=32), None),
        (LatentPerceptualLoss(vae), torch.zeros(2, 2)),
    ):
        with pytest.raises(ValueError, match="windows"):
            loss_fn(pred, target, windows=windows)


def test_float16_overflow_is_not_hidden(random_latents):
    """Features beyond 65504 become infinite, and so every bound of the outlier mask: the loss must not read 0."""
    vae = tiny_vae()
    vae.decoder.mid_block.resnets[1].conv2.weight.mul_(1e5)
    pred, target = random_latents(vae)
    assert LatentPerceptualLoss(vae)(pred, target).per_sample.isfinite().all()
    assert not LatentPerceptualLoss(vae, dtype=torch.float16)(pred, target).per_sample.isfinite().any()
    assert LatentPerceptualLoss(vae, dtype=torch.bfloat16)(pred, target).per_sample.isfinite().all()
