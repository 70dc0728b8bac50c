import copy
import itertools
import logging

import pytest
import torch
from tiny_models import tiny_vae

from lpl import LatentPerceptualLoss
from lpl.diffusion.latent_space import LatentSpace
from lpl.perceptual.distance import NORM_TYPES
from lpl.perceptual.textbook import decoder_features, textbook_lpl


def value_and_gradient(per_sample, pred):
    """Values and the gradient of a sum that tells the samples apart."""
    weights = torch.tensor([1.0, -2.0], dtype=per_sample.dtype)
    return per_sample.detach(), torch.autograd.grad((weights * per_sample).sum(), pred)[0]


def assert_equals_textbook(vae, pred, target, tolerance=1e-5, **options):
    """In float32; l1, whose gradient jumps where two features meet, in float64."""
    if options.get("loss_type") == "l1" and pred.dtype == torch.float32:
        vae, tolerance = copy.deepcopy(vae).double(), 1e-11
        pred, target = pred.detach().double().requires_grad_(), target.double()
    expected, expected_gradient = value_and_gradient(textbook_lpl(vae, pred, target, **options), pred)
    for checkpointing in (False, True):
        loss_fn = LatentPerceptualLoss(vae, checkpointing=checkpointing, dtype=pred.dtype, **options)
        value, gradient = value_and_gradient(loss_fn(pred, target).per_sample, pred)
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=0)
        assert (gradient - expected_gradient).norm() < tolerance * expected_gradient.norm()


@pytest.mark.parametrize("num_blocks", range(5))
@pytest.mark.parametrize("remove_outliers", [True, False])
@pytest.mark.parametrize("loss_type", ["mse", "l1"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_every_option_equals_textbook(get_vae, random_latents, norm_type, loss_type, remove_outliers, num_blocks):
    """Values and gradients, pow_law on and off, with and without checkpointing."""
    vae = get_vae("three_blocks")
    pred, target = random_latents(vae, size=(6, 10))
    for pow_law in (True, False):
        options = {"norm_type": norm_type, "loss_type": loss_type, "remove_outliers": remove_outliers}
        assert_equals_textbook(vae, pred, target, num_blocks=num_blocks, pow_law=pow_law, **options)


@pytest.mark.parametrize("num_blocks", range(6))
def test_every_decoder_equals_textbook(any_vae, random_latents, num_blocks):
    """Every number of blocks for every config, on non-square latents; the other options take turns."""
    pred, target = random_latents(any_vae, size=(4, 6) if len(any_vae.config.block_out_channels) > 4 else (8, 6))
    assert_equals_textbook(
        any_vae,
        pred,
        target,
        num_blocks=num_blocks,
        norm_type=NORM_TYPES[(num_blocks + 2) % 6],
        loss_type="l1" if num_blocks % 2 else "mse",
        pow_law=num_blocks != 3,
        remove_outliers=num_blocks != 2,
    )


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_double_precision_equals_textbook(get_vae, random_latents, norm_type):
    vae = get_vae("mean_std", torch.float64)
    pred, target = random_latents(vae, size=(8, 6), dtype=torch.float64)
    assert_equals_textbook(vae, pred, target, tolerance=1e-11, norm_type=norm_type)


@pytest.mark.parametrize("remove_outliers", [True, False])
@pytest.mark.parametrize("norm_type", ["default", "shared", "batch", "channel", "own"])
def test_gradient_is_the_derivative_of_the_value(get_vae, random_latents, norm_type, remove_outliers):
    """Finite differences; channel_detached is left out, since it is meant to differ."""
    vae = get_vae("two_blocks")
    pred, target = random_latents(vae, batch=1, size=(4, 3), dtype=torch.float64)
    loss_fn = LatentPerceptualLoss(
        vae, norm_type=norm_type, remove_outliers=remove_outliers, dtype=torch.float64, num_blocks=2
    )
    assert torch.autograd.gradcheck(lambda pred: loss_fn(pred, target).per_sample, pred, fast_mode=True)


# Values computed by hand.


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("two_blocks", [1, 1 / 2, 1 / 2]),
        ("three_blocks", [1, 1 / 2, 1 / 4, 1 / 4]),
        ("four_blocks", [1, 1 / 2, 1 / 4, 1 / 8, 1 / 8]),
        ("five_blocks", [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]),
    ],
)
def test_layer_weights_follow_the_resolution(get_vae, random_latents, name, weights):
    """Fails where weights are keyed on the block's index: the last two layers have one resolution and one weight."""
    vae = get_vae(name)
    pred, target = random_latents(vae, size=(4, 4))
    for pow_law, expected in ((True, weights), (False, [1] * len(weights))):
        loss_fn = LatentPerceptualLoss(vae, num_blocks=9, pow_law=pow_law)
        assert loss_fn.weights == expected
        out = loss_fn(pred, target)
        total = sum(w * d for w, d in zip(expected, out.per_layer.values(), strict=True)) / len(expected)
        torch.testing.assert_close(out.per_sample.detach(), total)


@pytest.mark.parametrize("name", ["two_blocks", "three_blocks", "four_blocks", "five_blocks"])
def test_outliers_are_masked_where_the_stride_is_2_or_1(get_vae, random_latents, monkeypatch, name):
    """Fails where the mask or its windows are keyed on the block's index: the last three layers, by their strides."""
    strides = []
    monkeypatch.setattr(
        "lpl.perceptual.distance.inlier_mask", lambda y, low, high, stride: strides.append(stride) or (y == y)
    )
    vae = get_vae(name)
    LatentPerceptualLoss(vae, num_blocks=9)(*random_latents(vae, size=(4, 4)))
    assert strides == [2, 1, 1]  # once for each, with the target's statistics


def test_outliers_change_the_loss_where_they_are_masked(vae, random_latents):
    """So that the comparisons above do compare masks."""
    pred, target = random_latents(vae)
    on = LatentPerceptualLoss(vae)(pred, target)
    off = LatentPerceptualLoss(vae, remove_outliers=False)(pred, target)
    assert [(on.outlier_fraction[tap] > 0).all().item() for tap in on.per_layer] == [False, False, True, True, True]
    assert all((fraction == 0).all() for fraction in off.outlier_fraction.values())
    for tap in on.per_layer:
        same = torch.allclose(on.per_layer[tap], off.per_layer[tap], rtol=1e-4)
        assert same == (tap in ("mid", "up_0"))


def loss_on_features(stride, norm_type="shared", **options):
    """A loss whose decoder has one stage that passes latents on, so that a feature map can be written down."""
    return LatentPerceptualLoss(stages=[lambda x: x], strides=[stride], norm_type=norm_type, **options)


@pytest.mark.parametrize(("loss_type", "expected"), [("mse", (0.4 + 4 + 0.4) / 8), ("l1", (0.8 + 2 + 0.8) / 8)])
def test_distance_of_two_small_maps(loss_type, expected):
    """Unit vectors (.6, .8) (0, 1) (1, 0) (0, 1) against (0, 1) (0, 1) (-1, 0) (.6, .8): 4 locations, 2 channels."""
    pred = torch.tensor([[[[3.0, 0.0], [1.0, 0.0]], [[4.0, 2.0], [0.0, 1.0]]]])
    target = torch.tensor([[[[0.0, 0.0], [-1.0, 0.6]], [[5.0, 1.0], [0.0, 0.8]]]])
    out = loss_on_features(stride=8, norm_type="default", loss_type=loss_type)(pred, target)
    torch.testing.assert_close(out.per_sample, torch.tensor([expected]))


def test_masked_values_are_left_out_of_the_mean():
    """Stride 2: the spike and its 8 neighbours go; what is left of channel 0 differs by 1, of channel 1 by 3."""
    target = torch.zeros(1, 2, 16, 16)
    target[:, :, ::2] = 1
    target[:, 1] *= 2
    target[0, 0, 8, 8] = 1000
    pred = target.clone()
    pred[:, 0] += 1
    pred[:, 1] += 3
    pred[0, 0, 7:10, 7:10] = -500
    out = loss_on_features(stride=2, norm_type="batch", loss_type="l1")(pred, target)
    masked = target.clone()
    masked[0, 0, 7:10, 7:10] = 0
    std = masked.std((0, 2, 3))
    torch.testing.assert_close(out.per_sample, ((1 / std[0] + 3 / std[1]) / 2)[None])
    torch.testing.assert_close(out.outlier_fraction["stage_0"], torch.tensor([9 / 512]))


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_channel_without_inliers_counts_zero(norm_type):
    """Fails where sum(mask * d) / sum(mask) becomes 0/0: a constant channel has no inlier at all."""
    generator = torch.Generator().manual_seed(0)
    target, error = (torch.randn(1, 2, 16, 16, generator=generator) for _ in range(2))
    target[:, 1] = 3.0
    pred = (target + 0.1 * error).requires_grad_()
    out = loss_on_features(stride=2, norm_type=norm_type)(pred, target)
    assert 0.5 <= out.outlier_fraction["stage_0"] < 0.6
    (gradient,) = torch.autograd.grad(out.per_sample.sum(), pred)
    assert out.per_sample.item() > 0
    assert gradient.isfinite().all()
    if norm_type.startswith("channel") or norm_type == "batch":
        assert (gradient[:, 1] == 0).all()


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_zero_features_have_loss_and_gradient_zero(norm_type):
    pred = torch.zeros(2, 2, 4, 4, requires_grad=True)
    out = loss_on_features(stride=1, norm_type=norm_type)(pred, torch.zeros(2, 2, 4, 4))
    (gradient,) = torch.autograd.grad(out.per_sample.sum(), pred)
    assert (out.per_sample == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("size", [(1, 2), (2, 2), (3, 3)])
def test_maps_under_50_values(get_vae, random_latents, norm_type, size):
    """The last map of two blocks at 3 x 3 has 36 values: fails where the 0th order statistic is asked for."""
    vae = get_vae("two_blocks")
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 2, 4, *size, generator=generator).unbind()
    out = LatentPerceptualLoss(vae, num_blocks=2, norm_type=norm_type)(pred.requires_grad_(), target)
    assert out.per_sample.isfinite().all()
    assert out.gradient.isfinite().all()
    # Two values that are nearly equal have a deviation that float32 rounds away.
    vae, pred = copy.deepcopy(vae).double(), pred.detach().double().requires_grad_()
    assert_equals_textbook(vae, pred, target.double(), 1e-9, num_blocks=2, norm_type=norm_type)


def test_equal_latents_have_loss_zero(vae, random_latents):
    """But for `default` with outliers: the target's lengths leave the masked values out, the prediction's do not."""
    _, target = random_latents(vae)
    for norm_type, loss_type in itertools.product(NORM_TYPES, ("mse", "l1")):
        loss_fn = LatentPerceptualLoss(
            vae, norm_type=norm_type, loss_type=loss_type, remove_outliers=norm_type != "default"
        )
        assert (loss_fn(target, target).per_sample == 0).all()


# What it returns.


def test_per_layer_is_detached_float32_without_the_layer_weight(vae, random_latents):
    pred, target = random_latents(vae)
    out = LatentPerceptualLoss(vae)(pred, target)
    plain = LatentPerceptualLoss(vae, pow_law=False)(pred, target)
    for tap in out.per_layer:
        assert torch.equal(out.per_layer[tap], plain.per_layer[tap])
    for values in (out.per_layer, out.outlier_fraction, out.feature_mean, out.feature_std):
        assert list(values) == ["mid", "up_0", "up_1", "up_2", "up_3"]
        assert all(v.shape == (2,) and v.dtype == torch.float32 and not v.requires_grad for v in values.values())


def test_feature_statistics_are_the_targets(vae, random_latents):
    pred, target = random_latents(vae)
    out = LatentPerceptualLoss(vae)(pred, target)
    for tap, feature in zip(out.feature_mean, decoder_features(vae, target, 4, False), strict=True):
        torch.testing.assert_close(out.feature_mean[tap], feature.mean((1, 2, 3)))
        torch.testing.assert_close(out.feature_std[tap], feature.std((1, 2, 3)))


def test_samples_do_not_mix(vae, random_latents):
    """A batch gives what its samples give alone."""
    pred, target = random_latents(vae, batch=3)
    loss_fn = LatentPerceptualLoss(vae)
    alone = torch.cat([loss_fn(pred[i : i + 1], target[i : i + 1]).per_sample for i in range(3)])
    torch.testing.assert_close(loss_fn(pred, target).per_sample, alone)


def test_gradient_flows_into_the_prediction_only(vae, random_latents):
    pred, target = random_latents(vae)
    target.requires_grad_()
    out = LatentPerceptualLoss(vae)(pred, target)
    out.per_sample.mean().backward()
    assert target.grad is None
    torch.testing.assert_close(pred.grad, out.gradient / 2)
    pred.grad = None


def test_no_graph_without_a_gradient_to_compute(vae, random_latents):
    pred, target = random_latents(vae)
    loss_fn = LatentPerceptualLoss(vae)
    with_gradient = loss_fn(pred, target)
    assert with_gradient.per_sample.requires_grad
    with torch.no_grad():
        under_no_grad = loss_fn(pred, target)
    for out in (under_no_grad, loss_fn(pred.detach(), target)):
        assert not out.per_sample.requires_grad
        assert out.gradient is None
        assert torch.equal(out.per_sample, with_gradient.per_sample)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_no_feature_map_outlives_the_call(vae, random_latents, checkpointing):
    pred, target = random_latents(vae)
    out = LatentPerceptualLoss(vae, checkpointing=checkpointing)(pred, target)
    assert [t.shape for t in out.per_sample.grad_fn.saved_tensors] == [pred.shape]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_give_float32_results(vae, random_latents, dtype):
    """Equal to the float32 result of the same values; the gradient arrives in the input's precision."""
    pred, target = (x.detach().to(dtype) for x in random_latents(vae))
    pred.requires_grad_()
    loss_fn = LatentPerceptualLoss(vae)
    out = loss_fn(pred, target)
    assert out.per_sample.dtype == out.gradient.dtype == torch.float32
    assert torch.equal(out.per_sample, loss_fn(pred.float(), target.float()).per_sample)
    (gradient,) = torch.autograd.grad(out.per_sample.sum(), pred)
    assert torch.equal(gradient, out.gradient.to(dtype))


@pytest.mark.parametrize("checkpointing", [True, False])
def test_autocast_changes_no_bit(vae, random_latents, checkpointing):
    """Fails where the decoder or its gradient runs under the caller's autocast."""
    pred, target = random_latents(vae)
    loss_fn = LatentPerceptualLoss(vae, checkpointing=checkpointing)
    outside = loss_fn(pred, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_fn(pred, target)
        (gradient,) = torch.autograd.grad(inside.per_sample.sum(), pred)
    assert torch.equal(inside.per_sample, outside.per_sample)
    assert torch.equal(inside.gradient, outside.gradient)
    assert torch.equal(gradient, outside.gradient)
    for tap in outside.per_layer:
        assert torch.equal(inside.per_layer[tap], outside.per_layer[tap])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_decoder_is_a_private_copy_and_close(get_vae, random_latents, dtype):
    vae = get_vae("two_blocks")
    pred, target = random_latents(vae)
    exact, half = (LatentPerceptualLoss(vae, num_blocks=2, dtype=d) for d in (torch.float32, dtype))
    a, b = exact(pred, target), half(pred, target)
    assert b.per_sample.dtype == b.gradient.dtype == torch.float32
    torch.testing.assert_close(b.per_sample, a.per_sample, rtol=0.05, atol=0)
    assert torch.cosine_similarity(a.gradient.flatten(), b.gradient.flatten(), 0) > 0.98
    assert {p.dtype for p in vae.parameters()} == {torch.float32}


def test_small_float16_gradients_do_not_vanish():
    """Gradients here are about 1e-8, below float16's smallest number; fails where nothing scales them on the way."""
    generator = torch.Generator().manual_seed(0)
    target = torch.full((1, 2, 64, 64), 64.0)
    pred = (target + torch.randint(1, 9, target.shape, generator=generator) / 16).requires_grad_()
    exact, half = (
        loss_on_features(stride=8, dtype=dtype)(pred, target).gradient for dtype in (torch.float32, torch.float16)
    )
    assert exact.abs().max() < 2e-8
    torch.testing.assert_close(half, exact, rtol=2e-3, atol=0)


# The mask.


def test_mask_of_ones_is_no_mask(vae, random_latents):
    pred, target = random_latents(vae)
    loss_fn = LatentPerceptualLoss(vae)
    everywhere = loss_fn(pred, target, torch.ones(2, 1, 8, 8))
    torch.testing.assert_close(everywhere.per_sample, loss_fn(pred, target).per_sample)


def test_empty_mask_counts_zero_for_its_sample_alone(vae, random_latents):
    pred, target = random_latents(vae)
    mask = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    loss_fn = LatentPerceptualLoss(vae)
    out, full = loss_fn(pred, target, mask), loss_fn(pred, target)
    assert out.per_sample[0] == 0
    assert (out.gradient[0] == 0).all()
    torch.testing.assert_close(out.per_sample[1], full.per_sample[1])
    torch.testing.assert_close(out.gradient[1], full.gradient[1])


@pytest.mark.parametrize("remove_outliers", [False, True])
def test_mask_weighs_the_mean_over_features(remove_outliers):
    """Per channel sum(mask * d) / sum(mask), outliers left out."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 2, 16, 16, generator=generator)
    pred = target + torch.randn(1, 2, 16, 16, generator=generator)
    if remove_outliers:
        target[0, 0, 3, 3] = 100
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8, :8], mask[..., 12:, :] = 1.0, 0.25
    loss_fn = loss_on_features(stride=2, norm_type="batch", remove_outliers=remove_outliers)
    out = loss_fn(pred, target, mask)
    inside = torch.zeros(2, 16, 16)
    inside[:, :8, :8], inside[:, 12:] = 1.0, 0.25
    if remove_outliers:
        inside[0, 2:5, 2:5] = target[0, 0, 2:5, 2:5] = 0
        target = target * (torch.arange(16) >= 0)
    distance = ((pred - target) / (target.std((0, 2, 3), keepdim=True) + 1e-6))[0].square()
    expected = ((inside * distance).sum((1, 2)) / inside.sum((1, 2))).mean()
    torch.testing.assert_close(out.per_sample, expected[None])


def test_mask_is_enlarged_to_each_map(vae, random_latents):
    pred, target = random_latents(vae)
    mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = LatentPerceptualLoss(vae, norm_type="shared", remove_outliers=False)(pred, target, mask)
    pairs = zip(decoder_features(vae, pred, 4, False), decoder_features(vae, target, 4, False), strict=True)
    for value, (x, y) in zip(out.per_layer.values(), pairs, strict=True):
        inside = torch.nn.functional.interpolate(mask, x.shape[-2:], mode="nearest")
        distance = ((x - y) / (y.norm(dim=1, keepdim=True) + 1e-6)).square()
        expected = ((inside * distance).sum((2, 3)) / inside.sum((2, 3))).mean(1)
        torch.testing.assert_close(value, expected.detach())


# The decoder is the caller's.


def test_decoder_is_not_run_past_the_last_tap(vae, random_latents, weights_used):
    pred, target = random_latents(vae)
    blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    for num_blocks in range(5):
        loss_fn = LatentPerceptualLoss(vae, num_blocks=num_blocks)
        used = weights_used(lambda loss_fn=loss_fn: loss_fn(pred, target))
        reached = [block.resnets[0].conv1.weight.data_ptr() in used for block in blocks]
        assert reached == [i <= num_blocks for i in range(5)]
        assert vae.decoder.conv_out.weight.data_ptr() not in used


def test_more_blocks_than_there_are_is_said_once(get_vae, caplog):
    with caplog.at_level(logging.WARNING):
        loss_fn = LatentPerceptualLoss(get_vae("two_blocks"), num_blocks=4)
    assert len(loss_fn.taps) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "num_blocks 4: this decoder has 2 up blocks, all tapped"
    ]


def test_owns_no_weights_and_freezes_the_decoder(random_latents):
    vae = tiny_vae(widths=(8, 16)).requires_grad_(True)
    loss_fn = LatentPerceptualLoss(vae, num_blocks=2)
    trainer = torch.nn.Linear(2, 2)
    trainer.loss_fn = loss_fn
    assert not isinstance(loss_fn, torch.nn.Module)
    assert set(trainer.state_dict()) == {"weight", "bias"}
    assert not any(p.requires_grad for m in (vae.decoder, vae.post_quant_conv) for p in m.parameters())
    assert all(p.requires_grad for p in vae.encoder.parameters())
    assert loss_fn.decoder.modules()[1] is vae.decoder
    trainer.train()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    pred, target = random_latents(vae)
    loss_fn(pred, target).per_sample.sum().backward()
    pred.grad = None
    assert all(p.grad is None for p in vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert not vae.training


def test_training_mode_is_refused(random_latents):
    vae = tiny_vae(widths=(8, 16))
    pred, target = random_latents(vae)
    loss_fn = LatentPerceptualLoss(vae, num_blocks=2)
    vae.train()
    with pytest.raises(ValueError, match=r"\.eval\(\) on it"):
        loss_fn(pred, target)
    with pytest.raises(ValueError, match=r"vae\.eval"):
        LatentPerceptualLoss(vae)


def test_changed_dtype_is_refused(random_latents):
    vae = tiny_vae(widths=(8, 16))
    pred, target = random_latents(vae)
    loss_fn = LatentPerceptualLoss(vae, num_blocks=2)
    vae.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"cast to torch\.bfloat16 after the loss was built for torch\.float32"):
        loss_fn(pred, target)


def test_private_copy_does_not_follow_the_vae(random_latents):
    """A bf16 VAE with a float32 loss: the copy stays what it was when the VAE is cast on or trained."""
    vae = tiny_vae(widths=(8, 16)).to(torch.bfloat16)
    pred, target = random_latents(tiny_vae(widths=(8, 16)))
    loss_fn = LatentPerceptualLoss(vae, num_blocks=2)
    before = loss_fn(pred, target).per_sample
    vae.to(torch.float16)
    assert torch.equal(loss_fn(pred, target).per_sample, before)


@pytest.mark.parametrize(
    ("pred", "target", "message"),
    [
        ((2, 4, 8, 8), (1, 4, 8, 8), "one shape"),
        ((4, 8, 8), (4, 8, 8), "one shape"),
        ((0, 4, 8, 8), (0, 4, 8, 8), "one shape"),
        ((2, 3, 8, 8),) * 2 + ("3 channels",),
    ],
)
def test_shapes_that_do_not_fit_are_refused(vae, pred, target, message):
    with pytest.raises(ValueError, match=message):
        LatentPerceptualLoss(vae)(torch.zeros(pred), torch.zeros(target))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"norm_type": "layer"}, "norm_type"), ({"loss_type": "huber"}, "loss_type"), ({"num_blocks": -1}, "num_blocks")],
)
def test_unknown_options_are_refused_by_name(vae, option, message):
    with pytest.raises(ValueError, match=message):
        LatentPerceptualLoss(vae, **option)


def test_given_latent_space_replaces_the_configs(get_vae, random_latents):
    pred, target = random_latents(get_vae("mean_std"))
    c = get_vae("mean_std").config
    std, mean = (torch.tensor(v, dtype=torch.float64) for v in (c.latents_std, c.latents_mean))
    plain = LatentPerceptualLoss(get_vae("four_blocks"), latent_space=LatentSpace(std / c.scaling_factor, mean))
    assert torch.equal(
        plain(pred, target).per_sample, LatentPerceptualLoss(get_vae("mean_std"))(pred, target).per_sample
    )
