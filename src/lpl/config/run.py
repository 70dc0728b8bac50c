"""Options: the model and what of it is trained; length, batches, precision, checkpoints; validation, logs, hub."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lpl.base.errors import require
from lpl.config.checks import Needs, Options, option

ONE_MODEL = "all arms begin with one model"
A_FILE = Needs(
    "a .safetensors file as the model",
    lambda config: str(config.model.pretrained_model_name_or_path).endswith(".safetensors"),
)


def processes() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class ModelConfig(Options):
    """Model: what is trained."""

    pretrained_model_name_or_path: str | None = option(None, path=True, arms=ONE_MODEL, main=True)
    """A diffusers folder, a Hub id, or one .safetensors file."""
    pretrained_vae_model_name_or_path: str | None = option(None, path=True, arms=ONE_MODEL, elsewhere=("vae",))
    """Another VAE than the model's own: a diffusers folder or a Hub id."""
    revision: str | None = option(None, arms=ONE_MODEL)
    """Branch, tag or commit of the model on the Hub."""
    variant: str | None = option(None, arms=ONE_MODEL)
    """Variant of the weight files, such as fp16."""
    cache_dir: str | None = option(None, path=True, free=True)
    """Where downloads from the Hub are kept."""
    single_file_config: str | None = option(None, path=True, needs=A_FILE, arms=ONE_MODEL)
    """For a .safetensors file: a diffusers folder with its configs and tokenizers; where the file holds a transformer
    alone, the folder or Hub id that its text encoders and VAE are loaded from."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = option(
        None, defines=("diffusion_loss",), elsewhere=("v_parameterization",), schedule="discrete"
    )
    """What the denoiser predicts; unset: what the model's scheduler says. The saved pipeline says the same."""
    clip_skip: int | None = option(None, most=1000, least=0, by_model=True)
    """Take the text encoders' output this many layers before the usual one (diffusers' meaning of clip_skip)."""
    max_token_length: Literal[75, 150, 225] = option(75, by_model=True, elsewhere=("tokenizer_max_length",))
    """Caption tokens that are used; beyond 75, in chunks of 75 that are encoded one by one and joined."""
    rank: int | None = option(None, most=2**16, least=1, elsewhere=("network_dim", "lora_rank"), main=True)
    """Train a LoRA of this rank instead of the whole denoiser."""
    rescale_betas_zero_snr: bool = option(
        False, defines=("diffusion_loss", "lpl"), elsewhere=("zero_terminal_snr",), schedule="discrete"
    )
    """Rescale the schedule so that its last timestep is pure noise (zero terminal SNR, for v_prediction or sample); the
    saved pipeline says the same, and samples with trailing timesteps."""
    lora_alpha: float | None = option(None, above=0, needs="rank", elsewhere=("network_alpha",))
    """The LoRA is multiplied by lora_alpha/rank; unset: the rank, so by 1."""
    lora_dropout: float = option(0.0, least=0, below=1, needs="rank", elsewhere=("network_dropout",))
    """Share of the LoRA's inputs that is dropped at each training step."""
    lora_targets: Literal["attention", "attention_mlp", "all"] = option(
        "attention", needs="rank", elsewhere=("peft_lora_target_modules",)
    )
    """Layers with a LoRA: the attentions' projections; also the transformers' MLPs; or every matrix and convolution of
    the blocks."""
    use_dora: bool = option(False, needs="rank")
    """Train a DoRA: also a magnitude for each output of these layers (slower, more memory)."""
    lora_weights: str | None = option(None, path=True, arms=ONE_MODEL, elsewhere=("network_weights", "init_lora"))
    """A LoRA file, of diffusers' or kohya's naming, to go on training: rank, alpha and layers are the file's, and if it
    has text encoder layers, those are trained too."""
    merge_lora_weights: bool = option(False, needs="lora_weights", arms=ONE_MODEL, elsewhere=("base_weights",))
    """Merge --lora_weights into the model before training instead; with --rank a new LoRA is trained on top."""
    quantize_base: Literal["int8", "fp8", "nf4"] | None = option(
        None, needs="rank", elsewhere=("fp8_base", "base_model_precision", "quantize_via")
    )
    """Keep the frozen linear layers of the denoiser's blocks in 8 or 4 bits, for small cards: a half or a quarter of
    bfloat16's memory for a little time. The LoRA is for the whole model, as ever."""
    offload_blocks: float | None = option(
        None,
        above=0,
        most=1,
        free=True,
        needs="rank",
        elsewhere=("blocks_to_swap", "enable_group_offload", "layer_offload_fraction"),
    )
    """Share of the denoiser's repeated blocks whose frozen weights wait in the computer's memory and are copied to the
    device each time they are needed: for cards that do not hold the model, at the price of time. 1: all of them."""
    train_text_encoder: bool = option(False, by_model=True)
    """Train the CLIP text encoders too, or with --rank a LoRA on their attentions (--lora_targets attention_mlp or all:
    and MLPs); see --text_encoder_lr. A T5 beside them stays frozen."""

    offload_text_encoders: bool = option(False, free=True)
    """While captions are encoded, move the text encoders to the device a layer at a time: for cards that do not hold
    them (T5-XXL takes 9 GiB)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.offload_text_encoders and self.train_text_encoder),
            "--offload_text_encoders with --train_text_encoder: what is trained stays on the device; drop one of them",
        )
        require(
            not (self.use_dora and self.train_text_encoder),
            "--use_dora with --train_text_encoder: diffusers loads no magnitudes into text encoders; drop one of them",
        )
        require(
            not (self.use_dora and self.quantize_base),
            f"--use_dora with --quantize_base {self.quantize_base}: a DoRA needs whole weights; drop one of them",
        )

    @property
    def continued_lora(self) -> str | None:
        """The file of the LoRA that is trained on."""
        return None if self.merge_lora_weights else self.lora_weights

    @property
    def merged_lora(self) -> str | None:
        """The file of the LoRA that is part of the model."""
        return self.lora_weights if self.merge_lora_weights else None

    @property
    def alpha(self) -> float:
        """The LoRA's alpha."""
        assert self.rank is not None
        return self.rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True)
class RunConfig(Options):
    """Run: length, batches, precision, checkpoints."""

    output_dir: str = option("lpl-output", path=True, free=True, arms="every run has a folder of its own", main=True)
    """Where the result, checkpoints, samples and config.yaml go."""
    seed: int = option(0, most=2**32 - 1, least=0, arms="--seeds sets it for every arm")
    """Seed of every draw: order, crops, flips, noise, timesteps."""
    train_batch_size: int = option(1, most=2**16, least=1, draws=True, divides=True, main=True)
    """Samples per process and micro-batch."""
    gradient_accumulation_steps: int = option(1, most=10**6, least=1, draws=True, divides=True)
    """Micro-batches per optimizer step."""
    num_train_epochs: int = option(100, most=10**9, least=1, elsewhere=("max_train_epochs",))
    """Passes over the data, unless --max_train_steps or --draws_per_image is given."""
    draws_per_image: float | None = option(
        None, above=0, most=10**6, main=True, replaced_by=("max_train_steps", "num_train_epochs")
    )
    """End the run when each image has been drawn this often on average, at --max_train_steps at the latest (100 to 200
    for some 20 images of a subject; above 300 the model learns them by heart)."""
    max_train_steps: int | None = option(
        None, most=10**9, least=1, main=True, replaced_by=("draws_per_image", "num_train_epochs")
    )
    """Optimizer steps in all; with --draws_per_image, at most this many."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, main=True)
    """Precision of the denoiser's arithmetic; unset: what `accelerate config` says, else no."""
    allow_tf32: bool = False
    """Allow TF32 on NVIDIA GPUs, also in LPL's float32 decoder."""
    gradient_checkpointing: bool = option(False, main=True)
    """Recompute the denoiser in the backward pass to save memory."""
    checkpointing_steps: int = option(
        500,
        free=True,
        least=1,
        period="no checkpoint is written on the way",
        elsewhere=("save_state", "checkpoint_step_interval", "checkpoint_epoch_interval"),
    )
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = option(
        None, free=True, least=1, elsewhere=("save_last_n_steps_state", "checkpoints_rolling_total_limit")
    )
    """Keep only this many of the newest checkpoints."""
    resume_from_checkpoint: str | None = option(
        None, path=True, free=True, recorded=False, arms="unfinished runs are continued anyway", elsewhere=("resume",)
    )
    """`latest` or a checkpoint folder; without it an unfinished run in --output_dir is continued all the same."""
    dry_run: bool = option(False, free=True, recorded=False, arms="lpl compare has none", main=True)
    """Print the plan (parameters, taps, steps, memory) and stop."""
    save_steps: int | None = option(
        None,
        free=True,
        least=1,
        period="no weights are saved on the way",
        elsewhere=("save_every_n_steps", "save_every_n_epochs"),
    )
    """Optimizer steps between weights for inference, raw and averaged, written to saved-<step> in --output_dir."""
    compile_denoiser: bool = option(False, free=True, elsewhere=("torch_compile", "dynamo_backend"))
    """Run the denoiser through torch.compile in training; costs minutes at the start, once per shape of the images."""
    max_minutes: float | None = option(None, free=True, above=0)
    """Stop after this many minutes as at a signal: with a checkpoint and exit code 4; the same command continues."""
    on_nonfinite: Literal["stop", "skip"] = option("stop", free=True)
    """At a loss or gradient that is not finite: stop before the optimizer step, or leave that step out and go on."""
    max_skips: int = option(10, free=True, least=1, needs="on_nonfinite=skip")
    """For skip: stop if more steps than this are left out in a row."""
    allow_changes: bool = option(False, free=True)
    """Continue a run even if options or data that change its trajectory have changed."""


NOT_PUSHED = "runs of a comparison are not pushed"
PROMPTS = "--validation_prompt or --validation_prompts"
IMAGES = Needs(PROMPTS, lambda config: config.logging.draws_images)
VALIDATION = Needs(
    f"--validation_samples, --validation_data_dir, {PROMPTS}",
    lambda config: config.logging.draws_images or config.data.holds_out,
)


@dataclass(frozen=True)
class LoggingConfig(Options):
    """Validation images, logs and publishing."""

    validation_prompt: str | None = option(None, free=True, may_be_empty=True, main=True)
    """Prompt of the validation images; unset: none are made."""
    num_validation_images: int = option(4, most=10_000, free=True, least=1, needs=IMAGES)
    """Validation images of each prompt, each time."""
    validation_epochs: int = option(
        1,
        free=True,
        least=1,
        needs=VALIDATION,
        elsewhere=(
            "sample_every_n_epochs",
            "validation_epoch_interval",
            "eval_epoch_interval",
            "validate_every_n_epochs",
        ),
    )
    """Epochs between validations."""
    validation_steps: int | None = option(
        None,
        free=True,
        least=1,
        needs=VALIDATION,
        elsewhere=("sample_every_n_steps", "validation_step_interval", "eval_steps_interval", "validate_every_n_steps"),
    )
    """Optimizer steps between validations, instead of epochs."""
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all", "none"] = option(
        "tensorboard", free=True, elsewhere=("log_with",)
    )
    """Where metrics go."""
    logging_dir: str = option("logs", path=True, free=True)
    """TensorBoard folder, a name within --output_dir."""
    log_every: int = option(10, free=True, least=1, period="only the first and the last step are logged")
    """Optimizer steps between logged metrics; the device is not synchronised in between."""
    push_to_hub: bool = option(False, free=True, arms=NOT_PUSHED)
    """Upload the result with a model card when training ends."""
    hub_model_id: str | None = option(
        None, free=True, needs="push_to_hub", arms=NOT_PUSHED, elsewhere=("huggingface_repo_id",)
    )
    """Repository to push to; unset: the name of --output_dir."""
    hub_token: str | None = option(
        None, free=True, recorded=False, needs="push_to_hub", arms=NOT_PUSHED, elsewhere=("huggingface_token",)
    )
    """Token for the push; never written to config.yaml. `hf auth login` is safer."""
    validation_prompts: str | None = option(
        None, path=True, free=True, elsewhere=("sample_prompts", "user_prompt_library")
    )
    """Instead of --validation_prompt a file: .txt with a prompt a line, or .jsonl with prompt and, if you like,
    negative_prompt and seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = Path(self.logging_dir).parts
        require(
            bool(parts) and not Path(self.logging_dir).is_absolute() and ".." not in parts,
            f"--logging_dir {self.logging_dir}: is not a folder within --output_dir: give a name such as logs",
        )
        require(
            self.validation_prompt is None or self.validation_prompts is None,
            f"--validation_prompt and --validation_prompts {self.validation_prompts} are both given: put the prompt "
            "into the file",
        )

    @property
    def draws_images(self) -> bool:
        """Whether validation images are made."""
        return self.validation_prompt is not None or self.validation_prompts is not None
