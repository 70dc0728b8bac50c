import copy
import inspect

import diffusers
import pytest
import torch
from tiny_models import tiny_vae
from tiny_vaes import FRAMES, VAES, decode, latents_of, vae_of
from torch import nn

from lpl import LatentPerceptualLoss
from lpl.diffusion.latent_space import LatentSpace
from lpl.perceptual.decoders import DECODERS, REFUSED, decoder_taps
from lpl.perceptual.distance import NORM_TYPES
from lpl.perceptual.feature_maps import map_of, mask_at, mean_of_rows
from lpl.perceptual.textbook import lpl_of_features


def walk_maps(walk, raw):
    """The maps at all taps, and the image."""
    state, maps = walk.begin(raw), []
    for stage in range(len(walk.taps)):
        state = walk.run(stage, state)
        maps.append(map_of(state, walk.frames))
    return maps, walk.finish(state)


@torch.no_grad()
def check_walk(vae, raw):
    """The walk run to its end equals decode bit for bit, and its maps have the channels and strides that it says."""
    walk = decoder_taps(vae)
    maps, image = walk_maps(walk, raw)
    assert torch.equal(image, decode(vae, raw))
    for tap, features in zip(walk.taps, maps, strict=True):
        assert features.shape[1] == tap.channels
        assert [side * tap.stride for side in features.shape[-2:]] == list(image.shape[-2:])


@pytest.mark.parametrize("size", [(8, 8), (6, 4)])
def test_walk_to_its_end_is_decode(any_vae, random_latents, size):
    """Fails where conv_in is fed directly, without post_quant_conv, or where a stage is left out."""
    check_walk(any_vae, random_latents(any_vae, size=size)[1].detach())


@pytest.mark.parametrize("name", VAES)
def test_walk_of_every_class_is_its_decode(name):
    one_at_a_time = name in ("hunyuan_video15", "hunyuan_refiner")  # whose decode takes no more without slicing
    check_walk(vae_of(name), latents_of(name, batch=1 if one_at_a_time else 2))


def test_every_walked_class_is_tried():
    tried = {type(vae_of(name)).__name__ for name in VAES}
    assert tried == set(DECODERS)


def own_loss(name, **options):
    space = {"cosmos": LatentSpace.identity(), "kvae": LatentSpace.identity()}.get(name)
    return LatentPerceptualLoss(vae_of(name), num_blocks=9, dtype=torch.float64, latent_space=space, **options)


def check_against_autograd(name, mask=None, batch=2, **options):
    """Values and gradient of the loss against the definition on plain features, in float64."""
    pred, target = (latents_of(name, batch, seed, torch.float64) for seed in (0, 1))
    pred = (target + 0.3 * pred).requires_grad_()
    if mask is not None:
        mask = mask(target[:, :1])
    loss_fn = own_loss(name, **options)
    walk = decoder_taps(copy.deepcopy(vae_of(name)).double())
    x, y = (walk_maps(walk, loss_fn.latent_space.to_raw(latents))[0] for latents in (pred, target))
    expected = torch.zeros(batch, dtype=torch.float64)
    rest = {"norm_type": "own", "loss_type": "mse"} | options
    for tap, prediction, wanted in zip(walk.taps, x, y, strict=True):
        insides = None if mask is None else [mask_at(mask, wanted, walk.frames)]
        rows = lpl_of_features(
            [prediction], [wanted], [tap.stride], **rest, pow_law=False, remove_outliers=True, insides=insides
        )
        expected = expected + tap.stride / walk.taps[0].stride / len(x) * mean_of_rows(rows, batch)
    out = loss_fn(pred, target, mask).per_sample
    weights = torch.tensor([1.0, -2.0])[:batch]
    gradient, expected_gradient = (torch.autograd.grad((weights * v).sum(), pred)[0] for v in (out, expected))
    torch.testing.assert_close(out.detach(), expected.detach(), rtol=1e-5, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert float(expected_gradient.norm()) > 0


@pytest.mark.parametrize("name", VAES)
def test_gradient_through_every_class_is_autograds(name):
    check_against_autograd(name, batch=1 if name in FRAMES else 2)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize(
    ("name", "loss_type", "masked"), [("kvae", "l1", True), ("wan", "mse", True), ("wan", "l1", False)]
)
def test_every_norm_of_carried_states_and_of_frames(name, norm_type, loss_type, masked):
    def mask(like):
        return torch.rand(like.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    check_against_autograd(name, mask if masked else None, norm_type=norm_type, loss_type=loss_type)


def test_post_quant_conv_is_part_of_the_walk(vae, random_latents):
    """The features of conv_in fed directly are those of another latent."""
    raw = random_latents(vae)[1]
    assert not torch.allclose(decoder_taps(vae).begin(raw), vae.decoder.conv_in(raw), atol=0.1)


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("two_blocks", [2, 1, 1]),
        ("three_blocks", [4, 2, 1, 1]),
        ("four_blocks", [8, 4, 2, 1, 1]),
        ("five_blocks", [16, 8, 4, 2, 1, 1]),
    ],
)
def test_strides_and_names(get_vae, name, strides):
    walk = decoder_taps(get_vae(name))
    assert [tap.stride for tap in walk.taps] == strides
    assert [tap.name for tap in walk.taps] == ["mid", *(f"up_{i}" for i in range(len(strides) - 1))]


def test_channels(get_vae):
    assert decoder_taps(get_vae("sixteen_channels")).latent_channels == 16
    assert [tap.channels for tap in decoder_taps(get_vae("five_blocks")).taps] == [16, 16, 16, 8, 8, 4]


def test_modules_are_exactly_what_the_walk_runs(any_vae, random_latents):
    """What is frozen, checked and copied: no encoder, and nothing of the decoder left out."""
    expected = [m for m in (any_vae.post_quant_conv, any_vae.decoder) if m is not None]
    assert decoder_taps(any_vae).modules() == expected


def test_copy_is_private_and_of_the_dtype(vae, random_latents):
    raw = random_latents(vae)[1]
    walk = decoder_taps(vae)
    copy = walk.copy_to(torch.float64)
    own = {id(p) for m in walk.modules() for p in m.parameters()}
    copied = [p for m in copy.modules() for p in m.parameters()]
    assert own.isdisjoint(map(id, copied))
    assert {p.dtype for p in copied} == {torch.float64}
    assert next(vae.parameters()).dtype == torch.float32
    assert copy.taps == walk.taps
    torch.testing.assert_close(copy.begin(raw.double()).float(), walk.begin(raw))


def test_subclass_is_walked_like_its_base(vae):
    own = tiny_vae(widths=(8, 16))
    own.__class__ = type("Derived", (type(own),), {})
    assert len(decoder_taps(own).taps) == 3


# Videos.


@pytest.mark.parametrize("name", ["wan", "wan22", "svd"])
def test_one_frame_is_an_image(name):
    """(B, C, h, w), (B, C, 1, h, w) and one frame through the path of several give the same."""
    target = latents_of(name, 2, 1, torch.float64)[:, :, :1]
    pred = (target + 0.3 * latents_of(name, 2, 0, torch.float64)[:, :, :1]).requires_grad_()
    image = own_loss(name)(pred.squeeze(2), target.squeeze(2))
    frame = own_loss(name)(pred, target)
    assert torch.equal(image.per_sample, frame.per_sample)
    assert torch.equal(image.gradient, frame.gradient.squeeze(2))
    assert torch.equal(torch.autograd.grad(frame.per_sample.sum(), pred)[0], frame.gradient)


def test_mask_of_frames_follows_the_frames_that_come_of_each():
    mask = torch.tensor([[[[[1.0]], [[0.0]], [[2.0]]]]])
    assert mask_at(mask, torch.empty(5, 8, 1, 1), True).flatten().tolist() == [1, 0, 0, 2, 2]
    assert mask_at(mask, torch.empty(6, 8, 1, 1), True).flatten().tolist() == [1, 1, 0, 0, 2, 2]
    with pytest.raises(ValueError, match="3 frames does not fit 4"):
        mask_at(mask, torch.empty(4, 8, 1, 1), True)


def test_chunks_of_videos_are_the_whole():
    pred, target = (latents_of("wan", 3, seed, torch.float64) for seed in (0, 1))
    whole, parts = (own_loss("wan", chunk=n, norm_type="batch")(pred, target) for n in (3, 2))
    torch.testing.assert_close(whole.per_sample, parts.per_sample)


@pytest.mark.parametrize("name", ["magvit", "cogvideox", "qwen21"])
def test_more_frames_than_are_decoded_at_once_are_refused(name):
    latents = latents_of(name)[:, :, :1].repeat(1, 1, FRAMES[name] + 1, 1, 1)
    with pytest.raises(ValueError, match=f"{FRAMES[name] + 1} frames"):
        own_loss(name)(latents, latents)


def test_frames_of_an_image_decoder_are_refused(vae):
    latents = torch.zeros(1, 4, 2, 4, 4)
    with pytest.raises(ValueError, match=r"pass two \(B, C, h, w\)"):
        LatentPerceptualLoss(vae)(latents, latents)


# Refusals.


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_walked_is_refused_by_name_and_says_why(name):
    """The names are diffusers' own, where it has them."""
    if hasattr(diffusers, name):
        assert inspect.isclass(getattr(diffusers, name))
    with pytest.raises(ValueError, match=rf"decoder of {name}: .*; pass stages= or a HookTaps"):
        decoder_taps(type(name, (nn.Module,), {})().eval())


def test_every_decoder_of_diffusers_is_walked_or_refused_by_name():
    decode = {
        name
        for name in dir(diffusers)
        if inspect.isclass(value := getattr(diffusers, name))
        and value.__module__.startswith("diffusers.models.autoencoders.")
        and hasattr(value, "decode")
    }
    assert len(decode) >= len(DECODERS)
    assert decode <= {*DECODERS, *REFUSED}


@pytest.mark.parametrize("name", DECODERS)
def test_other_libraries_classes_of_a_known_name_are_refused(name):
    vae = type(name, (nn.Module,), {"decoder": nn.Module()})().eval()
    with pytest.raises(ValueError, match=f"is not diffusers' {name}.*pass stages= or a HookTaps"):
        decoder_taps(vae)


def test_vae_built_in_a_way_that_is_not_walked():
    ltx = copy.deepcopy(vae_of("ltx"))
    ltx.register_to_config(timestep_conditioning=True)
    with pytest.raises(ValueError, match="AutoencoderKLLTXVideo: its decoder is conditioned on a timestep"):
        decoder_taps(ltx)
    ltx.register_to_config(timestep_conditioning=False, decoder_inject_noise=(False, True))
    with pytest.raises(ValueError, match="injects noise"):
        decoder_taps(ltx)
    vq = copy.deepcopy(vae_of("vq"))
    vq.register_to_config(lookup_from_codebook=True)
    with pytest.raises(ValueError, match="codebook"):
        decoder_taps(vq)
    with pytest.raises(ValueError, match="sigma_data"):
        LatentPerceptualLoss(vae_of("cosmos"))


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        decoder_taps(tiny_vae(widths=(8, 16)).train())
