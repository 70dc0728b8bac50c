"""Options: the model, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lpl.config.checks import check_declared, option, require

ONE_MODEL = "all arms begin with one model"


@dataclass(frozen=True)
class ModelConfig:
    """Model: what is trained."""

    pretrained_model_name_or_path: str | None = option(None, path=True, arms=ONE_MODEL)
    """A diffusers folder, a Hub id, or one .safetensors file."""
    pretrained_vae_model_name_or_path: str | None = option(None, path=True, arms=ONE_MODEL, elsewhere=("vae",))
    """Another VAE than the model's own: a diffusers folder or a Hub id."""
    revision: str | None = option(None, arms=ONE_MODEL)
    """Branch, tag or commit of the model on the Hub."""
    variant: str | None = option(None, arms=ONE_MODEL)
    """Variant of the weight files, such as fp16."""
    cache_dir: str | None = option(None, path=True, free=True)
    """Where downloads from the Hub are kept."""
    single_file_config: str | None = option(None, path=True, free=True, arms=ONE_MODEL)
    """For a .safetensors file without network: a diffusers folder with that model's configs and tokenizers."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(
        None, defines=("diffusion_loss",), elsewhere=("v_parameterization",)
    )
    """What the denoiser predicts; unset: what the model's scheduler says. The saved pipeline says the same."""
    clip_skip: int | None = option(None, most=1000, least=0)
    """Take the text encoders' output so many layers before the usual one (diffusers' meaning of clip_skip)."""
    max_token_length: Literal[75, 150, 225] = 75
    """Caption tokens that are used; beyond 75, in chunks of 75 that are encoded one by one and joined."""
    rank: int | None = option(None, most=2**16, least=1, elsewhere=("network_dim",))
    """Train a LoRA of this rank instead of the whole denoiser."""
    rescale_betas_zero_snr: bool = option(False, defines=("diffusion_loss", "lpl"), elsewhere=("zero_terminal_snr",))
    """Rescale the schedule so that its last timestep is pure noise (zero terminal SNR, for v_prediction or sample); the
    saved pipeline says the same, and samples with trailing timesteps."""
    lora_alpha: float | None = option(None, above=0, needs="rank", elsewhere=("network_alpha",))
    """The LoRA is multiplied by lora_alpha/rank; unset: the rank, so by 1."""
    lora_dropout: float = option(0.0, least=0, below=1, needs="rank", elsewhere=("network_dropout",))
    """Share of the LoRA's inputs that is dropped at each training step."""
    lora_targets: Literal["attention", "attention_mlp", "all"] = option("attention", needs="rank")
    """Layers with a LoRA: the attentions' projections; also the transformers' MLPs; or every matrix and convolution of
    the blocks."""
    use_dora: bool = option(False, needs="rank")
    """Train a DoRA: also a magnitude for each output of these layers (slower, more memory)."""
    train_text_encoder: bool = False
    """Train both text encoders too, or with --rank a LoRA on their attentions (--lora_targets attention_mlp or all: and
    MLPs); see --text_encoder_lr."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(
            not (self.use_dora and self.train_text_encoder),
            "--use_dora with --train_text_encoder: diffusers loads no magnitudes into text encoders; drop one of them",
        )

    @property
    def alpha(self) -> float:
        """The LoRA's alpha."""
        assert self.rank is not None
        return self.rank if self.lora_alpha is None else self.lora_alpha
