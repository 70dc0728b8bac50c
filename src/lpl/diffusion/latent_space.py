"""Model-space latents (what the denoiser sees) to raw latents (what `vae.decode` takes), and back."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentSpace:
    """raw = latents * scale + shift, per channel.

    Attributes:
        scale: (C,) or (1,), float64.
        shift: (C,) or (1,), float64.
    """

    scale: Tensor
    shift: Tensor

    @staticmethod
    def from_config(config: Any) -> "LatentSpace":
        """The rule that a VAE's config states.

            latents_mean and latents_std given:   raw = latents * std / scaling_factor + mean
            otherwise:                            raw = latents / scaling_factor + shift_factor (0 where unset)

        Args:
            config: a `vae.config` of diffusers.

        Raises:
            ValueError: a config without scaling_factor, or one that states no such rule.
        """
        factor = getattr(config, "scaling_factor", None)
        if factor is None:
            raise ValueError("vae.config has no scaling_factor: pass latent_space=")
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            std, mean = [1.0], [getattr(config, "shift_factor", None) or 0.0]
        # As plain numbers: a plan builds networks that hold none.
        if not all(map(math.isfinite, (factor, *mean, *std))) or not all((factor, *std)):
            raise ValueError(
                f"vae.config: scaling_factor {factor}, means {mean} and deviations {std} map no latents: correct them "
                "or pass latent_space="
            )
        channels = getattr(config, "latent_channels", len(std))
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
        return value.to(like.device, like.dtype, non_blocking=True).view(1, -1, *[1] * (like.dim() - 2))
