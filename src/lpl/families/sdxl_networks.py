"""SDXL's networks: denoiser and text encoders as one module, for training them together, and all of them for a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpl.config import ModelConfig
from lpl.families.pipeline_blueprint import PipelineBlueprint
from lpl.families.sdxl_check import SDXL_KIND
from lpl.families.sdxl_names import LORA_TARGETS, TEXT_ATTENTION, TEXT_MLP, WITH_TEXT
from lpl.families.sdxl_text import TOKENS_PER_CHUNK, embed, usual_layer


class SDXLJointModel(nn.Module):
    """The UNet with both text encoders before it: one module, so that engines wrap, shard and synchronise it once.

    Weights on which no output depends never take gradients: CLIP-L's last layers and its last norm, since the UNet
    sees the hidden states before them. All of CLIP-G acts, on the pooled embedding.

    Args:
        layer: of the hidden states that are used, see PromptEncoder.
        force_zeros: whether an empty caption is zeros instead of its encoding.
    """

    def __init__(self, unet: Any, text_encoder: Any, text_encoder_2: Any, layer: int, force_zeros: bool) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.text_encoder_2 = unet, text_encoder, text_encoder_2
        self.layer, self.force_zeros = layer, force_zeros

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, text: Mapping[str, Tensor], sizes: Tensor) -> Tensor:
        """The UNet's output, (B, C, h, w), for captions as `token_fields` gives them."""
        embeds, pooled = self.encode(text)
        return _run_unet(self.unet, noisy_latents, timesteps, embeds, pooled, sizes)

    def encode(self, text: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, chunks * length, C) and pooled embedding (B, P), with gradient."""
        ids, ids_2 = text["input_ids"].long(), text["input_ids_2"].long()
        embeds, pooled = embed(self.text_encoder, self.text_encoder_2, ids, ids_2, self.layer)
        if self.force_zeros:
            keep = text["is_empty"] == 0
            embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
        return embeds, pooled

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of blocks that FSDP keeps whole, as models name them: those that are in here."""
        parts: list[Any] = [self.unet, self.text_encoder, self.text_encoder_2]
        known = {name for part in parts for name in part._no_split_modules or ()}
        return sorted(known & {type(module).__name__ for module in self.modules()})

    @property
    def num_used(self) -> int:
        """Layers of CLIP-L that the hidden states come from."""
        return len(_body(self.text_encoder).encoder.layers) + 1 + self.layer

    def _idle(self) -> Iterator[nn.Parameter]:
        body = _body(self.text_encoder)
        yield from body.final_layer_norm.parameters()
        yield from body.encoder.layers[self.num_used :].parameters()

    def requires_grad_(self, requires_grad: bool = True) -> SDXLJointModel:
        """As torch's, but for weights on which no output depends, which stay without."""
        super().requires_grad_(requires_grad)
        for parameter in self._idle():
            parameter.requires_grad_(False)
        return self

    def add_adapter(self, config: LoraConfig) -> None:
        """Puts an adapter on the layers that the config names, those of the UNet and those of the encoders' layers."""
        names = set(config.target_modules or ())
        of_text = sorted(names & {*TEXT_ATTENTION, *TEXT_MLP})
        self.unet.add_adapter(replace(config, target_modules=sorted(names - set(of_text))))
        used = list(range(self.num_used))
        self.text_encoder.add_adapter(replace(config, target_modules=of_text, layers_to_transform=used))
        self.text_encoder_2.add_adapter(replace(config, target_modules=of_text))
        for encoder in (self.text_encoder, self.text_encoder_2):
            for own in encoder.peft_config.values():
                own.base_model_name_or_path = None  # a path of this machine would be published with the adapter

    def enable_gradient_checkpointing(self, function: Callable[..., Any] | None = None) -> None:
        """Recomputes each block, of all three, in the backward pass, through a function like torch's checkpoint."""
        function = function or partial(checkpoint, use_reentrant=False)
        for part in (self.unet, self.text_encoder, self.text_encoder_2):
            part._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)

    def disable_gradient_checkpointing(self) -> None:
        """Keeps all activations."""
        for part in (self.unet, self.text_encoder, self.text_encoder_2):
            part._set_gradient_checkpointing(enable=False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the UNet, in place: it does nearly all of the arithmetic."""
        self.unet.compile(*args, **kwargs)


def parts_of(denoiser: nn.Module) -> dict[str, Any]:
    """The networks that are trained, by their name in a pipeline."""
    return dict(denoiser.named_children()) if isinstance(denoiser, SDXLJointModel) else {"unet": denoiser}


def token_fields(ids: Tensor, ids_2: Tensor, captions: list[str]) -> dict[str, Tensor]:
    """What a training step encodes its captions from: token ids (B, chunks, length), and which captions are empty."""
    is_empty = torch.tensor([caption == "" for caption in captions])
    return {"input_ids": ids.int(), "input_ids_2": ids_2.int(), "is_empty": is_empty.int()}


def _run_unet(
    unet: nn.Module, noisy_latents: Tensor, timesteps: Tensor, embeds: Tensor, pooled: Tensor, sizes: Tensor
) -> Tensor:
    dtype = noisy_latents.dtype
    conditions = {"text_embeds": pooled.to(dtype), "time_ids": sizes.to(dtype)}
    return unet(noisy_latents, timesteps, embeds.to(dtype), added_cond_kwargs=conditions, return_dict=False)[0]


def denoise(
    denoiser: nn.Module,
    noisy_latents: Tensor,
    levels: Tensor,
    text: Mapping[str, Tensor],
    extra: Mapping[str, Tensor],
) -> Tensor:
    """See families.base.Family.denoise."""
    if "input_ids" in text:
        return denoiser(noisy_latents, levels, text, extra["sizes"])
    return _run_unet(denoiser, noisy_latents, levels, text["prompt_embeds"], text["pooled"], extra["sizes"])


def _body(encoder: Any) -> Any:
    """What holds a text encoder's layers: transformers 5 has it in CLIPTextModel itself."""
    return getattr(encoder, "text_model", encoder)


class SDXLBlueprint(PipelineBlueprint):
    """SDXL's networks with random weights."""

    kind = SDXL_KIND
    text_classes = ("CLIPTextModel", "CLIPTextModelWithProjection")
    denoise = staticmethod(denoise)

    def __init__(self, configs: Mapping[str, Any], config: ModelConfig) -> None:
        super().__init__(configs, config)
        self.trains_text, self._layer = config.train_text_encoder, usual_layer(config.clip_skip)
        self.lora_targets = WITH_TEXT if self.trains_text else LORA_TARGETS
        self._chunks = config.max_token_length // TOKENS_PER_CHUNK

    def denoiser(self) -> Any:
        unet = super().denoiser()
        if not self.trains_text:
            return unet
        first, second = self.text_encoders()
        return SDXLJointModel(unet, first, second, self._layer, force_zeros=False)

    def tokens(self, batch: int) -> list[Tensor]:
        return 2 * [torch.zeros(batch, self.text_configs[0].max_position_embeddings, dtype=torch.long)]

    def text(self, batch: int) -> dict[str, Tensor]:
        if self.trains_text:
            ids = self.tokens(batch)[0][:, None].expand(-1, self._chunks, -1)
            return token_fields(ids, ids, [""] * batch)
        unet = self.configs["unet"]
        pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
        length = self._chunks * self.text_configs[0].max_position_embeddings
        embeds = torch.zeros(batch, length, unet["cross_attention_dim"])
        return {"prompt_embeds": embeds, "pooled": torch.zeros(batch, pooled)}
