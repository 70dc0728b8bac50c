"""Options: validation, logs and publishing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lpl.config.checks import check_declared, free, option, require


@dataclass(frozen=True)
class LoggingConfig:
    """Validation images, logs and publishing."""

    validation_prompt: str | None = free(None)
    """Prompt of the validation images; unset: none are made."""
    num_validation_images: int = option(4, most=10_000, free=True)
    """Validation images of each prompt, each time."""
    validation_epochs: int = free(1)
    """Epochs between validations."""
    validation_steps: int | None = free(None)
    """Optimizer steps between validations, instead of epochs."""
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all", "none"] = free("tensorboard")
    """Where metrics go."""
    logging_dir: str = option("logs", path=True, free=True)
    """TensorBoard folder, a name within --output_dir."""
    log_every: int = free(10)
    """Optimizer steps between logged metrics; the device is not synchronised in between."""
    push_to_hub: bool = free(False)
    """Upload the result with a model card when training ends."""
    hub_model_id: str | None = free(None)
    """Repository to push to; unset: the name of --output_dir."""
    hub_token: str | None = free(None)
    """Token for the push; never written to config.yaml. `hf auth login` is safer."""
    validation_prompts: str | None = option(None, path=True, free=True)
    """Instead of --validation_prompt a file: .txt with a prompt a line, or .jsonl with prompt and, if you like,
    negative_prompt and seed."""

    def __post_init__(self) -> None:
        check_declared(self)
        parts = Path(self.logging_dir).parts
        require(
            bool(parts) and not Path(self.logging_dir).is_absolute() and ".." not in parts,
            f"--logging_dir {self.logging_dir}: is not a folder within --output_dir: give a name such as logs",
        )
        for name in ("num_validation_images", "validation_epochs", "log_every"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1, not {getattr(self, name)}")
        require(
            self.validation_prompt is None or self.validation_prompts is None,
            f"--validation_prompt and --validation_prompts {self.validation_prompts} are both given: put the prompt "
            "into the file",
        )
        require(self.validation_steps is None or self.validation_steps >= 1, "--validation_steps must be at least 1")

    @property
    def draws_images(self) -> bool:
        """Whether validation images are made."""
        return self.validation_prompt is not None or self.validation_prompts is not None
