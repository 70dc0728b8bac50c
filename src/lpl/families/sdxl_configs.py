"""SDXL's configs: their allowed values, and the configs of the published model, for plans without a download."""

from __future__ import annotations

from typing import Any

from lpl.base.errors import UserError
from lpl.base.json_files import ANY, NULL, SWITCH, TEXT, Kind, Shape, number, require_shape, whole
from lpl.families.published import CLIP_G, CLIP_L

NAME = "stabilityai/stable-diffusion-xl-base-1.0"

PUBLISHED: dict[str, Any] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "sample_size": 1024,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    "scheduler": {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    },
    "text_encoder": CLIP_L,
    "text_encoder_2": CLIP_G,
}
"""By component; what is left out is the class's default."""

UNET_PARAMETERS = 2_567_463_684

SIZE, LAYERS = whole(1, 2**16), whole(1, 256)
SIZES = Kind("a list of 1 to 16 sizes", lambda v: isinstance(v, list) and 1 <= len(v) <= 16 and all(map(SIZE.fits, v)))
ABOVE_0 = number(1e-6, 1e6)
BETA = number(1e-9, 0.9999)

UNET_CONFIG: Shape = {
    "cross_attention_dim": SIZE,
    "addition_time_embed_dim": SIZE,
    "projection_class_embeddings_input_dim": SIZE,
    **{
        f"{name}?": SIZE for name in ("in_channels", "out_channels", "norm_num_groups", "addition_embed_type_num_heads")
    },
    **{f"{name}?": (SIZE, NULL) for name in ("sample_size", "time_embedding_dim", "num_class_embeds")},
    **{f"{name}?": whole(0, 31) for name in ("downsample_padding", "freq_shift")},
    **{f"{name}?": whole(1, 31) for name in ("conv_in_kernel", "conv_out_kernel")},
    **{f"{name}?": ABOVE_0 for name in ("mid_block_scale_factor", "resnet_out_scale_factor")},
    **{f"{name}?": SWITCH for name in ("center_input_sample", "flip_sin_to_cos", "use_linear_projection")},
    **{f"{name}?": [TEXT] for name in ("down_block_types", "up_block_types")},
    "block_out_channels?": SIZES,
    "layers_per_block?": (LAYERS, [LAYERS]),
    "transformer_layers_per_block?": (LAYERS, [(LAYERS, [LAYERS])]),
    "attention_head_dim?": (SIZE, [SIZE]),
    "num_attention_heads?": (SIZE, [SIZE], NULL),
    "norm_eps?": number(0, 1),
    "dropout?": number(0, 0.999),
}
VAE_CONFIG: Shape = {
    "scaling_factor?": ABOVE_0,
    "shift_factor?": (number(-1e6, 1e6), NULL),
    "latents_mean?": ([number(-1e6, 1e6)], NULL),
    "latents_std?": ([ABOVE_0], NULL),
    **{f"{name}?": SIZE for name in ("in_channels", "out_channels", "latent_channels", "norm_num_groups")},
    "sample_size?": (SIZE, SIZES, NULL),
    "block_out_channels?": SIZES,
    **{f"{name}?": [TEXT] for name in ("down_block_types", "up_block_types")},
    "layers_per_block?": LAYERS,
    **{f"{name}?": SWITCH for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")},
}
SCHEDULER: Shape = {
    "num_train_timesteps?": whole(1, 10**5),
    "beta_start?": BETA,
    "beta_end?": BETA,
    "beta_schedule?": TEXT,
    "trained_betas?": ([BETA], NULL),
    "prediction_type?": (TEXT, NULL),
    **{f"{name}?": SWITCH for name in ("rescale_betas_zero_snr", "use_flow_sigmas", "use_dynamic_shifting")},
    "flow_shift?": ABOVE_0,
    "steps_offset?": whole(0, 10**5),
    "timestep_spacing?": TEXT,
}
TEXT_ENCODER: Shape = {
    **{f"{name}?": SIZE for name in ("hidden_size", "intermediate_size", "num_attention_heads", "projection_dim")},
    "num_hidden_layers?": LAYERS,
    "max_position_embeddings?": whole(3, 2**16),
    "vocab_size?": whole(1, 10**7),
    "layer_norm_eps?": number(0, 1),
    "attention_dropout?": number(0, 0.999),
    "hidden_act?": TEXT,
    "eos_token_id?": whole(0, 2**31),
    **{f"{name}?": (whole(0, 2**31), NULL) for name in ("bos_token_id", "pad_token_id")},
}
INDEX: Shape = {
    "_class_name?": (TEXT, NULL),
    "text_encoder?": ([ANY], NULL),
    "force_zeros_for_empty_prompt?": (SWITCH, NULL),
}
SHAPES = {
    "model_index.json": INDEX,
    "unet/config.json": UNET_CONFIG,
    "vae/config.json": VAE_CONFIG,
    "scheduler/scheduler_config.json": SCHEDULER,
    "text_encoder/config.json": TEXT_ENCODER,
    "text_encoder_2/config.json": TEXT_ENCODER,
}


def check_shape(file: str, found: dict[str, Any], where: str) -> None:
    """Refuses a config with a value that no such model has.

    Args:
        file: its path in the model's folder.
        found: its content.
        where: its name in errors.

    Raises:
        UserError: the key, what it is, and what it must be.
    """
    then = "fetch or write the file anew"
    require_shape(found, SHAPES[file], where, then)
    lists = ("block_out_channels", "down_block_types", "up_block_types")
    lengths = {name: len(found[name]) for name in lists if name in found}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise UserError(f"{where}: {told}, which must be as many of each: {then}")
