"""`lpl plan` and `lpl train --dry_run`: what a run trains, compares and needs, from configs alone."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

from lpl.analysis.alternatives import HEADROOM, Change, Choice, cheapest, fits, neighbours, smallest
from lpl.analysis.needs import Needs, launched_estimate, readable
from lpl.base.errors import UserError
from lpl.base.terminal import progress
from lpl.config import TrainConfig
from lpl.config.length import count, length_of, on_the_way
from lpl.config.run import processes
from lpl.data.buckets import image_sizes
from lpl.families import blueprint, kind_of, plan_configs, with_lora_weights
from lpl.training.checks import check_memory_options
from lpl.training.launch import check_launch, splits
from lpl.training.preflight import Checked, check_options
from lpl.training.rehearsal import Rehearsal


def plan(config: TrainConfig, memory: int) -> str:
    """What the run needs, what it would need with one option changed, and what fits a device with `memory` bytes.

    Raises:
        UserError: a model whose configs cannot be read, or options that do not fit it.
    """
    config = replace(config, model=with_lora_weights(config.model))
    configs = plan_configs(config.model)
    if config.data.resolution is None:
        config = config.changed(resolution=kind_of(config.model).native_resolution(configs))
    config = _with_launched_precision(config)
    check_memory_options(config, packages=False)
    check_launch(config)
    check_options(config, configs)
    rehearsal, number = Rehearsal(blueprint(configs, config.model)), processes()
    changes = [Change("as asked", {}), *neighbours(config)]
    with progress(changes, desc="counting") as bar:
        rows = [Choice(c.flags, launched_estimate(c.apply(config), rehearsal, number)) for c in bar]
        asked = rows[0].needs
        verdict = _verdict(config, asked, memory, rehearsal, number)
    run = config.run
    checkpointing = "on" if run.gradient_checkpointing else "off"
    lines = [
        f"model        {config.model.pretrained_model_name_or_path or kind_of(config.model).base}",
        _trains(asked, config),
        f"run          {config.data.crop_size} px, batch {run.train_batch_size} x {run.gradient_accumulation_steps}, "
        f"mixed precision {run.mixed_precision}, gradient checkpointing {checkpointing}",
        *([f"processes    {number}, {'split by FSDP2' if splits() else 'each with the whole model'}"] * (number > 1)),
        *_details(asked, config),
        "",
        *_table(rows, memory),
        "",
        verdict,
    ]
    return "\n".join(lines)


def describe(config: TrainConfig, checked: Checked) -> str:
    """The plan of one run on its data.

    Raises:
        UserError: a single file that is not SDXL's base model, without --single_file_config.
    """
    config = _with_launched_precision(config)
    configs = checked.model_configs or plan_configs(config.model)
    rehearsal, run = Rehearsal(blueprint(configs, config.model)), config.run
    needs = launched_estimate(config, rehearsal, processes())
    size = checked.source.size
    samples = None if size is None else size - config.data.validation_samples
    verdict, length = _length(config, checked, samples)
    sizes = image_sizes(config.data).sizes
    shapes = f" in {len(sizes)} shapes" if len(sizes) > 1 else ""
    _, channels, side, _ = rehearsal.latents(config, 1)
    rates = "".join(f", {part} {rate:g}" for part, rate in config.component_rates.items())
    lines = [
        f"verdict      {verdict}",
        f"model        {config.model.pretrained_model_name_or_path}",
        _trains(needs, config),
        f"data         {samples or 'a stream of'} samples at {config.data.crop_size} px{shapes}, latents {channels} x "
        f"{side} x {side}",
        f"steps        {length}",
        *(f"{label:13}{what}" for label, what in on_the_way(config, checked.num_steps or sys.maxsize)),
        f"rate         {config.learning_rate:g}{rates}, {config.optim.lr_scheduler}; mixed precision "
        f"{run.mixed_precision}",
        *_details(needs, config),
    ]
    return "\n".join(lines)


def _length(config: TrainConfig, checked: Checked, samples: int | None) -> tuple[str, str]:
    """Whether a run may begin, and its length, in words."""
    run, ready = config.run, "ready to train"
    if checked.num_steps is None:
        each = run.draws_per_image
        wanted = f"{run.num_train_epochs} epochs" if each is None else f"{each:g} draws an image"
        return f"{ready}; `lpl data` says how long it takes", f"{wanted}, known in steps once the data are read"
    if samples is None:
        return ready, f"{count(checked.num_steps, 'step')} of {count(config.samples_per_step(processes()), 'sample')}"
    length = length_of(config, processes(), samples)
    warning = length.warning()
    return ready if warning is None else f"think again: {warning}", str(length)


def _with_launched_precision(config: TrainConfig) -> TrainConfig:
    """The config with accelerate's default precision where none is set."""
    precision = config.run.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"ACCELERATE_MIXED_PRECISION is {precision}: give --mixed_precision no, fp16 or bf16")
    return config.changed(mixed_precision=precision)


def _trains(needs: Needs, config: TrainConfig) -> str:
    rank = config.model.rank
    kind = "DoRA" if config.model.use_dora else "LoRA"
    what = f"{kind} of rank {rank} on {needs.base:,}" if rank else f"the whole {kind_of(config.model).denoiser_word}"
    if config.model.train_text_encoder and not rank:
        what += f" and {count(len(kind_of(config.model).trained_text), 'text encoder')}"
    return f"trains       {needs.trained:,} parameters ({what})"


def _details(needs: Needs, config: TrainConfig) -> list[str]:
    lpl, lines = config.lpl, []
    if lpl.use_lpl:
        share = "" if lpl.lpl_budget is None else f", {lpl.lpl_budget:g} of a step on average"
        lines.append(f"LPL          weight {lpl.lpl_weight}, {lpl.lpl_norm_type}, {lpl.lpl_loss_type}{share}")
        for name, channels, stride, weight in needs.taps:
            cells = config.data.crop_size // stride
            lines.append(f"  tap {name:6}  {channels} x {cells} x {cells}, weight {weight:g}")
    flops = f"FLOPs        {_tera(needs.step_flops)} TFLOP a sample"
    if lpl.use_lpl:
        mean = needs.mean_lpl_flops
        flops += (
            f", LPL {_tera(needs.lpl_flops)} more where the gate passes (probability {needs.p_gate:.2g}), "
            f"{_tera(mean)} on average: {1 + mean / needs.step_flops:.2f} times"
        )
    weights, *others = needs.stays.items()
    activations = (
        "their activations" if config.model.train_text_encoder else f"{kind_of(config.model).denoiser_word} activations"
    )
    rows = [weights, ("gradients", needs.gradients), *others, (activations, needs.kept)]
    if lpl.use_lpl:
        rows.append(("LPL, while it runs", needs.lpl))
    return [
        *lines,
        flops,
        f"memory       about {readable(needs.peak)} on the GPU at its peak ({needs.phase}); parts:",
        *(f"  {name:22} {readable(size):>10}" for name, size in rows),
        *_waits(needs),
        "peaks        on the GPU:",
        *(f"  {phase:22} {readable(peak):>10}" for phase, peak in needs.phases.items()),
    ]


def _waits(needs: Needs) -> list[str]:
    if not needs.waiting:
        return []
    return [f"offloaded    {readable(needs.waiting)} in the computer's memory, copied twice in every micro-batch"]


def _table(rows: list[Choice], memory: int) -> list[str]:
    width = max(len(row.flags) for row in rows)
    lines = [f"{'one change':{width}}  {'peak':>10}  {'at':14}  TFLOP  {_memory(memory)}"]
    for flags, needs in rows:
        flops = needs.step_flops + needs.mean_lpl_flops
        answer = "fits" if fits(needs.peak, memory) else "no"
        lines.append(f"{flags:{width}}  {readable(needs.peak):>10}  {needs.phase:14}  {_tera(flops):>5}  {answer}")
    return [
        *lines,
        f"TFLOP: of a sample, on average. What fits leaves {HEADROOM:.0%} for what is not counted: the CUDA context, "
        "workspace inside kernels, fragmentation.",
    ]


def _verdict(config: TrainConfig, asked: Needs, memory: int, rehearsal: Rehearsal, number: int) -> str:
    if fits(asked.peak, memory):
        return f"fits {_memory(memory)}"
    found = cheapest(config, memory, rehearsal, number)
    if found is None:
        least = smallest(config, rehearsal, number)
        return f"does not fit {_memory(memory)}, nor does {least.flags} ({readable(least.needs.peak)})"
    peak = readable(found.needs.peak)
    return f"does not fit {_memory(memory)}; the cheapest change that does: {found.flags} ({peak})"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.1f}" if flops >= 1e11 else f"{flops / 1e12:.2g}"


def _memory(size: int) -> str:
    return f"{size / 2**30:.4g} GiB"
