"""Tiny VAEs of every class of diffusers that is walked: weights, norms and statistics randomised, nothing 0 or 1."""

import functools
from typing import Any

import diffusers
import torch

WIDTHS = (8, 8, 16)
DOWN, UP = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)


def scrambled(vae: Any, seed: int = 0) -> Any:
    """In eval mode, frozen, every weight, norm and float buffer drawn anew."""
    generator = torch.Generator().manual_seed(seed)

    def noise(x):
        return torch.randn(x.shape, generator=generator).to(x.dtype)

    with torch.no_grad():
        for name, p in vae.named_parameters():
            is_scale = p.dim() <= 1 or "norm" in name or "gamma" in name
            if is_scale:
                p.copy_(0.3 * noise(p) + ("weight" in name or "gamma" in name))
            else:
                p.copy_(noise(p) / p[0].numel() ** 0.5)
        for name, buffer in vae.named_buffers():
            if "running_var" in name or name.endswith("std"):
                buffer.copy_(0.5 + noise(buffer).abs())
            elif buffer.is_floating_point():
                buffer.add_(0.3 * noise(buffer))
    return vae.eval().requires_grad_(False)


def kl(name="AutoencoderKL", up=UP * 3, widths=WIDTHS, **config):
    settings = {"latent_channels": 4, "norm_num_groups": 4, "block_out_channels": widths} | config
    return getattr(diffusers, name)(down_block_types=DOWN * len(widths), up_block_types=up, **settings)


def dc(**config):
    kinds = ("ResBlock", "ResBlock", "EfficientViTBlock")
    return diffusers.AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
        decoder_act_fns=("relu", "relu", "silu"),
        downsample_block_type="conv",
        **config,
    )


STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [1.5, 0.5, 2.0, 0.8]}


def wan(name="AutoencoderKLWan", **config):
    settings = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    return getattr(diffusers, name)(**settings | STATISTICS | config)


def wan22():
    return wan(
        decoder_base_dim=12, is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16
    )


def hunyuan(name, **config):
    settings = {"spatial_compression_ratio": 4, "temporal_compression_ratio": 2} | config
    return getattr(diffusers, name)(latent_channels=8, block_out_channels=(32,) * 3, layers_per_block=1, **settings)


VAES: dict[str, Any] = {
    "kl": lambda: kl(use_post_quant_conv=False, use_quant_conv=False, shift_factor=0.3),
    "kl_attention": lambda: kl(up=("AttnUpDecoderBlock2D", *UP * 2), layers_per_block=1),
    "kl_no_attention": lambda: kl(mid_block_add_attention=False),
    "flux2": lambda: kl("AutoencoderKLFlux2", latent_channels=8, decoder_block_out_channels=(4, 8, 12)),
    "asymmetric": lambda: diffusers.AsymmetricAutoencoderKL(
        down_block_out_channels=(8, 16), up_block_out_channels=(12, 24), down_block_types=DOWN * 2,
        up_block_types=UP * 2, norm_num_groups=4),
    "vq": lambda: kl("VQModel", latent_channels=3),
    "vq_spatial": lambda: kl(
        "VQModel", UP, (32,), latent_channels=3, norm_type="spatial", norm_num_groups=32, layers_per_block=1),
    "tiny": lambda: diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3,
                                              num_encoder_blocks=(1,) * 3, num_decoder_blocks=(2, 1, 1)),
    "dc_shuffle": lambda: dc(upsample_block_type="pixel_shuffle"),
    "dc_interpolate": lambda: dc(upsample_block_type="interpolate"),
    "hunyuan_image": lambda: diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(32, 32, 64), layers_per_block=1,
        spatial_compression_ratio=4, sample_size=64, scaling_factor=0.7),
    "kvae": lambda: diffusers.AutoencoderKLKVAE(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4,
                                                ch_mult=(1, 1, 2)),
    "rae": lambda: diffusers.AutoencoderRAE(
        encoder_hidden_size=64, encoder_patch_size=14, encoder_num_hidden_layers=1, decoder_hidden_size=16,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=32, patch_size=4,
        encoder_input_size=56, encoder_norm_mean=[0.5] * 3, encoder_norm_std=[0.5] * 3, scaling_factor=0.5),
    "qwen": lambda: wan("AutoencoderKLQwenImage"),
    "wan": wan,
    "wan22": wan22,
    "qwen21": lambda: wan("AutoencoderKLQwenImage21", decoder_base_dim=12),
    "hunyuan_video": lambda: diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1),
    "hunyuan_video15": lambda: hunyuan("AutoencoderKLHunyuanVideo15"),
    "hunyuan_refiner": lambda: hunyuan("AutoencoderKLHunyuanImageRefiner"),
    "cogvideox": lambda: diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4, sample_height=64,
        sample_width=64),
    "ltx": lambda: diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5),
    "ltx2": lambda: diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4),
    "mochi": lambda: diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, latent_channels=4,
        layers_per_block=(1,) * 5, add_attention_block=(False,) * 5, **STATISTICS),
    "magvit": lambda: diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[8, 8, 16, 16], norm_num_groups=4, layers_per_block=1),
    "cosmos": lambda: diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 16, 16, 16), decode_block_out_channels=(16,) * 4,
        resolution=64, num_layers=1),
    "svd": lambda: diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=DOWN * 2, layers_per_block=1),
}  # fmt: skip
"""By name; each is of another class, or of another build that is walked in another way."""
FRAMES = {
    "qwen": 3, "wan": 3, "wan22": 3, "qwen21": 1, "hunyuan_video": 2, "hunyuan_video15": 2, "hunyuan_refiner": 2,
    "cogvideox": 3, "ltx": 2, "ltx2": 2, "mochi": 2, "magvit": 1, "cosmos": 2, "svd": 2,
}  # fmt: skip
"""Of those that decode videos: how many latent frames are tried."""


@functools.cache
def vae_of(name: str) -> Any:
    """A shared VAE by its name in VAES."""
    torch.manual_seed(0)
    return scrambled(VAES[name]())


def decode(vae: Any, raw_latents: torch.Tensor) -> torch.Tensor:
    """What the class itself decodes."""
    name = type(vae).__name__
    if name == "AutoencoderKLTemporalDecoder":
        frames = raw_latents.shape[2]
        out = vae.decode(raw_latents.transpose(1, 2).flatten(0, 1), num_frames=frames).sample
        return out.unflatten(0, (-1, frames)).transpose(1, 2)
    return vae.decode(raw_latents, **({"force_not_quantize": True} if name == "VQModel" else {})).sample


def latents_of(name: str, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Raw latents, (B, C, 4, 3), or a square where the VAE takes no other or is slow, with FRAMES of videos."""
    from lpl.perceptual.decoders import decoder_taps

    space = (4, 4) if name in ("rae", "flux2") else (4, 3)
    if name == "mochi":
        space = (2, 2)
    if name in FRAMES:
        space = (FRAMES[name], *space)
    shape = (batch, decoder_taps(vae_of(name)).latent_channels, *space)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
