"""Options: length, batches, precision, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lpl.config.checks import check_declared, option


@dataclass(frozen=True)
class RunConfig:
    """Run: length, batches, precision, checkpoints."""

    output_dir: str = option("lpl-output", path=True, free=True, arms="every run has a folder of its own")
    """Where the result, checkpoints, samples and config.yaml go."""
    seed: int = option(0, most=2**32 - 1, least=0, arms="--seeds sets it for every arm")
    """Seed of every draw: order, crops, flips, noise, timesteps."""
    train_batch_size: int = option(1, most=2**16, least=1, draws=True, divides=True)
    """Samples per process and micro-batch."""
    gradient_accumulation_steps: int = option(1, most=10**6, least=1, draws=True, divides=True)
    """Micro-batches per optimizer step."""
    num_train_epochs: int = option(100, most=10**9, least=1, elsewhere=("max_train_epochs",))
    """Passes over the data, unless --max_train_steps is given."""
    max_train_steps: int | None = option(None, most=10**9, least=1)
    """Optimizer steps in all."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the denoiser's arithmetic; unset: what `accelerate config` says, else no."""
    allow_tf32: bool = False
    """Allow TF32 on NVIDIA GPUs, also in LPL's float32 decoder."""
    gradient_checkpointing: bool = False
    """Recompute the denoiser in the backward pass to save memory."""
    checkpointing_steps: int = option(
        500,
        free=True,
        least=1,
        period="no checkpoint is written on the way",
        elsewhere=("save_state", "save_every_n_epochs"),
    )
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int | None = option(None, free=True, least=1, elsewhere=("save_last_n_steps_state",))
    """Keep only this many of the newest checkpoints."""
    resume_from_checkpoint: str | None = option(
        None, path=True, free=True, recorded=False, arms="unfinished runs are continued anyway", elsewhere=("resume",)
    )
    """`latest` or a checkpoint folder; without it an unfinished run in --output_dir is continued all the same."""
    dry_run: bool = option(False, free=True, recorded=False, arms="lpl compare has none")
    """Print the plan (parameters, taps, steps, memory) and stop."""
    save_steps: int | None = option(
        None, free=True, least=1, period="no weights are saved on the way", elsewhere=("save_every_n_steps",)
    )
    """Write weights for inference, raw and averaged, to saved-<step> in --output_dir every so many optimizer steps."""
    compile_denoiser: bool = option(False, free=True, elsewhere=("torch_compile",))
    """Run the denoiser through torch.compile in training; costs minutes at the start, once per shape of the images."""
    max_minutes: float | None = option(None, free=True, above=0)
    """Stop after so many minutes as a signal does: with a checkpoint and exit code 4; the same command continues."""
    on_nonfinite: Literal["stop", "skip"] = option("stop", free=True)
    """At a loss or gradient that is not finite: stop before the optimizer step, or leave that step out and go on."""
    max_skips: int = option(10, free=True, least=1, needs="on_nonfinite=skip")
    """For skip: stop if more steps than this are left out in a row."""
    allow_changes: bool = option(False, free=True)
    """Continue a run though options or data that change its trajectory have changed."""

    def __post_init__(self) -> None:
        check_declared(self)
