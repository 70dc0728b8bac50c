"""Schedulers of diffusers that follow what a model's files and the options say, and the schedule to train with."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lpl.base.errors import UserError, on_one_line
from lpl.base.tensor_file import METADATA
from lpl.config import ModelConfig
from lpl.families.files import FLAG, read_header

if TYPE_CHECKING:
    from lpl.diffusion.schedule import Schedule

logger = logging.getLogger("lpl")

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
WORDS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""What modelspec.prediction_type says, and diffusers' word for it."""
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""modelspec's words for what a model predicts."""
PREDICTION, RESCALED = "lpl.prediction_type", "lpl.rescale_betas_zero_snr"
"""Metadata of a LoRA file: the options of these names that the run was given, whatever its model said."""

NOISE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "timestep_spacing", "steps_offset",
)  # fmt: skip
"""What must be the same in every scheduler of a model; what else a config says is its own class's business."""


def file_schedule(path: Path, config: ModelConfig | None = None) -> dict[str, Any]:
    """What a single file says of its schedule, as keys of a scheduler's config; of what it does not say, nothing.

    The empty tensors v_pred and ztsnr, by which ComfyUI goes (supported_models.SDXL), count more than the text
    modelspec.prediction_type.

    Args:
        config: whose --prediction_type, if any, goes before what the file says; a difference is said once. None: the
            file alone is asked.

    Raises:
        UserError: a prediction type by modelspec that is not known, where the options name none.
    """
    header = read_header(path) or {}
    word = header.get(METADATA, {}).get("modelspec.prediction_type")
    asked = None if config is None else config.prediction_type
    found: dict[str, Any] = {}
    if "v_pred" in header:
        found["prediction_type"] = "v_prediction"
        if WORDS.get(word, "v_prediction") != "v_prediction" and asked is None:
            warn(f"{path}: its key v_pred says v_prediction, its modelspec.prediction_type {word}: the key counts")
    elif word in WORDS:
        found["prediction_type"] = WORDS[word]
    elif word is not None and asked is None:
        raise UserError(f"{FLAG} {path}: its modelspec.prediction_type is {word}: say what it is by --prediction_type")
    if asked not in (None, found.get("prediction_type", asked)):
        warn(f"--prediction_type {asked}: {path} says {found['prediction_type']}; the option counts")
    return found | (ZERO_SNR if "ztsnr" in header else {})


@functools.cache
def warn(message: str) -> None:
    """Once, though a file is looked at before and at loading."""
    logger.warning("%s", message)


def lora_options(file: Path) -> dict[str, Any]:
    """The options that decide a schedule as the run was given them that made a LoRA file; of other files nothing.

    Raises:
        UserError: metadata that no run has written.
    """
    metadata = (read_header(file) or {}).get(METADATA, {})
    found: dict[str, Any] = {}
    if PREDICTION in metadata:
        found["prediction_type"] = metadata[PREDICTION]
        if found["prediction_type"] not in ("epsilon", "v_prediction", "sample"):
            raise UserError(f"--lora {file}: its metadata say {PREDICTION} {metadata[PREDICTION]}, which is unknown")
    if metadata.get(RESCALED) == "True":
        found["rescale_betas_zero_snr"] = True
    return found


def compare_lora(file: Path, scheduler: Mapping[str, Any]) -> None:
    """Says so where a LoRA was trained to predict another thing than the model that it is merged into."""
    word = WORDS.get((read_header(file) or {}).get(METADATA, {}).get("modelspec.prediction_type"))
    kind = scheduler.get("prediction_type", "epsilon")
    if word not in (None, kind):
        warn(f"{file}: was trained on {word}; the model it is merged into predicts {kind}, and so will the result")


def prediction_of(scheduler: Any) -> str:
    """modelspec's word for what a model with this schedule predicts.

    Raises:
        UserError: something that programs for single files do not know.
    """
    kind = str(scheduler.get("prediction_type", "epsilon"))
    if kind not in PREDICTIONS:
        raise UserError(f"the model predicts {kind}, which a single file cannot say: use --to diffusers")
    return PREDICTIONS[kind]


def chosen_schedule(scheduler: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A scheduler's config under what a single file says of itself, --prediction_type and --rescale_betas_zero_snr.

    The options go before the file, the file before the scheduler's config, which is that of --single_file_config.

    Zero terminal SNR: sqrt(alphas_cumprod) is shifted and scaled so that its last value is 0 and its first stays; then
    samplers must start at the last timestep (timestep_spacing trailing).

    Source: Lin et al., WACV 2024, "Common Diffusion Noise Schedules and Sample Steps Are Flawed" (arXiv 2305.08891),
    algorithm 1, as diffusers' schedulers do it.

    Raises:
        UserError: zero terminal SNR with epsilon prediction, which says nothing of x0 in pure noise, or with a class of
            scheduler that cannot do it.
    """
    path = Path(str(config.pretrained_model_name_or_path))
    said = file_schedule(path, config) if path.suffix == ".safetensors" else {}
    own = scheduler.get("prediction_type", "epsilon")
    kind = said.get("prediction_type", own)
    if config.single_file_config is not None and config.prediction_type is None and kind != own:
        warn(f"{path} says {kind}, the scheduler of --single_file_config {own}: the file counts")
    chosen = {**scheduler, **said}
    if config.prediction_type is not None:
        chosen["prediction_type"] = config.prediction_type
    rescales = config.rescale_betas_zero_snr
    if not rescales and "rescale_betas_zero_snr" not in said:
        return chosen
    who = "--rescale_betas_zero_snr" if rescales else f"{FLAG} {path}: ztsnr in it"
    if chosen.get("prediction_type", "epsilon") == "epsilon":
        raise UserError(
            f"{who}: the model predicts epsilon, which says nothing at a last timestep of pure "
            f"noise; use --prediction_type v_prediction{', or drop it' if rescales else ''}"
        )
    name = str(scheduler.get("_class_name", "EulerDiscreteScheduler"))
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None or "rescale_betas_zero_snr" not in inspect.signature(cls.__init__).parameters:
        raise UserError(
            f"{who}: the model's scheduler is {name}, which does not know it; put an "
            "EulerDiscreteScheduler's scheduler_config.json in the model's folder, or drop it"
        )
    return chosen | ZERO_SNR


def build_scheduler(cls: Any, config: Mapping[str, Any], **changes: Any) -> Any:
    """A scheduler of a class, made of a scheduler's config and changes, of which nothing is lost.

    diffusers' `from_config` drops every key that its config names in `_use_default_values`, as those are that the
    config's file lacks, whatever they have been set to since. What the file lacks and is not changed is the business of
    the new class.

    Args:
        config: of a scheduler of this class or another, or what its file says.

    Raises:
        UserError: a config that the class cannot be made of, or that it does not follow in what it is compared by.
    """
    missing = set(config.get("_use_default_values", ())) - changes.keys()
    asked = {k: v for k, v in config.items() if k not in missing and k != "_use_default_values"} | changes
    try:
        built = cls.from_config(asked)
    except (TypeError, ValueError, ArithmeticError, RuntimeError, ImportError) as error:
        raise UserError(f"the model's scheduler config makes no {cls.__name__}: {on_one_line(error, 200)}") from error
    known = inspect.signature(cls.__init__).parameters
    for key in dict.fromkeys((*changes, *NOISE)):
        if key in asked and not (asked[key] == built.config.get(key) if key in known else asked[key] in (None, False)):
            found = repr(built.config.get(key)) if key in known else "not known to it"
            raise UserError(
                f"the model's scheduler: {key} is to be {asked[key]!r}, but in a {cls.__name__} it is {found}; put an "
                "EulerDiscreteScheduler's scheduler_config.json in the model's folder"
            )
    return built


def set_schedule(pipeline: Any, config: ModelConfig) -> None:
    """Gives a pipeline the schedule that its model and the options say."""
    cls = type(pipeline.scheduler)
    own = {**pipeline.scheduler.config, "_class_name": cls.__name__}
    chosen = chosen_schedule(own, config)
    changes = {key: value for key, value in chosen.items() if own.get(key) != value}
    if changes:
        pipeline.scheduler = build_scheduler(cls, own, **changes)


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is of flow matching."""
    return "FlowMatch" in str(scheduler.get("_class_name")) or bool(scheduler.get("use_flow_sigmas"))


def training_schedule(scheduler: Mapping[str, Any]) -> Schedule:
    """The training schedule of a pipeline whose scheduler has this config."""
    from diffusers import DDPMScheduler

    from lpl.diffusion.schedule import UNIFORM, Flow, schedule_of

    if not is_flow(scheduler):
        return schedule_of(build_scheduler(DDPMScheduler, scheduler))
    # By tokens of 2 x 2 cells, in a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    slope = (most - base) / (high - low)
    dynamic = scheduler.get("use_dynamic_shifting")
    shift: float | Literal["resolution"] = (
        "resolution" if dynamic else float(scheduler.get("shift", scheduler.get("flow_shift", 1.0)))
    )
    count, line = int(scheduler.get("num_train_timesteps", 1000)), (slope / 4, base - slope * low)
    return Flow(num_timesteps=count, distribution=UNIFORM._replace(shift=shift), dynamic_shift=line)
