"""Every option of `lpl train`: frozen groups whose field names are the flags and the YAML keys.

No heavy imports here: `lpl --help` and every check of a flag run before torch loads.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lpl.config.checks import free, require
from lpl.config.data import DataConfig
from lpl.config.diffusion import DiffusionConfig
from lpl.config.logging import LoggingConfig
from lpl.config.model import ModelConfig
from lpl.config.optim import OPTIMIZERS, OptimConfig
from lpl.config.perceptual import LPLConfig
from lpl.config.run import RunConfig

__all__ = [
    "OPTIMIZERS",
    "DataConfig",
    "DiffusionConfig",
    "LPLConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "free",
    "free_options",
    "require",
]


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a latent diffusion model with the Latent Perceptual Loss."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lpl: LPLConfig = field(default_factory=LPLConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate before --scale_lr."""
        if self.optim.learning_rate is not None:
            return self.optim.learning_rate
        if self.optim.optimizer_name == "prodigy":
            return 1.0
        return 1e-5 if self.model.rank is None else 1e-4

    @property
    def component_rates(self) -> dict[str, float]:
        """Peak learning rates, before --scale_lr, of what is trained beside the denoiser."""
        if not self.model.train_text_encoder:
            return {}
        first = self.optim.text_encoder_lr
        first = self.learning_rate if first is None else first
        second = self.optim.text_encoder_2_lr
        return {"text_encoder": first, "text_encoder_2": first if second is None else second}

    @property
    def lpl_checkpointing(self) -> bool:
        """Whether LPL recomputes the decoder in its backward pass."""
        choice = self.lpl.lpl_checkpointing
        return self.run.gradient_checkpointing if choice == "auto" else choice == "true"

    def num_steps(self, samples: int, processes: int) -> int:
        """Optimizer steps of the run: --max_train_steps, or what --num_train_epochs of so many samples take."""
        run = self.run
        per_step = run.train_batch_size * run.gradient_accumulation_steps * processes
        return run.max_train_steps or -(-run.num_train_epochs * samples // per_step)

    def flat(self) -> dict[str, Any]:
        """Every option by its flag's name."""
        return {f.name: getattr(group, f.name) for group in self.groups() for f in fields(group)}

    def groups(self) -> list[Any]:
        """The groups of options, in order."""
        return [getattr(self, f.name) for f in fields(self)]


def free_options() -> set[str]:
    """Names of the options that do not change a run's trajectory."""
    return {f.name for group in TrainConfig().groups() for f in fields(group) if f.metadata.get("free")}
