"""Tiny random models for tests: real classes of diffusers and transformers, built from configs, no download."""

import json
from typing import Any

import pytest
import torch


def randomize(module: torch.nn.Module, seed: int = 0, scale: float = 0.15) -> torch.nn.Module:
    """Adds seeded noise to every parameter, so that no weight is 0 or 1 by construction and no bug hides there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def tiny_vae(seed: int = 0, widths: tuple[int, ...] = (8, 16, 16, 16), **config: Any) -> Any:
    """An AutoencoderKL of a few thousand parameters, randomised, in eval mode and frozen."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    settings = {"latent_channels": 4, "norm_num_groups": 4, "scaling_factor": 0.5, "layers_per_block": 1} | config
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        **settings,
    )
    randomize(vae, seed)
    return vae.eval().requires_grad_(False)


def tiny_sdxl(folder: Any, seed: int = 0, prediction_type: str = "epsilon", **scheduler: Any) -> Any:
    """Writes a StableDiffusionXLPipeline of about 50,000 parameters to a folder, in diffusers' format.

    Latents have 4 channels and stride 4, so 16-pixel images do.

    Args:
        folder: where to.
        seed: of the weights.
        prediction_type: of its scheduler.
        scheduler: further settings of its scheduler.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from lpl.demo.architecture import build_tokenizers

    tokenizer, tokenizer_2 = build_tokenizers()

    def text_config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    vae = tiny_vae(seed, widths=(8, 8, 16))
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(8)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(16)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
            prediction_type=prediction_type,
            **scheduler,
        ),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flow(folder: Any, build: Any = tiny_sdxl, name: str = "DPMSolverMultistepScheduler", **scheduler: Any) -> Any:
    """A tiny SDXL, or another with a UNet, that is trained by flow matching.

    Args:
        build: what writes it.
        name: class of its scheduler.
        scheduler: further settings of that.
    """
    said = {"_class_name": name, "use_flow_sigmas": True, "flow_shift": 2.0, "prediction_type": "flow_prediction"}
    index = build(folder) / "model_index.json"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(said | scheduler), encoding="utf-8")
    found = json.loads(index.read_text(encoding="utf-8")) | {"scheduler": ["diffusers", name]}
    index.write_text(json.dumps(found), encoding="utf-8")
    return folder


def tiny_sd(folder: Any, seed: int = 0, prediction_type: str = "epsilon", second: bool = False) -> Any:
    """Writes a StableDiffusionPipeline of about 40,000 parameters to a folder; latents as tiny_sdxl's.

    Args:
        second: as Stable Diffusion 2 is built.
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from lpl.demo.architecture import build_tokenizers

    tokenizer, _ = build_tokenizers()
    vae = tiny_vae(seed, widths=(8, 8, 16))
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=8,
        use_linear_projection=second,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny_clip(tokenizer, 8, projects=False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_clip(tokenizer: Any, width: int, projects: bool = True) -> Any:
    """A CLIP text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        **ids,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config)


def tiny_t5(width: int, multilingual: bool = False) -> tuple[Any, Any]:
    """A T5 or UMT5 encoder of one layer, and a tokenizer of single characters."""
    import string

    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    characters = [(c, -3.0) for c in string.ascii_letters + string.digits + string.punctuation]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer = T5Tokenizer(vocab=special + characters, extra_ids=0, model_max_length=512)
    config = (UMT5Config if multilingual else T5Config)(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=4,
        d_ff=width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    return (UMT5EncoderModel if multilingual else T5EncoderModel)(config), tokenizer


def tiny_vae16(seed: int) -> Any:
    """A VAE with a shift and without quant convs; 4 channels, stride 4."""
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06, "scaling_factor": 1.5}
    return tiny_vae(seed, widths=(8, 8, 16), **plain)


def tiny_sd3(folder: Any, seed: int = 0, t5: bool = True) -> Any:
    """Writes a StableDiffusion3Pipeline to a folder, latents as tiny_sdxl's; without a T5 if so asked."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    from lpl.demo.architecture import build_tokenizers

    tokenizer, tokenizer_2 = build_tokenizers()
    vae = tiny_vae16(seed)
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    encoder, tokenizer_3 = tiny_t5(32) if t5 else (None, None)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=tiny_clip(tokenizer, 8),
        tokenizer=tokenizer,
        text_encoder_2=tiny_clip(tokenizer_2, 16),
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder,
        tokenizer_3=tokenizer_3,
    )
    randomize(transformer, seed, 0.1)
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux(folder: Any, seed: int = 0, guidance: bool = True) -> Any:
    """Writes a FluxPipeline to a folder, latents as tiny_sdxl's: dev, or without guidance schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from lpl.demo.architecture import build_tokenizers

    tokenizer, _ = build_tokenizers()
    vae = tiny_vae16(seed)
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    encoder, tokenizer_2 = tiny_t5(16)
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        vae=vae,
        text_encoder=tiny_clip(tokenizer, 8, projects=False),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer_2,
    )
    randomize(transformer, seed, 0.1)
    pipeline.save_pretrained(folder)
    return folder


def tiny_gemma(seed: int, layers: int = 1) -> tuple[Any, Any]:
    """A Gemma 2, and a tokenizer of single characters."""
    import string

    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    vocabulary = {name: n for n, name in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "\u2581"))}
    for character in string.ascii_letters + string.digits + string.punctuation + "\n":
        vocabulary.setdefault(character, len(vocabulary))
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Gemma2Model(config), tokenizer


def tiny_sana(folder: Any, seed: int = 0) -> Any:
    """Writes a SanaPipeline to a folder; latents as tiny_sdxl's, but its pipeline draws multiples of 32 pixels."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    encoder, tokenizer = tiny_gemma(seed)
    blocks = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8, 16)}
    blocks |= {"qkv_multiscales": ((), (), (5,)), "layers_per_block": (1, 1, 1)}
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()},
    )
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=4,
        timestep_scale=0.5,
    )
    pipeline = SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", final_sigmas_type="zero"
        ),
        vae=randomize(vae, seed, 0.05),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=randomize(transformer, seed, 0.1),
    )
    pipeline.save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen_tokenizer() -> Any:
    """A tokenizer of single bytes, with a chat template and a length beyond what its encoders take."""
    from transformers import Qwen2Tokenizer

    from lpl.demo.architecture import byte_characters

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocab = {token: number for number, token in enumerate((*byte_characters(), *special))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=131072)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[1:])})
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_zimage(folder: Any, seed: int = 0, turbo: bool = False) -> Any:
    """Writes a ZImagePipeline to a folder, latents as tiny_sdxl's."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer, vae = tiny_qwen_tokenizer(), tiny_vae16(seed)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 32, 32],
    )
    pipeline = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if turbo else 6.0),
        vae=vae,
        text_encoder=Qwen3Model(config),
        tokenizer=tokenizer,
    )
    randomize(transformer, seed, 0.1)
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux2(folder: Any, seed: int = 0, distilled: bool = False) -> Any:
    """Writes a Flux2KleinPipeline to a folder, latents as tiny_sdxl's; its Qwen3 is as deep as it must be."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny_qwen_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=28,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    randomize(vae, seed)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        transformer=randomize(transformer, seed, 0.1),
        is_distilled=distilled,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_qwenimage(folder: Any, seed: int = 0) -> Any:
    """Writes a QwenImagePipeline to a folder, latents as tiny_sdxl's."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = tiny_qwen_tokenizer()
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.7, 1.0],
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
        vae=randomize(vae, seed, 0.05),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=randomize(transformer, seed, 0.1),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_lumina2(folder: Any, seed: int = 0) -> Any:
    """Writes a Lumina2Pipeline to a folder, latents as tiny_sdxl's."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    vae = tiny_vae16(seed)
    encoder, tokenizer = tiny_gemma(seed, layers=2)
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    pipeline = Lumina2Pipeline(
        transformer=randomize(transformer, seed, 0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_auraflow(folder: Any, seed: int = 0) -> Any:
    """Writes an AuraFlowPipeline to a folder, latents as tiny_sdxl's."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    vae = tiny_vae(seed, widths=(8, 8, 16))
    torch.manual_seed(seed)
    encoder, tokenizer = tiny_t5(16, multilingual=True)
    transformer = AuraFlowTransformer2DModel(
        sample_size=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    pipeline = AuraFlowPipeline(
        transformer=randomize(transformer, seed, 0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_chroma(folder: Any, seed: int = 0) -> Any:
    """Writes a ChromaPipeline to a folder, latents as tiny_sdxl's."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    vae = tiny_vae16(seed)
    torch.manual_seed(seed)
    encoder, tokenizer = tiny_t5(16)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipeline = ChromaPipeline(
        transformer=randomize(transformer, seed, 0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_images(folder: Any, count: int = 6, size: int = 24, seed: int = 0) -> Any:
    """Writes small random pictures with metadata.jsonl to a folder."""
    import json
    from pathlib import Path

    import numpy as np
    from PIL import Image

    folder, random = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((size + 4 * i, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i} of a pattern"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


SLOW = pytest.mark.slow
BUILDS = [
    tiny_sdxl,
    tiny_sd3,
    tiny_flux,
    tiny_qwenimage,
    tiny_lumina2,
    *(
        pytest.param(build, marks=SLOW)
        for build in (tiny_sd, tiny_sana, tiny_zimage, tiny_flux2, tiny_auraflow, tiny_chroma)
    ),
]
"""A pipeline of each family; `make test` takes some of them."""
