"""Where SDXL's LoRAs go, and the names that their tensors are saved under."""

from __future__ import annotations

from typing import Any

from peft.utils import get_peft_model_state_dict
from torch import Tensor

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
WITH_TEXT = {name: layers + TEXT_LORA_TARGETS[name] for name, layers in LORA_TARGETS.items()}
"""The same where the text encoders are trained too."""


def adapter_of(name: str, part: Any) -> dict[str, Tensor]:
    """An adapter's tensors under peft's names; those of text encoders begin with text_model.

    transformers 5 has dropped that prefix for CLIP-L. ComfyUI and earlier versions know the layers by it only, and
    diffusers takes it away where it must.
    """
    tensors = get_peft_model_state_dict(part, save_embedding_layers=False)
    if name == "unet":
        return tensors
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}
