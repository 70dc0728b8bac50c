"""Options: validation, logs and publishing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lpl.config.checks import Needs, check_declared, option, require

NOT_PUSHED = "runs of a comparison are not pushed"
PROMPTS = "--validation_prompt or --validation_prompts"
IMAGES = Needs(PROMPTS, lambda config: config.logging.draws_images)
VALIDATION = Needs(
    f"--validation_samples, --validation_data_dir, {PROMPTS}",
    lambda config: config.logging.draws_images or config.data.holds_out,
)


@dataclass(frozen=True)
class LoggingConfig:
    """Validation images, logs and publishing."""

    validation_prompt: str | None = option(None, free=True, may_be_empty=True)
    """Prompt of the validation images; unset: none are made."""
    num_validation_images: int = option(4, most=10_000, free=True, least=1, needs=IMAGES)
    """Validation images of each prompt, each time."""
    validation_epochs: int = option(1, free=True, least=1, needs=VALIDATION, elsewhere=("sample_every_n_epochs",))
    """Epochs between validations."""
    validation_steps: int | None = option(
        None, free=True, least=1, needs=VALIDATION, elsewhere=("sample_every_n_steps",)
    )
    """Optimizer steps between validations, instead of epochs."""
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all", "none"] = option("tensorboard", free=True)
    """Where metrics go."""
    logging_dir: str = option("logs", path=True, free=True)
    """TensorBoard folder, a name within --output_dir."""
    log_every: int = option(10, free=True, least=1, period="only the first and the last step are logged")
    """Optimizer steps between logged metrics; the device is not synchronised in between."""
    push_to_hub: bool = option(False, free=True, arms=NOT_PUSHED)
    """Upload the result with a model card when training ends."""
    hub_model_id: str | None = option(None, free=True, needs="push_to_hub", arms=NOT_PUSHED)
    """Repository to push to; unset: the name of --output_dir."""
    hub_token: str | None = option(None, free=True, recorded=False, needs="push_to_hub", arms=NOT_PUSHED)
    """Token for the push; never written to config.yaml. `hf auth login` is safer."""
    validation_prompts: str | None = option(None, path=True, free=True, elsewhere=("sample_prompts",))
    """Instead of --validation_prompt a file: .txt with a prompt a line, or .jsonl with prompt and, if you like,
    negative_prompt and seed."""

    def __post_init__(self) -> None:
        check_declared(self)
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
