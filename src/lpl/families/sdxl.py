"""SDXL: loading, encoding, conditioning, sampling and export, all through diffusers' own pipeline."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lpl.config import ModelConfig
from lpl.diffusion.latent_space import LatentSpace
from lpl.families.base import DECODED_PIXELS, TrainedOn, config_settings, weights_hash
from lpl.families.sdxl_file import set_schedule, training_schedule
from lpl.families.sdxl_names import LORA_TARGETS, METADATA, WITH_TEXT, adapter_of, lora_metadata, to_kohya
from lpl.families.sdxl_networks import SDXLJointModel, denoise, named, parts_of, token_fields
from lpl.families.sdxl_text import PromptEncoder, guided

logger = logging.getLogger("lpl")

COMPONENTS = ("vae", "text_encoder", "text_encoder_2")
SAMPLING_STEPS = 25
GUIDANCE_SCALE = 5.0


class SDXL:
    """A StableDiffusionXLPipeline taken apart for training; implements families.base.Family.

    Differs from the diffusers scripts: a dropped caption is what the pipeline uses for no caption (zeros where the
    model says force_zeros_for_empty_prompt), not the encoding of "". See also PromptEncoder.

    With --train_text_encoder the denoiser is an SDXLJointModel: what is cached of a caption are its tokens, and prompts
    are encoded when images are made of them, with the weights of then.

    Args:
        weight_dtype: precision of the run's arithmetic; validation images are drawn in it.
        encoders_only: leave the denoiser out, where its files are apart from the others.

    Raises:
        UserError: the model cannot be loaded.
    """

    denoise = staticmethod(denoise)

    def __init__(
        self, config: ModelConfig, device: torch.device, weight_dtype: torch.dtype, encoders_only: bool = False
    ) -> None:
        self.device, self.weight_dtype, self._config = device, weight_dtype, config
        self.trained_on: TrainedOn | None = None
        self.pipeline = load_pipeline(config, encoders_only)
        self.vae = self.pipeline.vae.float().eval().requires_grad_(False)
        self.text_encoders = (self.pipeline.text_encoder, self.pipeline.text_encoder_2)
        for encoder in self.text_encoders:
            # Float32 whatever the run's precision: they encode once, and the result is saved in float32.
            encoder.float().eval().requires_grad_(False)
        self.schedule = training_schedule(self.pipeline.scheduler.config)
        self.force_zeros = bool(self.pipeline.config.force_zeros_for_empty_prompt)
        self.latent_key = weights_hash(
            *[m for m in (self.vae.encoder, self.vae.quant_conv) if m is not None],
            settings=f"{type(self.vae).__name__} {config_settings(self.vae.config)}",
        )
        self._encode_prompts = PromptEncoder(self.pipeline, config.clip_skip, config.max_token_length)
        self.denoiser, self.trains_text = self.pipeline.unet, config.train_text_encoder
        self.lora_targets: Mapping[str, tuple[str, ...]] = WITH_TEXT if self.trains_text else LORA_TARGETS
        if self.trains_text:
            layer, self.text_key = (
                self._encode_prompts.layer,
                weights_hash(settings=self._encode_prompts.token_settings),
            )
            if self.denoiser is not None:  # lpl cache leaves it out
                self.denoiser = SDXLJointModel(self.denoiser, *self.text_encoders, layer, self.force_zeros)
        else:
            settings = f"{self.force_zeros} {self._encode_prompts.settings}"
            self.text_key = weights_hash(*self.text_encoders, settings=settings)
        self.latent_stride = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._prompts: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        self._cut: list[str] = []
        # Hashed first: on the CPU that costs no copy. What is trained goes with the denoiser.
        for module in (self.vae, *(() if self.trains_text else self.text_encoders)):
            module.to(device)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        return posterior.mean.float().cpu(), posterior.std.float().cpu()

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        self._cut += self._encode_prompts.cut(captions)
        if self.trains_text:
            return token_fields(*self._encode_prompts.tokens(captions), captions)
        embeds, pooled = self._encode_prompts(captions, self.device)
        if self.force_zeros:
            keep = torch.tensor([caption != "" for caption in captions], device=embeds.device)
            embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
        return {"prompt_embeds": embeds.cpu(), "pooled": pooled.cpu()}

    def entry_bytes(self, height: int, width: int) -> tuple[int, int]:
        channels, stride = self.vae.config.latent_channels, self.latent_stride
        image = 2 * 4 * channels * (height // stride) * (width // stride)
        return image, self._encode_prompts.entry_bytes(of_tokens=self.trains_text)

    def prepare_prompt(self, prompt: str, negative_prompt: str = "") -> None:
        if not self.trains_text:
            encode = lambda text: self._encode_prompts([text], self.device)  # noqa: E731
            found = guided(prompt, negative_prompt, encode, self.force_zeros)
            self._prompts[prompt, negative_prompt] = tuple(e.cpu() for e in found)

    def _embeddings(self, denoiser: nn.Module, prompt: str, negative_prompt: str) -> tuple[Tensor, ...]:
        """What guided gives, on the device: prepared, or by text encoders that are trained."""
        if not isinstance(denoiser, SDXLJointModel):
            return tuple(e.to(self.device) for e in self._prompts[prompt, negative_prompt])

        def encode(text: str) -> tuple[Tensor, Tensor]:
            fields = token_fields(*self._encode_prompts.tokens([text]), [text])
            return denoiser.encode({name: value.to(self.device) for name, value in fields.items()})

        with self._autocast():
            return tuple(e.float() for e in guided(prompt, negative_prompt, encode, self.force_zeros))

    def _autocast(self) -> AbstractContextManager[Any]:
        half = self.weight_dtype != torch.float32
        return torch.autocast(self.device.type, self.weight_dtype) if half else nullcontext()

    def free_encoders(self) -> None:
        if self._cut:
            logger.warning(
                "%d captions were cut to %d tokens (--max_token_length %d), first: %.80s",
                *(len(self._cut), self._encode_prompts.limit, self._encode_prompts.max_token_length, self._cut[0]),
            )
            self._cut = []
        if not self.trains_text:
            for encoder in self.text_encoders:
                encoder.to("cpu")

    @torch.no_grad()
    def sample(
        self,
        denoiser: nn.Module,
        prompt: str,
        negative_prompt: str,
        seed: int,
        resolution: int,
        proceed: Callable[[], None] = lambda: None,
    ) -> Tensor:
        def between_steps(_pipeline: Any, _step: int, _timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            proceed()
            return state

        embeds, negative, pooled, negative_pooled = self._embeddings(denoiser, prompt, negative_prompt)
        pipeline = StableDiffusionXLPipeline(
            vae=None,  # a pipeline runs where the first of its parts is
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=parts_of(denoiser)["unet"],
            scheduler=self.pipeline.scheduler,
            force_zeros_for_empty_prompt=self.force_zeros,
            add_watermarker=False,
        )
        pipeline.vae_scale_factor = self.latent_stride
        pipeline.set_progress_bar_config(disable=True)
        proceed()
        with self._autocast():
            latents = pipeline(
                prompt_embeds=embeds,
                negative_prompt_embeds=negative,
                pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=negative_pooled,
                height=resolution,
                width=resolution,
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                callback_on_step_end=between_steps,
            ).images
        return LatentSpace.from_config(self.vae.config).to_raw(latents.float()).cpu()

    @torch.no_grad()
    def decode(self, raw_latents: Tensor) -> Image.Image:
        vae = self.vae
        # Not the size that its config states: some state a tenth of what they decode.
        vae.tile_sample_min_size = DECODED_PIXELS
        vae.tile_latent_min_size = DECODED_PIXELS // self.latent_stride
        vae.enable_tiling()
        try:
            decoded = vae.decode(raw_latents.to(self.device)).sample
        finally:
            vae.disable_tiling()
        (image,) = self.pipeline.image_processor.postprocess(decoded, output_type="pil")
        return image

    def export(self, denoiser: nn.Module, folder: Path) -> None:
        for name, part in parts_of(denoiser).items():
            setattr(self.pipeline, name, part)
        self.pipeline.save_pretrained(folder, safe_serialization=True)

    def save_denoiser(self, denoiser: nn.Module, folder: Path) -> None:
        for name, part in parts_of(denoiser).items():
            part.save_pretrained(folder / name, safe_serialization=True)

    def export_lora(self, denoiser: nn.Module, folder: Path) -> None:
        parts = parts_of(denoiser)
        tensors = {f"{name}_lora_layers": adapter_of(name, part) for name, part in parts.items()}
        adapters = _collate_lora_metadata(parts)
        packed = {
            f"{name}.{key}": sorted(value) if isinstance(value, set) else value
            for name in parts
            for key, value in adapters[f"{name}_lora_adapter_metadata"].items()
        }
        facts = lora_metadata(self._config, self.pipeline.scheduler.config, self.trained_on)

        def write(weights: dict[str, Tensor], file: str) -> None:
            adapter = json.dumps(packed, indent=2, sort_keys=True)
            save_file(weights, file, {"format": "pt", METADATA: adapter} | facts)

        StableDiffusionXLPipeline.save_lora_weights(folder, **tensors, save_function=write)

    def kohya_lora(self, lora: Path, title: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        return to_kohya(lora, {"unet": self.pipeline.unet.config}, title)


def load_pipeline(
    config: ModelConfig, encoders_only: bool = False, dtypes: Mapping[str, torch.dtype] | None = None
) -> StableDiffusionXLPipeline:
    """Loads a model's pipeline, with or without its denoiser, and gives it the schedule that model and options say.

    Args:
        encoders_only: leave the denoiser out, where its files are apart from the others.
        dtypes: precision by component, unset: float32; a single file has one, the UNet's.

    Raises:
        UserError: the model cannot be loaded, or lacks weights.
    """
    dtypes = defaultdict(lambda: torch.float32, dtypes or {})
    transformers.utils.logging.disable_progress_bar()  # a bar per text encoder; the pipeline's own bar stays
    name = str(config.pretrained_model_name_or_path)
    common: dict[str, Any] = {"cache_dir": config.cache_dir}
    vae = config.pretrained_vae_model_name_or_path
    if vae is not None:
        with named("--pretrained_vae_model_name_or_path", vae):
            common["vae"] = AutoencoderKL.from_pretrained(
                vae, dtype=dtypes["vae"], use_safetensors=True, cache_dir=config.cache_dir
            )
    with named("--pretrained_model_name_or_path", name):
        if name.endswith(".safetensors"):
            local = config.single_file_config
            pipeline = StableDiffusionXLPipeline.from_single_file(
                name,
                config=local,
                local_files_only=local is not None,
                add_watermarker=False,
                dtype=dtypes["unet"],
                **common,
            )
            return _checked(pipeline, config, ("unet", *COMPONENTS))
        common |= {"revision": config.revision, "variant": config.variant, "use_safetensors": True}
        for part, cls in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            # On its own: a pipeline would fill weights that are missing with random numbers, and say nothing.
            settings = {key: value for key, value in common.items() if key not in COMPONENTS}
            encoder, info = cls.from_pretrained(
                name, subfolder=part, output_loading_info=True, dtype=dtypes[part], **settings
            )
            if info["missing_keys"]:
                raise ValueError(f"{part} lacks the weights {sorted(info['missing_keys'])[:3]}")
            common[part] = encoder
        left_out: dict[str, Any] = {"unet": None} if encoders_only else {}
        parts = {part: dtypes[part] for part in ("unet", "vae")} | {"default": torch.float32}
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            name, add_watermarker=False, dtype=parts, **left_out, **common
        )
        return _checked(pipeline, config, ("vae",) if encoders_only else ("unet", "vae"))


def _checked(pipeline: Any, config: ModelConfig, parts: Iterable[str]) -> Any:
    """The pipeline with its schedule; refuses networks (parts) that the model's files lack weights of."""
    _check_tokenizers(pipeline)
    for part in parts:
        absent = [key for key, weight in getattr(pipeline, part).named_parameters() if weight.is_meta]
        if absent:
            raise ValueError(f"{part} lacks the weights {absent[:3]}")
    set_schedule(pipeline, config)
    return pipeline


def _check_tokenizers(pipeline: Any) -> None:
    """Refuses tokenizers that make more or other tokens than their text encoders know."""
    for name in ("", "_2"):
        tokenizer, known = getattr(pipeline, f"tokenizer{name}"), getattr(pipeline, f"text_encoder{name}").config
        if not 3 <= tokenizer.model_max_length <= known.max_position_embeddings:
            raise ValueError(
                f"tokenizer{name} makes {tokenizer.model_max_length:.6g} tokens of a text (model_max_length), its text "
                f"encoder takes {known.max_position_embeddings}"
            )
        special = [getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")]
        if None in special or max([*special, *tokenizer.get_vocab().values()]) >= known.vocab_size:
            raise ValueError(f"tokenizer{name} has tokens that its text encoder, of {known.vocab_size}, does not know")
