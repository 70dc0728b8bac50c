import pytest
import torch
from diffusers import AutoencoderTiny
from tiny_models import tiny_vae

from lpl.perceptual.decoders import decoder_taps


@pytest.mark.parametrize("size", [(8, 8), (6, 4)])
def test_walk_to_its_end_is_decode(any_vae, random_latents, size):
    """Fails where conv_in is fed directly, without post_quant_conv, or where a stage is left out."""
    raw = random_latents(any_vae, size=size)[1]
    walk = decoder_taps(any_vae)
    with torch.no_grad():
        x = walk.begin(raw)
        for stage, tap in enumerate(walk.taps):
            x = walk.run(stage, x)
            pixels = size[0] * walk.taps[0].stride
            assert x.shape == (2, tap.channels, pixels // tap.stride, size[1] * pixels // size[0] // tap.stride)
        assert torch.equal(walk.finish(x), any_vae.decode(raw).sample)


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
    assert walk.num_up_blocks == len(strides) - 1


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


def test_unknown_class_is_refused_by_name():
    with pytest.raises(ValueError, match="no walk through the decoder of AutoencoderTiny"):
        decoder_taps(
            AutoencoderTiny(
                decoder_block_out_channels=(8, 8),
                encoder_block_out_channels=(8, 8),
                num_decoder_blocks=(1, 1),
                num_encoder_blocks=(1, 1),
            ).eval()
        )


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="training mode"):
        decoder_taps(tiny_vae(widths=(8, 16)).train())
