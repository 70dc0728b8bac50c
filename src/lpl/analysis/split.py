"""What a run needs on each of the GPUs that FSDP2 splits the model over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lpl.analysis.needs import Needs, estimate, fixed_costs, floor, optimizer_workspace
from lpl.analysis.rehearsal import HALF, Rehearsal
from lpl.config import TrainConfig
from lpl.training.launch import splits


def launched_estimate(config: TrainConfig, rehearsal: Rehearsal, processes: int) -> Needs:
    """What a run needs on each device as it is launched, see training.launch: whole models, or split ones."""
    return split_estimate(config, rehearsal, processes) if splits() else estimate(config, rehearsal, processes)


def launched_floor(config: TrainConfig, rehearsal: Rehearsal, processes: int) -> int:
    """A bound from below on its peak, by arithmetic alone."""
    if splits():
        return sum(fixed_costs(config, rehearsal, 1).values()) // processes
    return floor(config, rehearsal, processes)


def split_estimate(config: TrainConfig, rehearsal: Rehearsal, processes: int) -> Needs:
    """As needs.estimate, with weights, gradients, optimizer state and average split over processes.

    Every process gathers the weights of one block while it computes with them and of the next meanwhile, and keeps
    those that belong to no block; in the backward pass a block's gradients are there whole, and again in float32 to be
    summed. Activations and LPL are a process's own. Gathering is taken at its largest everywhere: an upper bound.

    Args:
        config: with its resolution.
        rehearsal: of the model.
        processes: that the model is split over.
    """
    # Gradients that go as soon as they are there, as those of a block do once they are summed, and weights that need no
    # copy for autocast.
    dtype: Any = "bfloat16" if config.run.mixed_precision in HALF and config.model.rank is None else "float32"
    optim = replace(config.optim, fused_backward_pass=True, max_grad_norm=0.0, weights_dtype=dtype)
    alone, parameters = estimate(replace(config, optim=optim), rehearsal), rehearsal.parameters(config)
    blocks, rest = gathered_sizes(rehearsal, config)
    gathered = sum(sorted(blocks)[-2:]) + rest
    gradients = -(-4 * parameters.trained // processes)
    own = {name: size for name, size in alone.stays.items() if name.startswith(("VAE", "LPL"))}
    stays = {name: -(-size // processes) for name, size in fixed_costs(config, rehearsal, 1).items()} | own
    fixed, before = sum(stays.values()), sum(alone.stays.values())
    held = gradients if config.run.gradient_accumulation_steps > 1 else 0
    phases = {"caching": alone.phases["caching"]}
    for phase in ("forward pass", "LPL", "validation"):
        if phase in alone.phases:
            phases[phase] = fixed + alone.phases[phase] - before + gathered + (held if phase != "validation" else 0)
    summed = 0 if config.model.rank is not None else 2 * max(blocks)
    phases["backward pass"] = fixed + alone.phases["backward pass"] - before + gathered + gradients + summed
    phases["optimizer step"] = fixed + gradients + -(-optimizer_workspace(config, rehearsal) // processes)
    if "EMA update" in alone.phases:
        phases["EMA update"] = fixed + gradients
    return alone._replace(stays=stays | {"gathered blocks": gathered}, gradients=gradients, phases=phases)


def gathered_sizes(rehearsal: Rehearsal, config: TrainConfig) -> tuple[list[int], int]:
    """Bytes of each block's weights as they are gathered, and of those that belong to no block."""
    model = rehearsal.model(config)
    names, itemsize = set(model._no_split_modules), 2 if config.run.mixed_precision in HALF else 4
    blocks = {id(m): 0 for m in model.modules() if type(m).__name__ in names}
    rest = _add_up(model, blocks, None, itemsize)
    return list(blocks.values()), rest


def _add_up(module: nn.Module, blocks: dict[int, int], inside: int | None, itemsize: int) -> int:
    """Adds each weight to the innermost block around it; returns what has none."""
    inside = id(module) if id(module) in blocks else inside
    own = sum(itemsize * p.numel() for p in module.parameters(recurse=False))
    rest: Any = 0
    if inside is None:
        rest = own
    else:
        blocks[inside] += own
    return rest + sum(_add_up(child, blocks, inside, itemsize) for child in module.children())
