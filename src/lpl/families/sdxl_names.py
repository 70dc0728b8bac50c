"""Names of the weights of SDXL and its LoRAs: from diffusers' and peft's to those of other programs.

ComfyUI, A1111 and kohya's trainers use the original layout of Stability's own release. The names are made by rules, for
any depth and width.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lpl.base.errors import UserError
from lpl.families.lora_files import text_module
from lpl.families.lora_names import WeightOf, renamed_lora, underscored

ARCHITECTURE = "stable-diffusion-xl-v1-base"
IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"
UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_L = "conditioner.embedders.0.transformer.text_model."
CLIP_G = "conditioner.embedders.1.model."

_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_KINDS = "resnets|attentions|downsamplers|upsamplers"
_UNET_BLOCK = re.compile(
    rf"(down_blocks|up_blocks)\.(\d+)\.({_KINDS})\.(\d+)\.(.+)|(mid_block)\.({_KINDS})\.(\d+)\.(.+)"
)
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_G = (
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.token_embedding", "token_embedding"),
    ("final_layer_norm", "ln_final"),
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn", "attn"),
)


def unet_module(name: str, config: Mapping[str, Any]) -> str:
    """The original name of one of the UNet's modules, or of a weight in it, without the prefix.

    The original numbers the parts of all blocks consecutively. With L = layers_per_block, block i down holds parts 1 +
    i (L + 1) to (i + 1)(L + 1), the last of them its downsampler; block i up holds parts i (L + 1) to i (L + 1) + L,
    its upsampler being a further layer of the last of them. In a part the resnet is layer 0, the attention layer 1.

    Args:
        name: as in `named_modules` or `state_dict` of a UNet2DConditionModel.
        config: that model's config; layers_per_block and up_block_types are used.

    Raises:
        UserError: a name that the original UNet has no place for.
    """
    for outside, original in _UNET_OUTSIDE.items():
        if name == outside or name.startswith(f"{outside}."):
            return original + name.removeprefix(outside)
    layers = config["layers_per_block"]
    match = _UNET_BLOCK.match(name)
    if match is None or not isinstance(layers, int):
        raise UserError(f"{name}: the original layout has no place for this weight of the UNet")
    if match[6]:
        kind, layer, rest = match[7], int(match[8]), match[9]
        place = f"middle_block.{2 * layer if kind == 'resnets' else 2 * layer + 1}"
    else:
        block, kind, layer, rest = int(match[2]), match[3], int(match[4]), match[5]
        start = block * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{start + layers + 1}.0.op{rest.removeprefix('conv')}"
        if kind == "upsamplers":
            attends = "Attn" in config["up_block_types"][block]
            return f"output_blocks.{start + layers}.{2 if attends else 1}.{rest}"
        part = f"input_blocks.{1 + start + layer}" if match[1] == "down_blocks" else f"output_blocks.{start + layer}"
        place = f"{part}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        head, dot, tail = rest.partition(".")
        if head not in _UNET_RESNET:
            raise UserError(f"{name}: the original layout has no place for this weight of the UNet")
        rest = _UNET_RESNET[head] + dot + tail
    return f"{place}.{rest}"


def vae_weight(name: str, num_blocks: int) -> str:
    """The original name of a weight of an AutoencoderKL with num_blocks blocks, without the prefix.

    The original counts the decoder's blocks from the image, diffusers from the latents.
    """
    new = re.sub(r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
    new = re.sub(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", new)
    match = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets\.|upsamplers\.0\.)", new)
    if match is not None:
        part = "block." if match[2] == "resnets." else "upsample."
        new = f"decoder.up.{num_blocks - 1 - int(match[1])}.{part}{new[match.end() :]}"
    match = re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)\.(weight|bias)$", new)
    if match is not None:
        side, kind, layer, part, end = match.groups()
        if kind == "resnets":
            new = f"{side}.mid.block_{int(layer) + 1}.{part}.{end}"
        else:
            new = f"{side}.mid.attn_{int(layer) + 1}.{_VAE_ATTENTION[part]}.{end}"
    return new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def is_vae_projection(name: str) -> bool:
    """Whether an original name is an attention's weight: a 1 x 1 convolution there, a matrix in diffusers."""
    return re.search(r"\.attn_\d+\.(q|k|v|proj_out)\.weight$", name) is not None


def clip_g_weight(name: str) -> str:
    """OpenCLIP's name of a weight of CLIPTextModelWithProjection, without the prefix; q, k and v keep theirs."""
    new = name.removeprefix("text_model.")
    for ours, original in _CLIP_G:
        new = new.replace(ours, original)
    return new


_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
_MLP = ("ff.net.0.proj", "ff.net.2")
_RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
_REST = (*_RESNET, "proj_in", "proj_out", "downsamplers.0.conv", "upsamplers.0.conv")
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention_mlp": _ATTENTION + _MLP,
    "all": _ATTENTION + _MLP + _REST,  # what kohya's networks.lora with conv_dim and LyCORIS' full preset reach
}
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_MLP = ("fc1", "fc2")
TEXT_LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "attention": TEXT_ATTENTION,
    "attention_mlp": TEXT_ATTENTION + TEXT_MLP,
    "all": TEXT_ATTENTION + TEXT_MLP,
}


def with_text(targets: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """A denoiser's LORA_TARGETS with those of CLIP text encoders."""
    return {name: layers + TEXT_LORA_TARGETS[name] for name, layers in targets.items()}


WITH_TEXT = with_text(LORA_TARGETS)


def kohya_layer(part: str, module: str, unet: Mapping[str, Any]) -> str:
    """kohya's name of a layer: the original UNet's name with underscores for dots, or one of transformers' names.

    So lora_unet_input_blocks_4_1_proj_in, lora_te1_text_model_encoder_layers_0_mlp_fc1, and lora_te2_ for CLIP-G.

    Args:
        unet: the UNet's config; its blocks are used.
    """
    if part == "unet":
        return underscored("lora_unet", unet_module(module, unet))
    prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
    return underscored(prefix, text_module(module))


def to_kohya(
    lora: Path, configs: Mapping[str, Any], title: str, weight_of: WeightOf | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA file of SDXL in kohya's naming: see renamed_lora.

    Args:
        configs: configs of its model; the UNet's blocks are used.

    Raises:
        UserError: see renamed_lora.
    """
    version = {"ss_base_model_version": "sdxl_base_v1-0"}  # A1111 finds the LoRA's model by this
    layer = partial(kohya_layer, unet=configs["unet"])
    return renamed_lora(lora, layer, version | modelspec(title, f"{ARCHITECTURE}/lora"), weight_of)


def modelspec(title: str, architecture: str, implementation: str = IMPLEMENTATION) -> dict[str, str]:
    """Metadata for every file, by Stability AI's model specification 1.0.0."""
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
