"""One .safetensors file in the original layout: what it holds is what trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lpl.config import ModelConfig
from lpl.families import load_family

# The tiny UNet: one resnet a block down, two up, attention in the inner block.
UNET_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_PARTS = [
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"(\w+)\.mid_block\.resnets\.0", r"\1.mid.block_1"),
    (r"(\w+)\.mid_block\.resnets\.1", r"\1.mid.block_2"),
    (r"(\w+)\.mid_block\.attentions\.0\.group_norm", r"\1.mid.attn_1.norm"),
    (r"(\w+)\.mid_block\.attentions\.0\.to_([qkv])\.", r"\1.mid.attn_1.\2."),
    (r"(\w+)\.mid_block\.attentions\.0\.to_out\.0", r"\1.mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]
CLIP_G = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def original_unet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        block = max((b for b in UNET_BLOCKS if name.startswith(f"{b}.")), key=len)
        rest = name.removeprefix(block)
        if ".resnets." in name:
            part = rest.split(".")[1]
            rest = rest.replace(part, UNET_RESNET[part])
        found[f"model.diffusion_model.{UNET_BLOCKS[block]}{rest}"] = value
    return found


def original_vae(weights: dict[str, Tensor], num_blocks: int = 3) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        new = name
        for pattern, replacement in VAE_PARTS:
            new = re.sub(pattern, replacement, new)
        if match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)", new):
            part = "upsample" if match[3] is None else f"block.{match[3]}"
            new = new.replace(match[0], f"decoder.up.{num_blocks - 1 - int(match[1])}.{part}")
        if ".attn_1." in new and new.endswith("weight") and ".norm." not in new:
            value = value[:, :, None, None]
        found[f"first_stage_model.{new}"] = value.contiguous()
    return found


def original_clip_g(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        new = name.removeprefix("text_model.")
        if new == "text_projection.weight":
            found["text_projection"] = value.T.contiguous()
            continue
        for diffusers_name, original in CLIP_G.items():
            new = new.replace(diffusers_name, original)
        if match := re.search(r"\.q_proj\.(weight|bias)$", new):
            qkv = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[new.replace(match[0], f".in_proj_{match[1]}")] = torch.cat(qkv)
        elif not re.search(r"\.[kv]_proj\.", new):
            found[new] = value
    return {f"conditioner.embedders.1.model.{name}": value for name, value in found.items()}


@pytest.fixture(scope="module")
def single_file(model: Path, shared: Path) -> Path:
    """The tiny SDXL as one file, in the layout of Stability's own releases."""

    def weights(part: str) -> dict[str, Tensor]:
        (file,) = (model / part).glob("*.safetensors")
        return load_file(file)

    clip_l = {f"conditioner.embedders.0.transformer.text_model.{n}": v for n, v in weights("text_encoder").items()}
    tensors = original_unet(weights("unet")) | original_vae(weights("vae")) | clip_l
    file = shared / "tiny_sdxl.safetensors"
    save_file(tensors | original_clip_g(weights("text_encoder_2")), file)
    return file


def test_its_weights_are_the_folders(single_file: Path, model: Path) -> None:
    from_file, from_folder = (
        load_family(config, torch.device("cpu"), torch.float32)
        for config in (ModelConfig(str(single_file), single_file_config=str(model)), ModelConfig(str(model)))
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        found, expected = (getattr(f.pipeline, part).state_dict() for f in (from_file, from_folder))
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == [], part
    assert (from_file.latent_key, from_file.text_key) == (from_folder.latent_key, from_folder.text_key)
    assert from_file.schedule.prediction_type == "epsilon"


def test_it_trains_as_the_folder_does(single_file: Path, model: Path, train: Any) -> None:
    """Up to rounding: weights lie in memory as in their file, and kernels add in another order where that differs."""
    smooth = {"adam_epsilon": 1e-2}  # updates that are no mere signs of the gradient
    run = train(**smooth, pretrained_model_name_or_path=single_file, single_file_config=model, output="file")
    expected = train(**smooth, output="folder")
    for name, values in expected.losses().items():
        assert list(run.losses()[name].values()) == pytest.approx(list(values.values()), rel=1e-5), name
    torch.testing.assert_close(run.unet(), expected.unet(), rtol=0, atol=1e-6)
    plan = train("--dry_run", pretrained_model_name_or_path=single_file, single_file_config=model, output="plan")
    assert "68,188 parameters" in plan.stdout


def test_plan_of_a_file_needs_its_configs(single_file: Path, train: Any) -> None:
    failed = train("--dry_run", pretrained_model_name_or_path=single_file, expect_error=True)
    assert "--single_file_config" in failed.errors[0]
