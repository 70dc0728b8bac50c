"""Original names at SDXL's full size, without memory: diffusers' own converter finds its way back from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers_converter

from lpl.base.errors import UserError
from lpl.families import blueprint, sdxl_names
from lpl.families.sdxl_configs import PUBLISHED
from lpl.families.sdxl_export import clip_g_tensors, clip_l_tensors, unet_tensors, vae_tensors


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    """SDXL's networks on the meta device."""
    plan = blueprint(PUBLISHED)
    with torch.device("meta"):
        first, second = plan.text_encoders()
        return {"unet": plan.denoiser(), "vae": plan.vae(), "first": first, "second": second}


def shapes(tensors: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_unet(full: dict[str, Any]) -> None:
    unet = full["unet"]
    found = dict(unet_tensors(unet))
    assert len(found) == 1680
    assert {name.split(".")[2] for name in found} == {
        "input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out",
    }  # fmt: skip
    back = diffusers_converter.convert_ldm_unet_checkpoint(found, dict(unet.config))
    weights = unet.state_dict()
    assert back.keys() == weights.keys()
    # The same storage came back under each name, not just one of its shape.
    originals = {id(value): name for name, value in found.items()}
    assert len(originals) == 1680
    named = {name: sdxl_names.UNET + sdxl_names.unet_module(name, unet.config) for name in weights}
    assert [name for name in weights if back[name] is not found[named[name]]] == []


def test_vae(full: dict[str, Any]) -> None:
    found = dict(vae_tensors(full["vae"]))
    assert len(found) == 248
    assert tuple(found["first_stage_model.encoder.mid.attn_1.q.weight"].shape) == (512, 512, 1, 1)
    assert tuple(found["first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"].shape) == (128, 256, 1, 1)
    back = diffusers_converter.convert_ldm_vae_checkpoint(found, dict(full["vae"].config))
    assert shapes(back) == shapes(full["vae"].state_dict())


def test_text_encoders(full: dict[str, Any]) -> None:
    first, second = dict(clip_l_tensors(full["first"])), dict(clip_g_tensors(full["second"]))
    prefix = "conditioner.embedders.0.transformer.text_model."
    assert first.pop(f"{prefix}embeddings.position_ids").tolist() == [list(range(77))]
    assert len(first) == 196
    assert {name.removeprefix(prefix) for name in first} == {
        name.removeprefix("text_model.") for name in full["first"].state_dict()
    }
    scale = second.pop("conditioner.embedders.1.model.logit_scale")
    assert float(scale) == pytest.approx(4.6052, abs=1e-4)
    assert len(second) == 389
    layer = "conditioner.embedders.1.model.transformer.resblocks.31"
    assert tuple(second[f"{layer}.attn.in_proj_weight"].shape) == (3840, 1280)
    assert tuple(second[f"{layer}.mlp.c_fc.weight"].shape) == (5120, 1280)
    back = diffusers_converter.convert_open_clip_checkpoint(full["second"], second, "conditioner.embedders.1.model.")
    assert shapes(back) == shapes(full["second"].state_dict())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("down_blocks.1.attentions.0.norm", "input_blocks.4.1.norm"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
         "input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("down_blocks.1.downsamplers.0.conv", "input_blocks.6.0.op"),
        ("mid_block.attentions.0.transformer_blocks.9.ff.net.2", "middle_block.1.transformer_blocks.9.ff.net.2"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("up_blocks.0.attentions.2.proj_out", "output_blocks.2.1.proj_out"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_out", "out.2"),
    ],
)  # fmt: skip
def test_modules_as_published_files_name_them(module: str, expected: str) -> None:
    assert sdxl_names.unet_module(module, PUBLISHED["unet"]) == expected


@pytest.mark.parametrize("name", ["encoder_hid_proj.weight", "down_blocks.0.resnets.0.spatial.weight"])
def test_weight_without_a_place_is_named(name: str) -> None:
    with pytest.raises(UserError) as caught:
        sdxl_names.unet_module(name, PUBLISHED["unet"])
    assert str(caught.value).startswith(f"{name}: the original layout has no place")
