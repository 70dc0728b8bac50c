"""What one process of a launch finds out ends all of them alike, instead of leaving the others to wait for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from lpl.base.errors import StopRequestedError, UserError, require
from lpl.base.files import alone_in, write_atomically
from lpl.base.terminal import progress
from lpl.config import ModelConfig
from lpl.config.model_commands import EvalConfig
from lpl.evaluation.generate import check_settings, generate_into, image_name, write_settings
from lpl.evaluation.images import CAPTIONS
from lpl.evaluation.measuring import (
    Judge,
    Measured,
    figures_key,
    keep_figures,
    measure_all,
    open_judges,
    read_figures,
    read_references,
)
from lpl.evaluation.planning import IMAGES, RESULT, Plan, check_eval, check_output, claim_output, with_flag
from lpl.evaluation.result import eval_result, format_table

T = TypeVar("T")


def together(act: Callable[[], T]) -> T:
    """Calls act, which waits for no other process; returns when all processes have called this.

    Raises:
        UserError: in every process, where act raised one in any: the first's.
    """
    found: list[T] = []
    fault: UserError | None = None
    try:
        found.append(act())
    except UserError as error:
        fault = error
    told: list[str | None] = gather_object([None if fault is None else str(fault)])
    first = next((line for line in told if line is not None), None)
    if first is not None:
        raise UserError(first) from fault
    return found[0]


def stop_together(is_late: Callable[[], bool], message: str) -> None:
    """Processes' clocks differ; every process must call this.

    Raises:
        StopRequestedError: in every process, where it is late in any.
    """
    if any(gather_object([is_late()])):
        raise StopRequestedError(message)


logger = logging.getLogger("lpl")


def run_eval(options: EvalConfig, is_late: Callable[[], bool] = lambda: False) -> None:
    """Evaluates, and prints the table. Every process of a launch ends alike.

    Args:
        options: of `lpl eval`.
        is_late: asked before anything is drawn: whether no time is left.

    Raises:
        UserError: bad input, in one line, before anything heavy loads where that can be known.
        StopRequestedError: no time is left.
    """
    with _processes() as accelerator, ExitStack() as stack:
        main, device = accelerator.is_main_process, accelerator.device
        plan = together(lambda: check_eval(options))
        # Samples of another command, or of other settings, may have come since the checks.
        together(lambda: stack.enter_context(alone_in(Path(options.output_dir))))
        together(lambda: check_output(plan))
        together(lambda: claim_output(options) if main else None)
        require(
            options.dtype != "float16" or device.type != "cpu",
            "--dtype float16 needs a GPU; on a CPU use bfloat16 or float32",
        )
        late = f"stopped by --max_minutes before {options.output_dir} was measured: the same command continues"
        stop_together(is_late, late)
        sampler = together(lambda: None if plan.request is None else _load(plan, device))
        with_vae = main and (options.floor or options.against == "reconstructions")
        vae = together(lambda: _vae(options, sampler, device) if with_vae else None)
        if options.images is None:
            # An image that cannot be read is found before hours of drawing; what is computed is kept.
            together(lambda: read_references(options, plan.resolution, plan.inception, vae, device) if main else None)
        points = plan.each()
        if options.images is None:
            for one in _each(points, "points drawn", main):
                stop_together(is_late, late)
                _draw(one, sampler, accelerator)
        judges: list[Judge] = []
        together(lambda: judges.extend(_judges(plan, vae, device)) if main else None)
        found: list[Measured] = []
        for one in _each(points, "points measured", main):
            if len(points) > 1:
                stop_together(is_late, late)
            together(lambda one=one: found.append(_measure(one, vae, device, judges)) if main else None)  # type: ignore[misc]
        together(lambda: _tell(plan, found) if main else None)


def check_reference(options: EvalConfig, model: ModelConfig) -> Plan:
    """Refuses, before there is a trained model, what run_eval would refuse; reads every reference image.

    The statistics of the reference are kept for run_eval; those after the VAE need its weights and are left to it.

    Args:
        options: of `lpl eval`, for the model that training begins with.
        model: that model.

    Raises:
        UserError: bad input, in every process of a launch.
    """
    with _processes() as accelerator:
        plan = together(lambda: check_eval(options, model))
        read = lambda: read_references(options, plan.resolution, plan.inception, None, accelerator.device)  # noqa: E731
        together(lambda: read() if accelerator.is_main_process else None)
    return plan


@contextmanager
def _processes() -> Iterator[Accelerator]:
    """The processes of a launch, joined until the end, or until they have all raised the same."""
    # Processes may wait for each other far longer than torch's ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))])
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    try:
        yield accelerator
    except (UserError, StopRequestedError):
        accelerator.end_training()
        raise
    accelerator.end_training()


def _load(plan: Plan, device: torch.device) -> Any:
    from lpl.families.sampling import load_for_sampling

    request, options = plan.request, plan.options
    assert request is not None
    dtype = getattr(torch, options.dtype)
    return with_flag(
        request,
        lambda: load_for_sampling(request.model, dtype, device, request.lora, options.lora_scale, options.scheduler),
    )


def _draw(plan: Plan, sampler: Any, accelerator: Accelerator) -> None:
    from lpl.families.base import weights_hash

    folder, main = plan.folder, accelerator.is_main_process
    parts = sampler.configuration(plan.distinct_prompts).items()
    settings = plan.settings(weights=weights_hash(*sampler.modules()), **{f"{name}'s config": h for name, h in parts})
    together(lambda: check_settings(folder, settings))  # all have checked before the first image appears
    together(lambda: write_settings(folder, settings) if main else None)
    together(
        lambda: generate_into(
            sampler,
            plan.distinct_prompts,
            folder / IMAGES,
            len(plan.files),
            plan.sampling,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            show=main,
        )
    )
    if main:
        rows = [
            json.dumps({"file_name": image_name(i), "text": prompt}, ensure_ascii=False)
            for i, prompt in enumerate(plan.prompts or [])
        ]
        write_atomically(folder / IMAGES / CAPTIONS, ("\n".join(rows) + "\n").encode())


def _each(points: Sequence[Plan], desc: str, show: bool) -> Any:
    """The points, with a bar where there are several."""
    return progress(points, desc=desc, unit="point", show=show and len(points) > 1)


def _judges(plan: Plan, vae: Any, device: torch.device) -> list[Judge]:
    return open_judges(plan.options, plan.resolution, plan.inception, vae, device)


def _measure(plan: Plan, vae: Any, device: torch.device, judges: Sequence[Judge]) -> Measured:
    """The figures of a point; where there are several, what is kept of it is not measured again."""
    key, kept = "", plan.folder != Path(plan.options.output_dir)
    if kept:
        key = figures_key(plan.options, plan.files, plan.prompts, judges, vae)
        known = read_figures(plan.folder, key)
        if known is not None:
            return known
    arguments = (plan.options, plan.files, plan.prompts, plan.resolution, plan.inception, vae, device)
    found = measure_all(*arguments, judges)
    if kept:
        keep_figures(plan.folder, key, found)
    return found


def _tell(plan: Plan, found: Sequence[Measured]) -> None:
    result = eval_result(plan, found)
    _write(Path(plan.options.output_dir) / RESULT, result)
    print(format_table(result))


def _vae(options: EvalConfig, sampler: Any, device: torch.device) -> Any:
    if sampler is not None:
        return sampler.vae
    name = options.pretrained_vae_model_name_or_path
    if name is None:
        return None
    from diffusers import AutoModel

    from lpl.evaluation.features import load_pretrained

    return load_pretrained(AutoModel, "--pretrained_vae_model_name_or_path", name).to(device).float().eval()


def _write(file: Path, result: dict[str, Any]) -> None:
    try:
        write_atomically(file, (json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"--output_dir {file.parent}: cannot be written ({error.strerror})") from error
