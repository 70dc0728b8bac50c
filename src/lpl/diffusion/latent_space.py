"""Model-space latents (what the denoiser sees) to raw latents (what `vae.decode` takes), and back."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lpl.base.arguments import is_number


@dataclass(frozen=True)
class LatentSpace:
    """raw = latents * scale + shift, per channel, or per channel and phase of a grid of p x p cells.

    Attributes:
        scale: (C,) or (1,), float64; or (C, p, p), for the cell at row i and column j that of [:, i % p, j % p].
        shift: likewise.

    Raises:
        ValueError: they are no such tensors.
    """

    scale: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("shift", self.shift)):
            if not isinstance(value, Tensor) or value.dim() not in (1, 3):
                raise ValueError(f"LatentSpace: {name} is {value!r}: pass a tensor (C,), or use LatentSpace.scaled")

    @staticmethod
    def identity() -> "LatentSpace":
        """raw = latents."""
        return LatentSpace(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))

    @staticmethod
    def scaled(scaling_factor: float, shift_factor: float = 0.0) -> "LatentSpace":
        """raw = latents / scaling_factor + shift_factor."""
        return LatentSpace.from_config(SimpleNamespace(scaling_factor=scaling_factor, shift_factor=shift_factor))

    @staticmethod
    def standardised(mean: Any, std: Any) -> "LatentSpace":
        """raw = latents * std + mean, with numbers per channel, ignoring a config's scaling_factor (GLM-Image)."""
        return LatentSpace.from_config(SimpleNamespace(latents_mean=list(mean), latents_std=list(std)))

    @staticmethod
    def from_vae(vae: Any) -> "LatentSpace":
        """The rule that a VAE states: from its statistics where it holds them as buffers, else from its config.

            batch norm `bn` of 2 x 2 cells as channels (Flux.2):   raw = latents * sqrt(var + eps) + mean, per phase
            buffers latents_mean and latents_std (LTX):            raw = latents * std / scaling_factor + mean
            otherwise:                                             from_config

        Raises:
            ValueError: as from_config does.
        """
        norm = dict(vae.named_children()).get("bn")
        if norm is not None:
            variance, mean = norm.running_var.detach().cpu().double(), norm.running_mean.detach().cpu().double()
            scale, shift = (
                value.unflatten(0, (-1, 2, 2)) for value in ((variance + vae.config.batch_norm_eps).sqrt(), mean)
            )
            return LatentSpace(scale, shift)
        buffers = dict(vae.named_buffers(recurse=False))
        if {"latents_mean", "latents_std"} <= set(buffers):
            mean, std = (buffers[name].flatten().tolist() for name in ("latents_mean", "latents_std"))
            factor = getattr(vae.config, "scaling_factor", None)
            return LatentSpace.from_config(SimpleNamespace(scaling_factor=factor, latents_mean=mean, latents_std=std))
        return LatentSpace.from_config(vae.config)

    @staticmethod
    def from_config(config: Any) -> "LatentSpace":
        """The rule that a VAE's config states.

            latents_mean and latents_std given:   raw = latents * std / scaling_factor + mean
            no scaling_factor (Qwen-Image, Wan):  raw = latents * std + mean
            otherwise:                            raw = latents / scaling_factor + shift_factor (0 where unset)

        Args:
            config: a `vae.config` of diffusers.

        Raises:
            ValueError: a config that states no such rule.
        """
        factor = getattr(config, "scaling_factor", None)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if factor is None and (mean is None or std is None):
            raise ValueError("vae.config has no scaling_factor: pass latent_space=")
        factor = 1.0 if factor is None else factor
        if mean is None or std is None:
            std, mean = [1.0], [getattr(config, "shift_factor", None) or 0.0]
        # Plain numbers, since the networks that a plan builds hold no values.
        if not all(is_number(x) and math.isfinite(x) for x in (factor, *mean, *std)) or not all((factor, *std)):
            raise ValueError(
                f"vae.config: scaling_factor {factor}, means {mean} and deviations {std} map no latents: correct them "
                "or pass latent_space="
            )
        channels = getattr(config, "latent_channels", getattr(config, "z_dim", len(std)))
        if any(len(values) not in (1, channels) for values in (mean, std)):
            raise ValueError(f"vae.config: {len(mean)} latents_mean and {len(std)} latents_std for {channels} channels")
        scale = torch.tensor([value / factor for value in std], dtype=torch.float64)
        return LatentSpace(scale, torch.tensor(mean, dtype=torch.float64))

    def to_raw(self, latents: Tensor) -> Tensor:
        """Model space (B, C, ...) to raw, same dtype."""
        return latents * self._view(self.scale, latents) + self._view(self.shift, latents)

    def from_raw(self, raw_latents: Tensor) -> Tensor:
        """Raw (B, C, ...) to model space, same dtype."""
        return (raw_latents - self._view(self.shift, raw_latents)) / self._view(self.scale, raw_latents)

    def gradient_from_raw(self, gradient: Tensor) -> Tensor:
        """Gradient with respect to raw latents (B, C, ...) to the one with respect to model space, same dtype."""
        return gradient * self._view(self.scale, gradient)

    @staticmethod
    def _view(value: Tensor, like: Tensor) -> Tensor:
        value = value.to(like.device, like.dtype, non_blocking=True)
        if len(value) not in (1, like.shape[1]):
            raise ValueError(
                f"latents have {like.shape[1]} channels, the latent space has {len(value)}: pass the latent_space= of "
                "these latents"
            )
        if value.dim() == 1:
            return value.view(1, -1, *[1] * (like.dim() - 2))
        phases, size = value.shape[1], like.shape[-2:]
        if size[0] % phases or size[1] % phases:
            raise ValueError(f"latents of {size[0]} x {size[1]} cells: this latent space takes multiples of {phases}")
        tiled = value.repeat(1, size[0] // phases, size[1] // phases)
        return tiled.view(1, len(value), *[1] * (like.dim() - 4), *size)
