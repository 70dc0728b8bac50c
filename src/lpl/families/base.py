"""The interface between the trainer and a model family. Only code behind it knows names of models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from lpl.diffusion.latent_space import LatentSpace
from lpl.diffusion.schedule import Schedule

DECODED_PIXELS = 1024
"""Side of the largest image that is decoded at once: 3 GiB in float32 for SDXL, less than its UNet takes."""


ORIGIN = {"architectures", "dtype", "torch_dtype", "transformers_version", "name_or_path"}
"""Keys of configs that say where a part came from; they do not matter, since weights are hashed."""
IDLE = ORIGIN | {"scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "sample_size"}
"""Keys of configs that do not act on raw latents in float32, nor on embeddings."""


class Family(Protocol):
    """A loaded model: the denoiser that is trained, still on the CPU, and the frozen parts around it, on the device."""

    denoiser: Any
    """The network that is trained, float32 (LoRA: base weights in the run's precision).

    With --train_text_encoder a module of denoiser and text encoders, which is then what `denoiser` means below; its
    parameters' names begin with the names of the components that have their own learning rates.
    """
    vae: Any
    """The frozen VAE, float32, in eval mode."""
    latent_space: LatentSpace
    """Maps between the VAE's raw latents and those that the denoiser is trained on, of the same shape."""
    schedule: Schedule
    """The training schedule; the run decides how levels are drawn from it."""
    lora_targets: Mapping[str, tuple[str, ...]]
    """For each value of --lora_targets, the names of the denoiser's layers that get a LoRA."""
    latent_key: str
    """Hash of the image encoder's weights and settings."""
    latent_stride: int
    """Pixels per latent, in height and in width."""
    text_key: str
    """Hash of the text encoders' weights and settings."""
    lora_says: Mapping[str, str]
    """Metadata on the training to be written to LoRA files."""

    @property
    def text_encoders(self) -> Sequence[Any]:
        """The text encoders, in eval mode; with --train_text_encoder the trained ones are parts of the denoiser."""

    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and std, raw latents (B, C, h, w), float32 on the CPU, of pixels (B, 3, H, W) in [-1, 1]."""

    def encode_text(self, captions: list[str]) -> Mapping[str, Tensor | list[Tensor]]:
        """What the denoiser needs of each caption, by field, on the CPU: (B, ...), or B tensors of several lengths.

        Embeddings, or token ids (integers) where the text encoders are trained. In a batch, shorter ones have zeros at
        their end: a denoiser that must know them gets a field of ones, which is then a mask, or "lengths", (B,)
        integers, which stay on the CPU, where they can be read without waiting for a device.
        """

    def entry_bytes(self, height: int, width: int) -> tuple[int, int]:
        """Bytes cached in float32 for an image of this size, in pixels, and for a caption."""

    def denoise(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        levels: Tensor,
        text: Mapping[str, Tensor],
        extra: Mapping[str, Tensor],
    ) -> Tensor:
        """The model's output, (B, C, h, w), in terms of the schedule's prediction type (flow: noise - latents).

        Args:
            noisy_latents: (B, C, h, w), float32, model space, on the VAE's grid; this method packs them.
            levels: (B,), timesteps of a discrete schedule, int64, or sigma of flow matching, float32.
            extra: sizes, (B, 6) = original (h, w), crop (y, x), target (h, w).
        """

    def prepare_prompt(self, prompt: str, negative_prompt: str = "") -> None:
        """Encodes a prompt for `sample` while the text encoders are on the device, except with trained ones.

        With trained text encoders `sample` encodes it, with the weights in the denoiser that it gets. A negative prompt
        of "" means the model's own default.
        """

    def free_encoders(self) -> None:
        """Moves text encoders off the device, unless they are trained; called once everything is cached.

        The VAE stays: LPL runs in it.
        """

    def sample(
        self,
        denoiser: nn.Module,
        prompt: str,
        negative_prompt: str,
        seed: int,
        resolution: int,
        proceed: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Raw latents, (1, C, h, w), float32, on the CPU, of an image for a prepared prompt; denoiser in eval mode.

        `proceed` is called before every sampling step and after the last; it raises to stop the sampling. The VAE may
        be on any device.
        """

    def decode(self, raw_latents: Tensor) -> Image.Image:
        """The image of (1, C, h, w) raw latents, in float32; with a side over 1024 pixels in tiles of that size."""

    def export(self, denoiser: nn.Module, folder: Path) -> None:
        """Writes a pipeline with this denoiser that `from_pretrained` loads and that says its prediction type."""

    def save_denoiser(self, denoiser: nn.Module, folder: Path) -> None:
        """Writes only what is trained, in the subfolders where `from_pretrained` expects it in a pipeline."""

    def export_lora(self, denoiser: nn.Module, folder: Path) -> None:
        """Writes the denoiser's adapter as `load_lora_weights` expects it, with metadata on its training."""

    def kohya_lora(self, denoiser: nn.Module, lora: Path, title: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A file of export_lora in kohya's naming: its tensors and metadata, see lora_names.renamed_lora.

        Args:
            denoiser: with the adapter.

        Raises:
            UserError: kohya's names of the family's layers are not known.
        """


class Exported(Protocol):
    """A model in memory, ready to be written."""

    pipeline: Any

    def single_file(self, title: str) -> tuple[Any, dict[str, str]]:
        """Names and tensors of a single file, and its metadata.

        Raises:
            UserError: no single-file format is known for the model.
        """

    def save_folder(self, folder: Path) -> None:
        """Writes a pipeline in diffusers' format."""


class Blueprint(Protocol):
    """What a plan needs of a model family: networks without trained weights, and inputs of the right shapes."""

    lora_targets: Mapping[str, tuple[str, ...]]
    trained_encoders: int
    """How many text encoders, the first ones, are trained, and so part of the denoiser."""
    schedule: Schedule
    denoiser_word: str
    """What the denoiser is called."""
    latent_channels: int
    stride: int
    """Pixels per cell of a latent."""
    denoise: Callable[..., Tensor]
    """Family.denoise."""

    def denoiser(self) -> Any:
        """The network that is trained, float32, built on the current default device."""

    def vae(self) -> Any:
        """The VAE, float32, frozen and in eval mode."""

    def text_encoders(self) -> list[nn.Module]:
        """The text encoders, float32."""

    def tokens(self, batch: int) -> Sequence[Tensor]:
        """Token ids of `batch` captions for each text encoder, as it takes them at once: a chunk of each caption."""

    def text(self, batch: int) -> dict[str, Tensor]:
        """What encode_text gives for `batch` captions: only shapes matter."""


def acting(config: Mapping[str, Any], idle: set[str]) -> dict[str, Any]:
    """A config without the idle keys and without the library's own."""
    return {name: value for name, value in config.items() if not name.startswith("_") and name not in idle}


def config_settings(config: Mapping[str, Any]) -> str:
    """The part of a module's config that can affect its output, besides its weights."""
    return json.dumps(acting(config, IDLE), sort_keys=True, default=str)


def tokenizer_settings(tokenizer: Any) -> list[Any]:
    """All that token ids depend on."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"truncation": None, "padding": None}  # left from the latest call
    sides = (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.pad_token_type_id)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    template = [tokenizer.chat_template] if getattr(tokenizer, "chat_template", None) else []
    return [type(tokenizer).__name__, rules, sides, ids, tokenizer.split_special_tokens, *template]


def weights_hash(*modules: nn.Module, settings: str = "", large: bool = False) -> str:
    """A hash of modules' weights, whatever files they came from, and of settings; large: one that takes gigabytes."""
    import hashlib

    import xxhash

    digest: Any = xxhash.xxh3_128() if large else hashlib.blake2b(digest_size=16)
    digest.update(settings.encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
