"""`lpl eval`: checks what is cheap to check, draws samples or takes them, measures, and writes eval.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from lpl.base.errors import StopRequestedError, UserError, require
from lpl.base.files import alone_in, write_output
from lpl.base.json_files import write_json
from lpl.base.terminal import progress
from lpl.config import ModelConfig
from lpl.config.model_commands import EvalConfig
from lpl.config.run_folder import EVAL_FILE, IMAGES
from lpl.evaluation.generate import check_settings, generate_into, image_name, write_settings
from lpl.evaluation.images import CAPTIONS
from lpl.evaluation.measuring import Judge, PointMetrics, measure_point, open_judges
from lpl.evaluation.planning import Plan, check_eval, check_output, claim_output, with_flag
from lpl.evaluation.result import eval_result, format_table

T = TypeVar("T")
logger = logging.getLogger("lpl")


def together(act: Callable[[], T]) -> T:
    """Calls act, which must not wait for another process; returns when all processes have called this.

    Raises:
        UserError: in every process, if act raised one in any: that of the first such process.
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
    """Stops all processes if it is late in any, since their clocks differ; every process must call this.

    Raises:
        StopRequestedError: it is late in some process.
    """
    if any(gather_object([is_late()])):
        raise StopRequestedError(message)


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
        main, device, folder = accelerator.is_main_process, accelerator.device, Path(options.output_dir)

        def in_first(act: Callable[[], T]) -> T | None:
            return together(lambda: act() if main else None)

        plan = together(lambda: check_eval(options))
        # Samples of another command, or of other settings, may have come since the checks.
        together(lambda: stack.enter_context(alone_in(folder)))
        together(lambda: check_output(plan))
        in_first(lambda: claim_output(options))
        require(
            options.dtype != "float16" or device.type != "cpu",
            "--dtype float16 needs a GPU; on a CPU use bfloat16 or float32",
        )
        require(
            options.dtype != "bfloat16"
            or device.type != "cuda"
            or torch.cuda.is_bf16_supported(including_emulation=False),
            "--dtype bfloat16: this GPU does not compute in bfloat16 (those of compute capability 8.0 and later do): "
            "use float16 or float32",
        )
        late = f"stopped by --max_minutes before {options.output_dir} was measured: the same command continues"
        stop_together(is_late, late)
        sampler = together(lambda: _load(plan, device))
        needs_vae = options.floor or options.against == "reconstructions"
        vae = in_first(lambda: _vae(options, sampler, device) if needs_vae else None)
        points = plan.each()
        bar = partial(progress, points, unit="point", show=main and len(points) > 1)
        if options.images is None:
            # An image that cannot be read is found before hours of drawing; what is computed is kept.
            in_first(lambda: _read_references(plan, vae, device))
            for point in bar(desc="points drawn"):
                stop_together(is_late, late)
                _draw(point, sampler, accelerator)
        judges: list[Judge] = in_first(lambda: list(open_judges(plan, vae, device))) or []
        found: list[PointMetrics] = []
        for point in bar(desc="points measured"):
            if len(points) > 1:
                stop_together(is_late, late)
            in_first(lambda point=point: found.append(measure_point(point, vae, device, judges)))  # type: ignore[misc]
        in_first(lambda: _tell(plan, found))


def check_reference(options: EvalConfig, model: ModelConfig) -> Plan:
    """Refuses, before there is a trained model, what run_eval would refuse; reads every reference image.

    The statistics of the reference are kept for run_eval, which computes those after the VAE: they need its weights.

    Args:
        options: of `lpl eval`, for the model that training begins with.
        model: that model.

    Raises:
        UserError: bad input, in every process of a launch.
    """
    with _processes() as accelerator:
        plan = together(lambda: check_eval(options, model))
        main, device = accelerator.is_main_process, accelerator.device
        together(lambda: _read_references(plan, None, device) if main else None)
    return plan


@contextmanager
def _processes() -> Iterator[Accelerator]:
    """The processes of a launch, joined until the end, or until they have all raised the same."""
    # Processes may wait for each other far longer than torch's ten minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))])
    # Features and images in float32 are the same whatever ran before in this process, and nearly a CPU's.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    try:
        yield accelerator
    except (UserError, StopRequestedError):
        accelerator.end_training()
        raise
    accelerator.end_training()


def _load(plan: Plan, device: torch.device) -> Any:
    request, options = plan.request, plan.options
    if request is None:
        return None
    from lpl.families.sampling import load_for_sampling

    dtype = getattr(torch, options.dtype)
    return with_flag(
        request,
        lambda: load_for_sampling(
            request.model,
            dtype,
            device,
            request.lora,
            options.lora_scale,
            options.scheduler,
            options.timestep_spacing,
        ),
    )


def _vae(options: EvalConfig, sampler: Any, device: torch.device) -> Any:
    name = options.pretrained_vae_model_name_or_path
    if sampler is not None or name is None:
        return None if sampler is None else sampler.vae
    from diffusers import AutoModel

    from lpl.evaluation.features import load_pretrained

    return load_pretrained(AutoModel, "--pretrained_vae_model_name_or_path", name).to(device).float().eval()


def _read_references(plan: Plan, vae: Any, device: torch.device) -> None:
    for _ in open_judges(plan, vae, device):  # one network at a time: the model is loaded, too
        pass


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
        rows = [{"file_name": image_name(i), "text": prompt} for i, prompt in enumerate(plan.prompts or [])]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_output(folder / IMAGES / CAPTIONS, text.encode(), f"--output_dir {folder}")


def _tell(plan: Plan, found: list[PointMetrics]) -> None:
    result = eval_result(plan, found)
    write_json(plan.folder / EVAL_FILE, result, f"--output_dir {plan.folder}")
    print(format_table(result))
