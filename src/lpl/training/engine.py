"""What a run is built from: accelerate's engine, its batches, an adapter on the denoiser, and LPL."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from peft import LoraConfig

from lpl.base.errors import UserError, require
from lpl.config import LPLConfig, ModelConfig, TrainConfig
from lpl.config.length import length_of
from lpl.config.run import processes
from lpl.data.dataset import Batch, TrainingData, drawn_images
from lpl.data.sampler import BatchOrder, share
from lpl.diffusion.draws import even_draws, keyed_seed, strata
from lpl.diffusion.latent_space import LatentSpace
from lpl.families import lora_layers
from lpl.families.lora_names import Layer
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.perceptual.objective import PerceptualObjective
from lpl.training.checks import check_processes
from lpl.training.optimizers import check_class, check_steps
from lpl.training.sharded import set_precision
from lpl.training.step import run_schedule

logger = logging.getLogger("lpl")


def add_lora(denoiser: Any, options: ModelConfig, targets: Mapping[str, tuple[str, ...]], seed: int) -> None:
    """Freezes the denoiser and adds a trainable float32 adapter to the layers of --lora_targets, or of --lora_weights.

    LoRA (Hu et al., 2021, eq. 3): W + (alpha / rank) B A, with B = 0 at the start, so that nothing changes, and A
    normal with standard deviation 1 / rank (peft's "gaussian"; the paper says only: normal). A is drawn from the seed,
    on the CPU, whatever the device. With --use_dora (Liu et al., 2024, eq. 5): m V / |V|, V = W + (alpha / rank) B A,
    |V| being the norm of each output's weights, without gradient; m is trained too and starts as |W|.

    The layers of --lora_weights start as the file has them, each of its own rank. Where alpha differs from layer to
    layer, B is multiplied by it instead: W + (alpha / rank) B A stays.

    Args:
        targets: names of layers by --lora_targets, matched at the end of a module's name.

    Raises:
        UserError: --lora_weights that does not fit the model.
    """
    assert options.rank is not None
    denoiser.requires_grad_(False)
    start = lora_layers(options, denoiser)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.lora_dropout,
        use_dora=options.use_dora,
        init_lora_weights="gaussian",
        target_modules=list(start or targets[options.lora_targets]),
        rank_pattern={name: layer.rank for name, layer in start.items() if layer.rank != options.rank},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "lora"))
        denoiser.add_adapter(config)
    if start:
        _start_from(denoiser, start, options)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@torch.no_grad()
def _start_from(denoiser: Any, start: Mapping[str, Layer], options: ModelConfig) -> None:
    """Puts layers of a file into the adapter."""
    adapted = {name: module for name, module in denoiser.named_modules() if hasattr(module, "lora_A")}
    if adapted.keys() != start.keys():
        (odd,) = sorted(adapted.keys() ^ start.keys())[:1]
        raise UserError(f"--lora_weights {options.lora_weights}: a LoRA cannot be put on {odd} alone: merge the file")
    for name, module in adapted.items():
        layer = start[name]
        module.lora_A["default"].weight.copy_(layer.down)
        module.lora_B["default"].weight.copy_(layer.up.float() * (layer.alpha / options.alpha))
        if layer.magnitude is not None:
            own = module.lora_magnitude_vector["default"].weight
            own.copy_(layer.magnitude.reshape(own.shape))


T = TypeVar("T")


class Batches:
    """The micro-batches of a run."""

    def __init__(self, config: TrainConfig, data: TrainingData, accelerator: Accelerator) -> None:
        run, processes = config.run, accelerator.num_processes
        self._config, self._data, self._accelerator = config, data, accelerator
        self.samples_per_step = config.samples_per_step(processes)
        self._order = BatchOrder(run.seed, data.buckets, data.repeats, self.samples_per_step)
        self.steps_per_epoch = self._order.epoch_size / self.samples_per_step
        images, repeats = drawn_images(data.samples, data.repeats)
        self.length = length_of(config, processes, images, self._order.epoch_size, repeats)

    def batch(self, step: int, micro_batch: int) -> Batch:
        """The samples of a micro-batch of an optimizer step, in this process."""
        batch = self._data.batch(list(self._share(self._order.batch(step), micro_batch)))
        if self._config.lpl.use_lpl and self._config.lpl.lpl_budget is not None:
            draws = even_draws(self.samples_per_step, self._config.run.seed, "lpl_budget", step)
            batch = replace(batch, lpl_draws=self._share(draws, micro_batch))
        if self._config.diffusion.timestep_sampling == "independent":
            return batch
        numbers = strata(self.samples_per_step, self._config.run.seed, step)
        return replace(batch, strata=(self._share(numbers, micro_batch), self.samples_per_step))

    def _share(self, batch: Sequence[T], micro_batch: int) -> Sequence[T]:
        run, accelerator = self._config.run, self._accelerator
        return share(
            batch,
            micro_batch,
            accelerator.process_index,
            run.train_batch_size,
            run.gradient_accumulation_steps,
            accelerator.num_processes,
        )


def build_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's engine for this run, and the process's logging.

    Raises:
        UserError: a precision or an optimizer that the device cannot run; nothing is loaded before.
    """
    run, log = config.run, config.logging
    accelerator = Accelerator(
        # Filling the cache may keep processes waiting for each other far longer than torch's ten minutes.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        mixed_precision=run.mixed_precision,
        log_with=None if log.report_to == "none" else log.report_to,
        project_dir=str(Path(run.output_dir) / log.logging_dir),
    )
    kind = accelerator.device.type
    require(
        accelerator.num_processes == processes(),
        f"WORLD_SIZE is {processes()}, but on a {kind} accelerate joins {accelerator.num_processes}, and each would "
        "train alone into the same folder: on CPUs set ACCELERATE_USE_CPU=true, too",
    )
    if accelerator.mixed_precision == "fp16" and kind == "cpu":
        raise UserError("--mixed_precision fp16 needs an accelerator; on a CPU use bf16 or no")
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        lacks = "this GPU does not compute in bfloat16 (those of compute capability 8.0 and later do): use"
        if accelerator.mixed_precision == "bf16":
            raise UserError(f"--mixed_precision bf16: {lacks} fp16")
        if config.lpl.use_lpl and config.lpl.lpl_dtype == "bfloat16":
            raise UserError(f"--lpl_dtype bfloat16: {lacks} float32 or float16")
    if config.optim.optimizer_name == "adamw8bit" and kind == "cpu":
        flag = "--use_8bit_adam" if config.optim.use_8bit_adam else "--optimizer adamw8bit"
        raise UserError(f"{flag} needs a GPU; drop it on a CPU")
    set_precision(accelerator)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError("accelerate's configuration asks for DeepSpeed: use FSDP2 instead (lpl presets fsdp2)")
    check_processes(config.optim, accelerator.num_processes)
    check_class(config.optim)
    check_steps(config.optim, accelerator.device)
    compiled = {"lpl_compile": config.lpl.use_lpl and config.lpl.lpl_compile, "compile_denoiser": run.compile_denoiser}
    for flag in (name for name, asked in compiled.items() if asked and not _can_compile(kind)):
        missing = "a C++ compiler" if kind == "cpu" else "Triton"
        raise UserError(f"--{flag} needs {missing}, which was not found: install it or drop the option")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.allow_tf32
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(level)
    return accelerator


def _can_compile(kind: str) -> bool:
    """Whether torch.compile has what it needs on this kind of device."""
    if kind != "cpu":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))


def _given(options: LPLConfig, cls: type, prefix: str = "") -> dict[str, Any]:
    """Keywords for a class of the library: the options whose names without the prefix are its parameters."""
    taken = inspect.signature(cls).parameters
    named = {name.removeprefix(prefix): value for name, value in vars(options).items()}
    return {name: value for name, value in named.items() if name in taken}


def build_loss(config: TrainConfig, vae: Any, latent_space: LatentSpace) -> LatentPerceptualLoss:
    """The loss as the config describes it, on a VAE, which may be on the meta device."""
    options = config.lpl
    given = _given(options, LatentPerceptualLoss, "lpl_") | {
        "checkpointing": config.lpl_checkpointing,
        "dtype": getattr(torch, options.lpl_dtype),
        "chunk": None if options.lpl_chunk == "auto" else options.lpl_chunk,
        "channels_last": None if options.lpl_channels_last == "auto" else options.lpl_channels_last == "true",
    }
    return LatentPerceptualLoss(vae, latent_space=latent_space, **given)


def build_objective(config: TrainConfig, family: Any) -> PerceptualObjective:
    """LPL as the config describes it, on the family's VAE.

    Raises:
        UserError: a gate that the schedule or the timestep bias never passes.
    """
    loss_fn, cells = (
        build_loss(config, family.vae, family.latent_space),
        (config.data.crop_size // family.latent_stride) ** 2,
    )
    try:
        return PerceptualObjective(
            loss_fn,
            run_schedule(family.schedule, config.diffusion, cells),
            **_given(config.lpl, PerceptualObjective),
            snr_gamma=config.diffusion.snr_gamma,
            seed=config.run.seed,
            checked_calls=0,  # the trainer's own inputs are valid; it looks for gradients of 0 when it logs
        )
    except ValueError as error:
        raise UserError(str(error)) from error
