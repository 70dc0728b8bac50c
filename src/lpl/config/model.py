"""Options: the model, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lpl.config.checks import check_declared, option, require


@dataclass(frozen=True)
class ModelConfig:
    """Model: what is trained."""

    pretrained_model_name_or_path: str | None = option(None, path=True)
    """A diffusers folder, a Hub id, or one .safetensors file."""
    pretrained_vae_model_name_or_path: str | None = option(None, path=True)
    """Another VAE than the model's own: a diffusers folder or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    cache_dir: str | None = option(None, path=True, free=True)
    """Where downloads from the Hub are kept."""
    single_file_config: str | None = option(None, path=True, free=True)
    """For a .safetensors file without network: a diffusers folder with that model's configs and tokenizers."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the denoiser predicts; unset: what the model's scheduler says. The saved pipeline says the same."""
    clip_skip: int | None = option(None, most=1000)
    """Take the text encoders' output so many layers before the usual one (diffusers' meaning of clip_skip)."""
    max_token_length: Literal[75, 150, 225] = 75
    """Caption tokens that are used; beyond 75, in chunks of 75 that are encoded one by one and joined."""
    rank: int | None = option(None, most=2**16)
    """Train a LoRA of this rank instead of the whole denoiser."""
    rescale_betas_zero_snr: bool = False
    """Rescale the schedule so that its last timestep is pure noise (zero terminal SNR, for v_prediction or sample); the
    saved pipeline says the same, and samples with trailing timesteps."""
    lora_alpha: float | None = None
    """The LoRA is multiplied by lora_alpha/rank; unset: the rank, so by 1."""
    lora_dropout: float = 0.0
    """Share of the LoRA's inputs that is dropped at each training step."""
    lora_targets: Literal["attention", "attention_mlp", "all"] = "attention"
    """Layers with a LoRA: the attentions' projections; also the transformers' MLPs; or every matrix and convolution of
    the blocks."""
    use_dora: bool = False
    """Train a DoRA: also a magnitude for each output of these layers (slower, more memory)."""
    train_text_encoder: bool = False
    """Train both text encoders too, or with --rank a LoRA on their attentions (--lora_targets attention_mlp or all: and
    MLPs); see --text_encoder_lr."""

    def __post_init__(self) -> None:
        check_declared(self)
        alpha = self.lora_alpha
        require(alpha is None or 0 < alpha < float("inf"), f"--lora_alpha must be above 0, not {alpha}")
        require(0 <= self.lora_dropout < 1, f"--lora_dropout must lie in 0..1, below 1, not {self.lora_dropout}")
        require(self.rank is None or self.rank >= 1, f"--rank must be at least 1, not {self.rank}")
        require(self.clip_skip is None or self.clip_skip >= 0, f"--clip_skip must be 0 or more, not {self.clip_skip}")
        require(
            not (self.use_dora and self.train_text_encoder),
            "--use_dora with --train_text_encoder: diffusers loads no magnitudes into text encoders; drop one of them",
        )

    @property
    def alpha(self) -> float:
        """The LoRA's alpha."""
        assert self.rank is not None
        return self.rank if self.lora_alpha is None else self.lora_alpha
