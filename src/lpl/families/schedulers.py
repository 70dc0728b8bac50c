"""Schedulers of diffusers that follow a model's files and the options, and the schedule to train with."""

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
    from torch import Tensor

    from lpl.diffusion.schedule import Schedule

logger = logging.getLogger("lpl")

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
WORDS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""From values of modelspec.prediction_type to diffusers' names."""
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""From diffusers' prediction types to modelspec's names."""
FLOW = "flow_prediction"
"""diffusers' name of what a model of flow matching predicts, noise - latents."""
UNET_TIMESTEPS = 1000
"""The time that a UNet of flow matching is given at sigma 1."""
PREDICTION, RESCALED = "lpl.prediction_type", "lpl.rescale_betas_zero_snr"
"""Metadata keys of a LoRA file: the run's options of these names, if they were given; the first says FLOW, too."""

NOISE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "timestep_spacing", "steps_offset", "use_flow_sigmas",
)  # fmt: skip
"""Keys whose values must be the same in every scheduler of a model; other keys concern only their own class."""


def file_schedule(path: Path, config: ModelConfig | None = None) -> dict[str, Any]:
    """What a single file states of its schedule, as keys of a scheduler's config; unstated keys are absent.

    The empty tensors v_pred and ztsnr, which ComfyUI reads (supported_models.SDXL), override the text
    modelspec.prediction_type.

    Args:
        config: its --prediction_type, if any, overrides what the file says; a difference is logged once. None: only the
            file counts.

    Raises:
        UserError: modelspec states an unknown prediction type, and the options give none.
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
    """Warns once, though a file is read both before and while loading."""
    logger.warning("%s", message)


def lora_options(file: Path) -> dict[str, Any]:
    """The schedule options of the run that made a LoRA file, from its metadata; none for other files.

    Raises:
        UserError: metadata that no run has written.
    """
    metadata = (read_header(file) or {}).get(METADATA, {})
    found: dict[str, Any] = {}
    if metadata.get(PREDICTION, FLOW) != FLOW:
        found["prediction_type"] = metadata[PREDICTION]
        if found["prediction_type"] not in ("epsilon", "v_prediction", "sample"):
            raise UserError(f"--lora {file}: its metadata say {PREDICTION} {metadata[PREDICTION]}, which is unknown")
    if metadata.get(RESCALED) == "True":
        found["rescale_betas_zero_snr"] = True
    return found


def compare_lora(file: Path, scheduler: Mapping[str, Any]) -> None:
    """Warns where a LoRA's prediction type differs from that of the model that it is merged into."""
    metadata = (read_header(file) or {}).get(METADATA, {})
    is_flow = metadata.get(PREDICTION) == FLOW
    word = FLOW if is_flow else WORDS.get(metadata.get("modelspec.prediction_type"))
    kind = scheduler.get("prediction_type", "epsilon")
    if word not in (None, kind):
        warn(f"{file}: was trained on {word}; the model it is merged into predicts {kind}, and so will the result")


def prediction_of(scheduler: Any) -> str:
    """modelspec's name of the prediction type of a model with this schedule.

    Raises:
        UserError: a prediction type that programs for single files do not know.
    """
    kind = str(scheduler.get("prediction_type", "epsilon"))
    if kind not in PREDICTIONS:
        raise UserError(f"the model predicts {kind}, which a single file cannot say: use --to diffusers")
    return PREDICTIONS[kind]


def chosen_schedule(scheduler: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A scheduler's config, changed by what a single file states, --prediction_type and --rescale_betas_zero_snr.

    The options override the file, and the file overrides the scheduler's config (that of --single_file_config). One of
    flow matching stays as it is, see check_flow.

    Zero terminal SNR: sqrt(alphas_cumprod) is shifted and scaled so that its last value is 0 and its first stays; then
    samplers must start at the last timestep (timestep_spacing trailing).

    Source: Lin et al., WACV 2024, "Common Diffusion Noise Schedules and Sample Steps Are Flawed" (arXiv 2305.08891),
    algorithm 1, as diffusers' schedulers do it.

    Raises:
        UserError: zero terminal SNR with epsilon prediction, which says nothing of x0 in pure noise, or with a class of
            scheduler that cannot do it; what check_flow refuses.
    """
    path = Path(str(config.pretrained_model_name_or_path))
    said = file_schedule(path, config) if path.suffix == ".safetensors" else {}
    if is_flow(scheduler):
        check_flow(scheduler, config, said)
        return dict(scheduler)
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


def check_flow(scheduler: Mapping[str, Any], config: ModelConfig, said: Mapping[str, Any]) -> None:
    """Refuses a scheduler of flow matching with which the pipeline of a UNet cannot sample.

    These pipelines call init_noise_sigma and scale_model_input, which FlowMatchEulerDiscreteScheduler lacks, give the
    UNet the scheduler's timesteps, which must be 1000 sigma, and know no dynamic shift.

    Args:
        said: what the model's single file states.

    Raises:
        UserError: such a scheduler, options of a discrete schedule, or a file that states one.
    """
    import diffusers

    where = f"{FLAG} {config.pretrained_model_name_or_path}"
    given = {"prediction_type": config.prediction_type, "rescale_betas_zero_snr": config.rescale_betas_zero_snr}
    odd = [f"--{name} {value}" for name, value in given.items() if value]
    if odd:
        drop = f"drop {'it' if len(odd) == 1 else 'them'}"
        raise UserError(f"{', '.join(odd)}: the model is trained by flow matching: {drop}")
    if said:
        found = ", ".join(f"{name} {value}" for name, value in said.items())
        raise UserError(f"{where}: says {found}, --single_file_config that it is of flow matching: give one that fits")
    name = str(scheduler.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if not _samples_flow(cls, scheduler):
        raise UserError(
            f"{where}: its scheduler, {name}, does not sample a UNet of flow matching in diffusers; put a "
            "DPMSolverMultistepScheduler's scheduler_config.json with use_flow_sigmas true, flow_shift and "
            "prediction_type flow_prediction in the model's folder"
        )


def _samples_flow(cls: Any, scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler of this class and config goes through sigmas of flow matching, with 1000 sigma as time."""
    known = inspect.signature(cls.__init__).parameters if hasattr(cls, "scale_model_input") else ()
    if "use_flow_sigmas" not in known or scheduler.get("prediction_type") != FLOW:
        return False
    built = build_scheduler(cls, scheduler)
    if built.config.get("use_dynamic_shifting"):
        return False
    try:
        built.set_timesteps(4)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"the model's scheduler config makes no {cls.__name__}: {on_one_line(error, 200)}") from error
    pairs = zip(built.timesteps.tolist(), built.sigmas.tolist(), strict=False)  # and a last sigma of 0
    return all(0 < sigma <= 1 and abs(t - UNET_TIMESTEPS * sigma) <= 1 for t, sigma in pairs)


def unet_time(levels: Tensor) -> Tensor:
    """What a UNet is given as its time for noise levels (B,): timesteps as they are, 1000 sigma of flow matching."""
    return UNET_TIMESTEPS * levels if levels.is_floating_point() else levels


def build_scheduler(cls: Any, config: Mapping[str, Any], **changes: Any) -> Any:
    """A scheduler of a class, made from a scheduler's config and changes, none of which is lost.

    diffusers' `from_config` drops every key listed in `_use_default_values`, that is every key that the config's file
    lacks, even if it has been set since. Keys that the file lacks and that are not changed get the new class's default.

    Args:
        config: the config of a scheduler of this class or another, or the content of its file.

    Raises:
        UserError: the class cannot be built from the config, or does not follow it in changes or in NOISE.
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
    """Gives a pipeline the schedule that its model and the options state."""
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
    # The shift by tokens of 2 x 2 cells: a line through (base_image_seq_len, base_shift), (max_image_seq_len,
    # max_shift).
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    slope = (most - base) / (high - low)
    dynamic = scheduler.get("use_dynamic_shifting")
    own = "flow_shift" if scheduler.get("use_flow_sigmas") else "shift"
    shift: float | Literal["resolution"] = "resolution" if dynamic else float(scheduler.get(own, 1.0))
    count, line = int(scheduler.get("num_train_timesteps", 1000)), (slope / 4, base - slope * low)
    return Flow(num_timesteps=count, distribution=UNIFORM._replace(shift=shift), dynamic_shift=line)
