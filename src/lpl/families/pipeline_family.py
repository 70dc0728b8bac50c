"""Shared by all families: a diffusers pipeline taken apart for training, sampled from and written again."""

from __future__ import annotations

import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import _collate_lora_metadata
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.diffusion.latent_space import LatentSpace
from lpl.families.base import DECODED_PIXELS, config_settings, weights_hash
from lpl.families.files import vae_channels
from lpl.families.joint import JointModel
from lpl.families.kind import Kind
from lpl.families.loading import load_whole
from lpl.families.lora_files import ADAPTER, adapter_of, fold_alpha, lora_metadata
from lpl.families.schedulers import training_schedule

logger = logging.getLogger("lpl")

CPU = torch.device("cpu")


class PipelineFamily(ABC):
    """Implements families.base.Family, except for what differs between families.

    A family's own class encodes text, turns a prompt into arguments of the pipeline's call, and runs its denoiser in
    the training step.

    Args:
        weight_dtype: precision of the run's arithmetic; validation images are drawn in it.
        encoders_only: leave the denoiser out, where it has its own files.

    Raises:
        UserError: the model cannot be loaded.
    """

    kind: ClassVar[Kind]
    steps: int
    """Sampling steps of a validation image, and its guidance."""
    guidance: float
    lora_targets: Mapping[str, tuple[str, ...]]
    text_key: str
    trains_text = False

    def __init__(
        self, config: ModelConfig, device: torch.device, weight_dtype: torch.dtype, encoders_only: bool = False
    ) -> None:
        self.device, self.weight_dtype, self.config = device, weight_dtype, config
        self.lora_says: Mapping[str, str] = {}
        # Large models are never held whole in float32 for a LoRA.
        own = {self.kind.networks[0]: weight_dtype} if self.kind.is_transformer and config.rank is not None else None
        self.pipeline = load_whole(self.kind, config, encoders_only, own)
        self.vae = self.pipeline.vae.float().eval().requires_grad_(False)
        self.denoiser = getattr(self.pipeline, self.kind.networks[0])
        self.schedule = training_schedule(self.pipeline.scheduler.config)
        # All parts that encode: every part of the VAE that does not decode.
        encoder = [part for name, part in self.vae.named_children() if name not in ("decoder", "post_quant_conv")]
        settings = f"{type(self.vae).__name__} {config_settings(self.vae.config)}"
        self.latent_key = weights_hash(*encoder, settings=settings)
        self.latent_stride = self.kind.stride({"vae": self.vae.config})
        self.latent_space = LatentSpace.from_vae(self.vae)
        self._prompts: dict[tuple[str, str], Mapping[str, Tensor | list[Tensor]]] = {}
        self.prepare_text()
        self.vae.to(device)
        if config.offload_text_encoders and device == CPU:
            logger.warning("--offload_text_encoders has no effect on a CPU, where they are")
        for encoder in self.frozen_encoders:
            if config.offload_text_encoders and device != CPU:
                apply_group_offloading(encoder, device, CPU, "leaf_level")
            else:
                encoder.to(device)

    @abstractmethod
    def prepare_text(self) -> None:
        """Sets lora_targets and text_key, and puts text encoders into the denoiser where they are trained."""

    @property
    @abstractmethod
    def text_encoders(self) -> Sequence[Any]:
        """See families.base.Family."""

    @property
    def frozen_encoders(self) -> list[Any]:
        """Text encoders that are not trained, where the model has them."""
        trained = self.kind.trained_text if self.trains_text else ()
        parts = [part for part in self.kind.networks if part.startswith("text_encoder") and part not in trained]
        return [encoder for part in parts if (encoder := getattr(self.pipeline, part)) is not None]

    @abstractmethod
    def encode_prompt(
        self, prompt: str, negative_prompt: str, joint: JointModel | None = None
    ) -> Mapping[str, Tensor | list[Tensor]]:
        """Arguments of the pipeline's call for a prompt and a negative prompt, by keyword.

        Args:
            joint: the module whose text encoders to use, where they are trained.
        """

    @abstractmethod
    def text_bytes(self) -> int:
        """Bytes cached for a caption, in float32."""

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pixels.to(self.device, torch.float32)).latent_dist
        return posterior.mean.float().cpu(), posterior.std.float().cpu()

    def entry_bytes(self, height: int, width: int) -> tuple[int, int]:
        channels, stride = vae_channels(self.vae.config), self.latent_stride
        return 2 * 4 * channels * (height // stride) * (width // stride), self.text_bytes()

    def prepare_prompt(self, prompt: str, negative_prompt: str = "") -> None:
        if not self.trains_text:
            found = self.encode_prompt(prompt, negative_prompt)
            self._prompts[prompt, negative_prompt] = {name: moved(value, CPU) for name, value in found.items()}

    def prompt_of(self, denoiser: nn.Module, prompt: str, negative_prompt: str) -> dict[str, Tensor | list[Tensor]]:
        """What encode_prompt gives for a prepared prompt, on the device; trained encoders run with current weights."""
        if isinstance(denoiser, JointModel):
            with self.autocast():
                found = self.encode_prompt(prompt, negative_prompt, denoiser)
            return {name: moved(value, torch.float32) for name, value in found.items()}
        found = self._prompts[prompt, negative_prompt]
        return {name: moved(value, self.device) for name, value in found.items()}

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to the run's precision."""
        half = self.weight_dtype != torch.float32
        return torch.autocast(self.device.type, self.weight_dtype) if half else nullcontext()

    @staticmethod
    def say_cut(captions: Sequence[str], length: int) -> None:
        """Warns of captions that had more tokens than count."""
        if captions:
            logger.warning("%d captions were cut to %d tokens, first: %.80s", len(captions), length, captions[0])

    def free_encoders(self) -> None:
        for encoder in self.frozen_encoders:
            encoder.to("cpu")

    def pipeline_options(self) -> dict[str, Any]:
        """Options of the pipeline's class besides its components, as the model has them."""
        return {}

    def sampling_parts(self, denoiser: nn.Module) -> dict[str, Any]:
        """Networks that the pipeline needs to draw latents; no others, as it runs on the device of its first one."""
        name = self.kind.networks[0]
        return {name: self.parts(denoiser)[name]}

    def sampling_kwargs(self) -> dict[str, Any]:
        """Further arguments of the pipeline's call."""
        return self.guided(self.guidance, None)

    @staticmethod
    def guided(scale: float, count: int | None) -> dict[str, Any]:
        """Arguments of the pipeline's call for guidance of this scale.

        Args:
            count: number of prompts passed as text; None: prompts and negative prompts are passed as embeddings.
        """
        return {"guidance_scale": scale}

    @staticmethod
    def call_options(pipeline: Any) -> dict[str, Any]:
        """Further arguments for prompts passed as text, so that the pipeline encodes them as this class does."""
        return {}

    @staticmethod
    def to_raw(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Raw latents from the latents that the pipeline gives for images of this size, in pixels."""
        return LatentSpace.from_vae(vae).to_raw(latents)

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

        encoded = self.prompt_of(denoiser, prompt, negative_prompt)
        cls = type(self.pipeline)
        taken = inspect.signature(cls.__init__).parameters
        parts = {part: None for part in self.pipeline.components if part in taken} | self.sampling_parts(denoiser)
        pipeline = cls(**parts | {"scheduler": self.pipeline.scheduler} | self.pipeline_options())
        pipeline.vae_scale_factor = self.latent_stride
        pipeline.set_progress_bar_config(disable=True)
        proceed()
        with self.autocast():
            latents = pipeline(
                **encoded,
                **self.sampling_kwargs(),
                height=resolution,
                width=resolution,
                num_inference_steps=self.steps,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                callback_on_step_end=between_steps,
            ).images
        return self.to_raw(self.vae, latents.float(), resolution, resolution).cpu()

    @torch.no_grad()
    def decode(self, raw_latents: Tensor) -> Image.Image:
        vae = self.vae
        self.tile()
        try:
            decoded = vae.decode(raw_latents.to(self.device)).sample
        finally:
            vae.disable_tiling()
        (image,) = self.pipeline.image_processor.postprocess(decoded, output_type="pil")
        return image

    def tile(self) -> None:
        """Makes the VAE decode images larger than DECODED_PIXELS in tiles of that size."""
        if hasattr(self.vae, "tile_sample_min_height"):
            overlapping = DECODED_PIXELS * 7 // 8
            self.vae.enable_tiling(DECODED_PIXELS, DECODED_PIXELS, overlapping, overlapping)
            return
        # Not the size in its config: some configs state a tenth of what the VAE can decode.
        self.vae.tile_sample_min_size = DECODED_PIXELS
        self.vae.tile_latent_min_size = DECODED_PIXELS // self.latent_stride
        self.vae.enable_tiling()

    def parts(self, denoiser: nn.Module) -> dict[str, Any]:
        """The networks that are trained, by their name in a pipeline."""
        return (
            dict(denoiser.named_children()) if isinstance(denoiser, JointModel) else {self.kind.networks[0]: denoiser}
        )

    def export(self, denoiser: nn.Module, folder: Path) -> None:
        for name, part in self.parts(denoiser).items():
            setattr(self.pipeline, name, part)
        self.pipeline.save_pretrained(folder, safe_serialization=True)

    def save_denoiser(self, denoiser: nn.Module, folder: Path) -> None:
        for name, part in self.parts(denoiser).items():
            part.save_pretrained(folder / name, safe_serialization=True)

    def export_lora(self, denoiser: nn.Module, folder: Path) -> None:
        parts = self.parts(denoiser)
        tensors = {f"{name}_lora_layers": adapter_of(name, part) for name, part in parts.items()}
        adapters = _collate_lora_metadata(parts)
        packed = {
            f"{name}.{key}": sorted(value) if isinstance(value, set) else value
            for name in parts
            for key, value in adapters[f"{name}_lora_adapter_metadata"].items()
        }
        if self.kind.is_transformer:  # most readers of such files assume that alpha is the rank
            for name in parts:
                fold_alpha(tensors[f"{name}_lora_layers"], packed, name)
        facts = lora_metadata(self.config, self.pipeline.scheduler.config) | dict(self.lora_says)

        def write(weights: dict[str, Tensor], file: str) -> None:
            adapter = json.dumps(packed, indent=2, sort_keys=True)
            save_file(weights, file, {"format": "pt", ADAPTER: adapter} | facts)

        type(self.pipeline).save_lora_weights(folder, **tensors, save_function=write)

    def kohya_lora(self, denoiser: nn.Module, lora: Path, title: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        parts, first = self.parts(denoiser), self.kind.networks[0]
        if "to_kohya" not in self.kind.parts:
            raise UserError(f"{lora}: no other names of a {self.kind.name} LoRA's layers are known")

        def weight_of(part: str, module: str) -> Tensor:
            weight: Tensor = parts[part].get_submodule(module).base_layer.weight
            return weight

        found: tuple[dict[str, Tensor], dict[str, str]]
        found = self.kind.find("to_kohya")(lora, {first: parts[first].config}, title, weight_of)
        return found


def moved(value: Tensor | list[Tensor], to: torch.device | torch.dtype) -> Tensor | list[Tensor]:
    """A tensor, or each of a list of them, on a device or in a precision."""
    return [own.to(to) for own in value] if isinstance(value, list) else value.to(to)
