"""Random networks of a few thousand parameters: DINOv2 and CLIP in transformers' format, CompVis's autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def tiny_dinov2(folder: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def tiny_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from lpl.demo.architecture import build_tokenizers

    tokenizer, _ = build_tokenizers()
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=small | text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


class Block(nn.Module):
    """A residual block as ldm writes it, which takes the timestep's embedding too."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, temb=None):
        return self.nin_shortcut(x) + self.conv1(nn.functional.silu(self.norm1(x)))


class Doubling(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0))


def compvis_autoencoder(channels=3):
    """CompVis's AutoencoderKL, its decoder alone: levels from the last to the first."""
    model, decoder = nn.Module(), nn.Module()
    model.post_quant_conv, model.decoder = nn.Conv2d(channels, channels, 1), decoder
    decoder.conv_in, decoder.mid = nn.Conv2d(channels, 8, 3, padding=1), nn.Module()
    decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2 = Block(8, 8), nn.Identity(), Block(8, 8)
    decoder.up = nn.ModuleList()
    for n, (inputs, outputs) in enumerate([(6, 4), (8, 6), (8, 8)]):
        level = nn.Module()
        level.block = nn.ModuleList([Block(inputs, outputs)])
        if n:
            level.upsample = Doubling(outputs)
        decoder.up.append(level)
    return model
