"""Checks of a run's options, model, data and folder against each other, before anything loads."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lpl.base.errors import Faults, UserError, all_faults
from lpl.base.files import alone_in
from lpl.base.text import Prompt, read_prompts
from lpl.config import LoggingConfig, ModelConfig, TrainConfig, check_model_options, idle_options
from lpl.config.loss import GATES
from lpl.config.run import processes
from lpl.data.buckets import image_sizes
from lpl.data.decode import parse_color
from lpl.data.lock import cache_dir, in_use
from lpl.data.sources import Source, open_regularisation, open_source, open_validation
from lpl.families import kind_of, model_configs, plan_configs, with_lora_weights
from lpl.training.checks import check_memory_options, warn_of_objective, warn_of_steps
from lpl.training.launch import check_launch
from lpl.training.output import as_begun, check_inputs_apart, check_output, check_writable

logger = logging.getLogger("lpl")


def validation_prompts(config: LoggingConfig) -> list[Prompt]:
    """The prompts of validation images in order; none if no images are asked for.

    Raises:
        UserError: a file that is not one of prompts.
    """
    if config.validation_prompts is None:
        return [] if config.validation_prompt is None else [Prompt(config.validation_prompt)]
    return read_prompts(Path(config.validation_prompts), "--validation_prompts")


TRACKERS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "comet_ml": ("comet_ml",), "none": (), "all": ()}


class Checked(NamedTuple):
    """What the checks found."""

    config: TrainConfig
    """The options, with what the model decides filled in."""
    source: Source
    regularisation: Source | None
    model_configs: dict[str, Any]
    """Configs of the model's components; empty for a single file."""
    finished_step: int | None
    """The step at which this very run has already ended."""
    num_steps: int | None
    """Optimizer steps of the run; None: not known before the data are read."""
    validation: Source | None = None

    @property
    def has_ended(self) -> bool:
        """Whether this very run is known to have ended already."""
        steps = self.num_steps
        return self.finished_step is not None and steps is not None and self.finished_step >= steps


def preflight(config: TrainConfig) -> Checked:
    """Checks model, data, output folder and options against each other.

    Raises:
        UserError: every fault that was found, a line each.
    """
    faults = Faults()
    with faults.one():
        _check_packages(config)
    with faults.one():
        config = replace(config, model=with_lora_weights(config.model))
    with faults.one(), all_faults():
        check_memory_options(config)
    with faults.one():
        check_launch(config)
    with faults.one():
        config, configs = check_model(config)
    with faults.one():
        source, regularisation, validation = _open_sources(config)
    with faults.one():
        validation_prompts(config.logging)
    faults.raise_any()
    with faults.one():
        config = as_begun(config)
        finished_step = check_output(config)
    with faults.one():
        if configs:
            check_options(config, configs)
    faults.raise_any()
    _warn_idle(config)
    even = source.size is not None and config.data.repeats is regularisation is validation is None
    known = even or not config.length_needs_data
    num_steps = config.num_steps((source.size or 1) - config.data.validation_samples, processes()) if known else None
    if num_steps is not None:
        warn_of_steps(config, num_steps)
    checked = Checked(config, source, regularisation, configs, finished_step, num_steps, validation)
    if not checked.has_ended:
        check_writable(config)
    return checked


def _check_packages(config: TrainConfig) -> None:
    for package in TRACKERS[config.logging.report_to]:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--report_to {config.logging.report_to}: {package} is not installed: pip install {package}"
            )
    if config.optim.optimizer_name not in ("adamw", "adamw8bit") or config.optim.optimizer_args:
        from lpl.training.optimizers import check_class

        check_class(config.optim)


def _open_sources(config: TrainConfig) -> tuple[Source, Source | None, Source | None]:
    """Training images, those of --reg_data_dir and those of --validation_data_dir."""
    source = open_source(config.data, config.model.cache_dir)
    held = config.data.validation_samples
    if held and source.size is not None and held >= source.size:
        raise UserError(
            f"--validation_samples {held}: {source.name} has {source.size} images, which leaves none to train on: hold "
            "out fewer"
        )
    return source, open_regularisation(config.data), open_validation(config.data)


@contextmanager
def alone(checked: Checked) -> Iterator[None]:
    """Holds the run's folder and its cache for as long as it trains.

    Raises:
        UserError: another run is at work there, or was since the checks.
    """
    config = checked.config
    with alone_in(Path(config.run.output_dir)), in_use(cache_dir(config.data)):
        if check_output(config, tell=False) != checked.finished_step:
            raise UserError(f"--output_dir {config.run.output_dir}: a run has ended in it meanwhile: start again")
        check_writable(config)
        yield


def check_model(
    config: TrainConfig, configs_of: Callable[[ModelConfig], dict[str, Any]] = model_configs
) -> tuple[TrainConfig, dict[str, Any]]:
    """The options with the model's own resolution in the place of an unset one, and the model's configs.

    Args:
        configs_of: finds the configs; model_configs asks for the weights to be there, plan_configs does not.

    Raises:
        UserError: no such model, or a --background_color that is no colour.
    """
    parse_color(config.data.background_color)
    config = replace(config, model=with_lora_weights(config.model))
    kind = kind_of(config.model)
    configs = configs_of(config.model)
    check_model_options(config, kind.name, kind.is_flow(configs), kind.options)
    if config.data.resolution is None:
        config = replace(config, data=replace(config.data, resolution=kind.native_resolution(configs)))
    return config, configs


def check_data(config: TrainConfig, report: Path, weights: bool = False) -> Checked:
    """The checks that a report needs; `lpl data` needs no model, or one without weights.

    Args:
        weights: ask for a model with its weights.

    Raises:
        UserError: a model or data that cannot be read, or the first fault of what does not go together.
    """
    faults = Faults()
    with faults.one():
        config, configs = check_model(config, model_configs if weights else plan_configs)
    with faults.one():
        source, regularisation = open_source(config.data, config.model.cache_dir), open_regularisation(config.data)
    faults.raise_any()
    if configs and config.model.pretrained_model_name_or_path is not None:
        check_options(config, configs)
    check_inputs_apart(config)
    if (report.exists() and not report.is_dir()) or (report.parent.exists() and not report.parent.is_dir()):
        raise UserError(f"--output_dir {config.run.output_dir}: a file is in the way of {report}")
    _warn_idle(config)
    if config.run.max_train_steps is not None:
        warn_of_steps(config, config.run.max_train_steps)
    return Checked(config, source, regularisation, configs, None, None)


def check_options(config: TrainConfig, configs: dict[str, Any]) -> None:
    """Checks the options against the model's schedule and its VAE."""
    timesteps = configs["scheduler"].get("num_train_timesteps", 1000)
    threshold = config.lpl.lpl_t_threshold
    if config.lpl.use_lpl and threshold is not None and threshold > timesteps:
        raise UserError(f"--lpl_t_threshold {threshold} lies outside the model's schedule of {timesteps} timesteps")
    bias = config.diffusion
    if bias.timestep_bias_strategy == "range" and bias.timestep_bias_end > timesteps:
        raise UserError(f"--timestep_bias_end {bias.timestep_bias_end} lies outside the model's {timesteps} timesteps")
    check_sizes(config, configs)
    side = min(min(size) for size in image_sizes(config.data).sizes)
    crop, stride = config.lpl.lpl_crop, kind_of(config.model).stride(configs)
    if config.lpl.use_lpl and crop is not None and (crop % stride or crop >= side):
        raise UserError(
            f"--lpl_crop {crop} must be a multiple of the VAE's {stride} pixels per latent and smaller than the "
            f"images' {side}"
        )
    _check_gate(config, configs)


def check_sizes(config: TrainConfig, configs: dict[str, Any]) -> None:
    """Checks the sizes of the training images against the VAE and the denoiser."""
    data, kind = config.data, kind_of(config.model)
    multiple = kind.pixel_multiple(configs)
    whose = f"the VAE's {multiple} pixels per latent" if kind.patch == 1 else f"the model's {multiple} pixels"
    if data.crop_size % multiple:
        raise UserError(f"--resolution {data.crop_size} is no multiple of {whose}")
    if data.buckets and data.bucket_step % multiple:
        raise UserError(f"--bucket_step {data.bucket_step} is no multiple of {whose}")
    longest, most = max(max(size) for size in image_sizes(data).sizes), kind.longest_side(configs)
    if most is not None and longest > most:
        aspect = " or --bucket_max_aspect" if data.buckets else ""
        raise UserError(
            f"--resolution {data.crop_size}: images have sides of up to {longest} pixels, more than the "
            f"{most} that the model knows: use a smaller --resolution{aspect}"
        )


def _check_gate(config: TrainConfig, configs: dict[str, Any]) -> None:
    """Refuses a gate that nothing passes; needs the schedule's numbers, so it alone loads torch."""
    options = config.lpl
    given = {name: getattr(options, name) for name in GATES}
    bias, drawn = config.diffusion.timestep_bias_strategy, config.diffusion.timestep_distribution
    usual = bias == "none" and drawn == "uniform"
    if not options.use_lpl or (given["lpl_snr_threshold"] is given["lpl_sigma_threshold"] is None and usual):
        return
    from lpl.families import schedule_of_configs
    from lpl.perceptual.gate import Gate
    from lpl.training.step import run_schedule

    cells = (config.data.crop_size // kind_of(config.model).stride(configs)) ** 2
    schedule = run_schedule(schedule_of_configs(configs), config.diffusion, cells)
    try:
        gate = Gate(schedule, options.lpl_t_threshold, options.lpl_snr_threshold, options.lpl_sigma_threshold)
        gate.probability(None)
    except ValueError as error:
        flags = [f"--{name} {value}" for name, value in given.items() if value is not None]
        flags += [f"--timestep_bias_strategy {bias}"] * (bias != "none")
        flags += [f"--timestep_distribution {drawn}"] * (drawn != "uniform")
        raise UserError(f"{', '.join(flags)}: {error}") from error


def _warn_idle(config: TrainConfig) -> None:
    """Says once, by name, which given options cannot act in this run."""
    default = TrainConfig()
    if not config.lpl.use_lpl:
        idle = [k for k, v in vars(config.lpl).items() if k != "use_lpl" and v != getattr(default.lpl, k)]
        if idle:
            logger.warning("without LPL these have no effect: --%s", ", --".join(idle))
    warn_of_objective(config)
    for option, needs in idle_options(config):
        logger.warning("--%s has no effect without %s", option, needs)
