"""Options: length, batches, precision, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lpl.config.checks import check_declared, free, option, require


@dataclass(frozen=True)
class RunConfig:
    """Run: length, batches, precision, checkpoints."""

    output_dir: str = option("lpl-output", path=True, free=True)
    """Where the result, checkpoints, samples and config.yaml go."""
    seed: int = option(0, most=2**32 - 1)
    """Seed of every draw: order, crops, flips, noise, timesteps."""
    train_batch_size: int = option(1, most=2**16)
    """Samples per process and micro-batch."""
    gradient_accumulation_steps: int = option(1, most=10**6)
    """Micro-batches per optimizer step."""
    num_train_epochs: int = option(100, most=10**9)
    """Passes over the data, unless --max_train_steps is given."""
    max_train_steps: int | None = option(None, most=10**9)
    """Optimizer steps in all."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the denoiser's arithmetic; unset: what `accelerate config` says, else no."""
    allow_tf32: bool = False
    """Allow TF32 on NVIDIA GPUs, also in LPL's float32 decoder."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser in the backward pass to save memory."""
    checkpointing_steps: int = free(500)
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = free(None)
    """Keep only this many of the newest checkpoints."""
    resume_from_checkpoint: str | None = option(None, path=True, free=True)
    """`latest` or a checkpoint folder; without it an unfinished run in --output_dir is continued all the same."""
    dry_run: bool = free(False)
    """Print the plan (parameters, taps, steps, memory) and stop."""
    save_steps: int | None = free(None)
    """Write weights for inference, raw and averaged, to saved-<step> in --output_dir every so many optimizer steps."""
    compile_denoiser: bool = free(False)
    """Run the denoiser through torch.compile in training; costs minutes at the start, once per shape of the images."""
    max_minutes: float | None = free(None)
    """Stop after so many minutes as a signal does: with a checkpoint and exit code 4; the same command continues."""
    on_nonfinite: Literal["stop", "skip"] = free("stop")
    """At a loss or gradient that is not finite: stop before the optimizer step, or leave that step out and go on."""
    max_skips: int = free(10)
    """For skip: stop if more steps than this are left out in a row."""
    allow_changes: bool = free(False)
    """Continue a run though options or data that change its trajectory have changed."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(self.seed >= 0, f"--seed must be 0 or more, not {self.seed}")
        for name in (
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "checkpointing_steps",
            "max_skips",
        ):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.max_minutes is None or 0 < self.max_minutes < float("inf"),
            f"--max_minutes must be positive, not {self.max_minutes}",
        )
        for name in ("max_train_steps", "checkpoints_total_limit", "save_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} must be at least 1, not {value}")
