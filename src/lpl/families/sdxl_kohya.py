"""A LoRA of SDXL under the names that kohya's programs, ComfyUI and A1111 read."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lpl.errors import UserError
from lpl.families.sdxl_names import unet_module
from lpl.families.sdxl_single_file import ARCHITECTURE
from lpl.json_files import parse_json
from lpl.shapes import number, require_shape

PARTS = ("unet", "text_encoder", "text_encoder_2")
ENDS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
METADATA = "lora_adapter_metadata"
"""diffusers' key of the adapter's peft configuration."""


def to_kohya(lora: Path, configs: Mapping[str, Any], title: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA file in diffusers' (peft's) naming, renamed; values and precision stay.

    A layer has the original UNet's name with underscores for dots (lora_unet_input_blocks_4_1_proj_in), or one of
    transformers' names in a text encoder (lora_te1_text_model_encoder_layers_0_mlp_fc1; lora_te2_ for CLIP-G), then
    .lora_down.weight, .lora_up.weight or .alpha. Those programs add (alpha / rank) up down to its weight.

    Args:
        lora: as `lpl train --rank` and diffusers' scripts write it.
        configs: of the model it belongs to, of which the UNet's blocks count.
        title: for the metadata.

    Raises:
        UserError: a file that holds something else; DoRA, which diffusers drops from such files without an error.
    """
    try:
        with safe_open(lora, "pt") as content:
            tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (it is no dict)
            adapter = parse_json((content.metadata() or {}).get(METADATA, "{}"), f"{lora}: {METADATA}")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{lora}: cannot be read as safetensors ({' '.join(str(error).split())})") from error
    alphas = {f"{part}.lora_alpha?": number(0, 1e6) for part in PARTS}
    require_shape(adapter, alphas, f"{lora}: {METADATA}", "train it anew, or merge it (--to safetensors)")
    for option in ("alpha_pattern", "use_rslora"):
        if any(adapter.get(f"{part}.{option}") for part in PARTS):
            raise UserError(f"{lora}: has peft's {option}, which is not renamed: merge it (--to safetensors)")
    found: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        if "lora_magnitude" in name:
            raise UserError(f"{lora}: a DoRA, which not all of those programs read right: merge it (--to safetensors)")
        end = next((end for end in ENDS if name.endswith(end)), None)
        part, _, module = name.removesuffix(end or "").partition(".")
        if end is None or part not in PARTS or tensor.dim() < 2:
            raise UserError(
                f"{lora}: holds {name}; only peft's naming (unet. or text_encoder. ... lora_A.weight) is renamed"
            )
        layer = _layer(part, module, configs)
        found[layer + ENDS[end]] = tensor
        if end == ".lora_A.weight":
            ranks[layer] = tensor.shape[0]
            # Where nothing is said, diffusers takes the rank.
            found[f"{layer}.alpha"] = torch.tensor(float(adapter.get(f"{part}.lora_alpha", tensor.shape[0])))
    missing = [layer for layer in ranks if f"{layer}.lora_up.weight" not in found]
    if missing or 3 * len(ranks) != len(found) or not ranks:
        raise UserError(f"{lora}: not a whole LoRA (a down or an up part is missing, or all of it)")
    rank = max(ranks.values())
    return found, _metadata(rank, float(found[f"{next(iter(ranks))}.alpha"]), title)


def _layer(part: str, module: str, configs: Mapping[str, Any]) -> str:
    """kohya's name of a layer of a component."""
    if part == "unet":
        return f"lora_unet_{unet_module(module, configs['unet']).replace('.', '_')}"
    prefix = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
    return f"{prefix}_text_model_{module.removeprefix('text_model.').replace('.', '_')}"


def _metadata(rank: int, alpha: float, title: str) -> dict[str, str]:
    return {
        "ss_base_model_version": "sdxl_base_v1-0",  # by this A1111 knows whose LoRA it is
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{ARCHITECTURE}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
