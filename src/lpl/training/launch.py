"""What `accelerate launch` or torchrun has set for the processes of a run; no torch here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from lpl.base.errors import require
from lpl.config import TrainConfig

UNSHARDED = ("adafactor", "adamw8bit", "prodigy")
"""Optimizers whose state does not have the shape of a parameter, or whose step is not elementwise."""


def splits() -> bool:
    """Whether accelerate is to split the model over the processes by FSDP."""
    return _is_set("ACCELERATE_USE_FSDP")


def check_launch(config: TrainConfig) -> None:
    """Checks what the launcher has set, and the options against it."""
    if not splits():
        return
    version = os.environ.get("FSDP_VERSION", "1")
    for wrong, name, instead in (
        (version != "2", f"fsdp_version {version}", "set fsdp_version: 2"),
        (_is_set("FSDP_ACTIVATION_CHECKPOINTING"), "fsdp_activation_checkpointing", "use --gradient_checkpointing"),
        (_is_set("FSDP_OFFLOAD_PARAMS"), "fsdp_offload_params", "turn it off; a LoRA or more GPUs save memory"),
    ):
        require(not wrong, f"accelerate's configuration has {name}, which lpl train does not take: {instead}")
    optimizer = config.optim.optimizer_name
    require(optimizer not in UNSHARDED, f"--optimizer {optimizer} cannot be split by FSDP2: use adamw, or DDP")
    flag = "--validation_prompt" if config.logging.validation_prompt is not None else "--validation_prompts"
    require(
        not (config.model.train_text_encoder and config.logging.draws_images),
        f"{flag}: FSDP2 draws no validation images where --train_text_encoder changes what prompts mean; drop one, or "
        "use DDP",
    )
    require(not config.run.compile_denoiser, "--compile_denoiser does not go with FSDP2: drop it, or use DDP")
    offloaded = config.model.offload_blocks
    require(offloaded is None, f"--offload_blocks {offloaded}: FSDP2 splits the blocks over GPUs: drop it, or use DDP")
    quantized = config.model.quantize_base
    require(quantized is None, f"--quantize_base {quantized}: FSDP2 splits no quantized weights: drop it, or use DDP")


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def as_launched(number: int | None, fsdp2: bool) -> AbstractContextManager[None]:
    """Sets the environment that one of `number` processes would see; None: their number as it is."""
    values = {} if number is None else {"WORLD_SIZE": str(number)}
    return environment(values | ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if fsdp2 else {}))


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables of the environment for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
