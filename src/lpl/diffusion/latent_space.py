"""Model-space latents (what the denoiser sees) to raw latents (what `vae.decode` takes), and back."""

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
            ValueError: a config without scaling_factor.
        """
        factor = getattr(config, "scaling_factor", None)
        if factor is None:
            raise ValueError("vae.config has no scaling_factor: pass latent_space=")
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            return LatentSpace(torch.tensor(std, dtype=torch.float64) / factor, torch.tensor(mean, dtype=torch.float64))
        shift = getattr(config, "shift_factor", None) or 0.0
        return LatentSpace(torch.tensor([1 / factor], dtype=torch.float64), torch.tensor([shift], dtype=torch.float64))

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
