"""Every known family: to add one, add an entry to KINDS and a file of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lpl.config import ModelConfig
from lpl.families.kind import Kind
from lpl.families.sdxl_check import SDXL_KIND

SD_KIND = Kind(
    name="Stable Diffusion 1 and 2",
    pipelines=("StableDiffusionPipeline",),
    module="sd",
    base="Stable Diffusion 1.5",
    base_name="stable-diffusion-v1-5/stable-diffusion-v1-5",
    networks=("unet", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    is_transformer=False,
    patch=1,
    resolution=512,
    single_file_keys=(
        ("cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",),
        ("cond_stage_model.model.token_embedding.weight",),
    ),
    comfyui_folder="models/checkpoints",
    parameters=859_520_964,
    options=frozenset({"clip_skip", "train_text_encoder"}),
    trained_text=("text_encoder",),
    parts={"to_kohya": "sd:to_kohya"},
    loaded_with={"safety_checker": None, "requires_safety_checker": False},  # it paints images black
    lora_starts={"unet": ("unet.", "lora_unet_"), "text_encoder": ("text_encoder.", "lora_te_")},
)
SD3_KIND = Kind(
    name="Stable Diffusion 3.5",
    pipelines=("StableDiffusion3Pipeline",),
    module="sd3",
    base="Stable Diffusion 3.5 medium",
    base_name="stabilityai/stable-diffusion-3.5-medium",
    networks=("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
    tokenizers=("tokenizer", "tokenizer_2", "tokenizer_3"),
    options=frozenset({"train_text_encoder", "text_encoder_2_lr"}),
    trained_text=("text_encoder", "text_encoder_2"),
    single_file_keys=(
        ("transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"),
        ("joint_blocks.0.context_block.attn.qkv.weight",),
    ),
    steps=40,  # both by the model's card
    guidance=4.5,
    lora_readers="diffusers and ComfyUI",
    lora_starts={part: (f"{part}.",) for part in ("transformer", "text_encoder", "text_encoder_2")},
)


class FluxKind(Kind):
    """Flux.1: dev has learned guidance as an input, schnell has none."""

    def usual_guidance(self, config: ModelConfig) -> float | None:
        return self.guidance if self.plan_configs(config)["transformer"].get("guidance_embeds") else None


FLUX_KIND = FluxKind(
    name="Flux.1",
    pipelines=("FluxPipeline",),
    module="flux",
    base="FLUX.1-dev",
    base_name="black-forest-labs/FLUX.1-dev",
    others={"black-forest-labs/FLUX.1-schnell": "SCHNELL"},
    networks=("transformer", "vae", "text_encoder", "text_encoder_2"),
    tokenizers=("tokenizer", "tokenizer_2"),
    options=frozenset({"train_text_encoder"}),
    trained_text=("text_encoder",),
    single_file_keys=(
        ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight"),
        ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
    ),
    steps=28,  # both as its pipeline does
    guidance=3.5,
    lora_readers="diffusers and ComfyUI",
    lora_starts={part: (f"{part}.",) for part in ("transformer", "text_encoder")},
)
CHROMA_KIND = Kind(
    name="Chroma",
    pipelines=("ChromaPipeline",),
    module="chroma",
    base="Chroma1-HD",
    base_name="lodestones/Chroma1-HD",
    networks=("transformer", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    single_file_keys=(
        ("single_transformer_blocks.0.proj_mlp.weight", "distilled_guidance_layer.in_proj.weight"),
        ("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"),
    ),
    comfyui_folder=None,  # not known whether it reads diffusers' names of it
    own_pipeline=True,
    steps=40,  # both by the model's card
    guidance=3.0,
    lora_readers="diffusers and ComfyUI",
    lora_starts={"transformer": ("transformer.",)},
)
SANA_KIND = Kind(
    name="Sana",
    pipelines=("SanaPipeline",),
    module="sana",
    base="Sana of 1.6 billion parameters",
    base_name="Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    networks=("transformer", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    single_file_keys=(
        ("transformer_blocks.0.ff.conv_inverted.weight", "caption_norm.weight"),
        ("blocks.0.cross_attn.q_linear.weight", "attention_y_norm.weight"),
    ),
    comfyui_folder=None,
    patch=1,
    usual_stride=32,
    steps=20,  # both as its pipeline does
    guidance=4.5,
    vae_class="AutoencoderDC",
    lora_starts={"transformer": ("transformer.",)},
)


class ZImageKind(Kind):
    """Z-Image; Turbo, known by the smaller shift of its scheduler, is distilled to few steps without guidance."""

    def is_turbo(self, scheduler: Mapping[str, Any]) -> bool:
        """Whether a scheduler with this config is that of Turbo, 3, and not 6."""
        return float(scheduler.get("shift", 6.0)) < 5

    def usual_guidance(self, config: ModelConfig) -> float | None:
        return 0.0 if self.is_turbo(self.plan_configs(config)["scheduler"]) else self.guidance


ZIMAGE_KIND = ZImageKind(
    name="Z-Image",
    pipelines=("ZImagePipeline",),
    module="zimage",
    base="Z-Image",
    base_name="Tongyi-MAI/Z-Image",
    networks=("transformer", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    single_file_keys=(
        ("noise_refiner.0.attention.to_q.weight", "layers.0.adaLN_modulation.0.weight"),
        ("noise_refiner.0.attention.qkv.weight", "layers.0.adaLN_modulation.0.weight"),
    ),
    steps=40,  # both within what the model's card recommends: 28 to 50, and 3 to 5
    guidance=4.0,
    lora_readers="diffusers and ComfyUI",
    lora_starts={"transformer": ("transformer.",)},
)


class KleinKind(Kind):
    """Flux.2 klein: the base models, and those distilled to four steps without guidance, as model_index.json says."""

    def usual_guidance(self, config: ModelConfig) -> float | None:
        return None if self.plan_configs(config)["index"].get("is_distilled") else self.guidance


KLEIN_KIND = KleinKind(
    name="Flux.2 klein",
    pipelines=("Flux2KleinPipeline",),
    module="flux2",
    base="FLUX.2 klein base of 4 billion parameters",
    base_name="black-forest-labs/FLUX.2-klein-base-4B",
    networks=("transformer", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    single_file_keys=(
        ("single_stream_modulation.linear.weight",),
        ("single_stream_modulation.lin.weight",),
    ),
    steps=50,  # both as its pipeline does
    guidance=4.0,
    vae_class="AutoencoderKLFlux2",
    lora_starts={"transformer": ("transformer.",)},
)
QWEN_KIND = Kind(
    name="Qwen-Image",
    pipelines=("QwenImagePipeline",),
    module="qwenimage",
    base="Qwen-Image",
    base_name="Qwen/Qwen-Image",
    networks=("transformer", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    single_file_keys=(("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),),
    steps=50,  # both as its pipeline does
    guidance=4.0,
    vae_class="AutoencoderKLQwenImage",
    vae_has_frames=True,
    lora_starts={"transformer": ("transformer.",)},
)
LUMINA2_KIND = Kind(
    name="Lumina2",
    pipelines=("Lumina2Pipeline",),
    module="lumina2",
    base="Lumina-Image 2.0",
    base_name="Alpha-VLLM/Lumina-Image-2.0",
    networks=("transformer", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    single_file_keys=(
        ("time_caption_embed.caption_embedder.0.weight", "layers.0.norm1.linear.weight"),
        ("cap_embedder.0.weight", "layers.0.adaLN_modulation.1.weight"),
    ),
    steps=30,  # both as its pipeline does
    guidance=4.0,
    lora_starts={"transformer": ("transformer.",)},
)


class AuraFlowKind(Kind):
    """AuraFlow: its pipeline draws 1024 pixels whatever sample_size is; diffusers does not refuse larger ones."""

    def native_resolution(self, configs: Mapping[str, Any]) -> int:
        return self.resolution

    def longest_side(self, configs: Mapping[str, Any]) -> int | None:
        positions = configs["transformer"].get("pos_embed_max_size", 1024)  # of a square
        if not isinstance(positions, int) or positions < 1:
            return None  # loading reports it
        return math.isqrt(positions) * self.pixel_multiple(configs)


AURAFLOW_KIND = AuraFlowKind(
    name="AuraFlow",
    pipelines=("AuraFlowPipeline",),
    module="auraflow",
    base="AuraFlow v0.3",
    base_name="fal/AuraFlow-v0.3",
    networks=("transformer", "vae", "text_encoder"),
    tokenizers=("tokenizer",),
    single_file_keys=(
        ("joint_transformer_blocks.0.attn.add_q_proj.weight",),
        ("double_layers.0.attn.w1q.weight",),
    ),
    steps=50,  # both as its pipeline does
    guidance=3.5,
    lora_readers="diffusers and ComfyUI",
    lora_starts={"transformer": ("transformer.",)},
)
KINDS: tuple[Kind, ...] = (
    SDXL_KIND, SD_KIND, SD3_KIND, FLUX_KIND, SANA_KIND, ZIMAGE_KIND, KLEIN_KIND, QWEN_KIND, LUMINA2_KIND, AURAFLOW_KIND,
    CHROMA_KIND,
)  # fmt: skip
"""The first is used for a plan without a model, and its checks apply to models of no known family."""
