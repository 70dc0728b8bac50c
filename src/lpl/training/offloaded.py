"""`--offload_blocks`: frozen weights of the denoiser's repeated blocks stay in the computer's memory.

A block computes with copies of its weights on the device: they are made before it runs, in the forward pass and again
when gradient checkpointing recomputes it, and freed after their last use in the backward pass. The weights in memory
never change, so results are those of a denoiser that is on the device as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lpl.base.errors import require
from lpl.families.joint import JointModel

logger = logging.getLogger("lpl")
LEAST = 2**16
"""Fewest bytes of an offloaded tensor: norms and biases stay on the device."""
Copy = Callable[[Tensor], Tensor]


def offload_to_host(denoiser: nn.Module, share: float, device: torch.device) -> None:
    """Offloads a share of a run's blocks to the host, in pinned memory, from which copies are asynchronous.

    DDP, which wants all parameters on one device, is told to ignore them.
    """
    waiting = offload(denoiser, share, lambda tensor: tensor.to(device, non_blocking=True))
    if device.type == "cpu":
        logger.warning("--offload_blocks has no effect on a CPU, where the blocks are anyway")
    if device.type == "cuda":
        for parameter in waiting:
            parameter.data = parameter.data.pin_memory()
    ids = {id(parameter) for parameter in waiting}
    names = [name for name, parameter in denoiser.named_parameters() if id(parameter) in ids]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(denoiser, names)


def offload(denoiser: nn.Module, share: float, copy: Copy) -> list[nn.Parameter]:
    """Keeps the frozen weights of a share of the blocks where they are, even when the denoiser is moved.

    Args:
        denoiser: with its trained parameters, which are not offloaded; changed in place.
        share: of its blocks, in 0..1, rounded up and spread evenly over them.
        copy: makes a copy of an offloaded tensor on the device.

    Returns:
        The offloaded parameters.

    Raises:
        UserError: there are no such blocks.
    """
    blocks = repeated_blocks(denoiser)
    require(bool(blocks), f"--offload_blocks {share:g}: this denoiser has no repeated blocks: drop it")
    number = ceil(share * len(blocks) - 1e-9)
    chosen = [blocks[place * len(blocks) // number] for place in range(number)]
    waiting = [parameter for block in chosen for parameter in _Waiting(block, copy).parameters]
    return list({id(parameter): parameter for parameter in waiting}.values())


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks in lists that diffusers names as repeated, or else as not to be split: gradient checkpointing
    recomputes each of them as a whole."""
    body: Any = denoiser.parts[0] if isinstance(denoiser, JointModel) else denoiser
    names = body._repeated_blocks or body._no_split_modules
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    return [block for several in lists for block in several if type(block).__name__ in names]


class _Waiting:
    """The frozen weights of a block, and their copies while it runs."""

    def __init__(self, block: nn.Module, copy: Copy) -> None:
        self.copy = copy
        self.places = [
            (module, name, parameter)
            for module in block.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.requires_grad and parameter.nbytes >= LEAST
        ]
        self.parameters = list({id(parameter): parameter for *_, parameter in self.places}.values())
        for module in {id(module): module for module, *_ in self.places}.values():
            self._keep_in_place(module)
        block.register_forward_pre_hook(self._bring)
        # Always called: a recomputation that ends early raises an exception.
        block.register_forward_hook(self._drop, always_call=True)

    def _keep_in_place(self, module: Any) -> None:
        """Leaves the offloaded weights as they are when the module is moved or cast."""
        own, apply = {name: p for m, name, p in self.places if m is module}, module._apply

        def apply_to_others(*arguments: Any, **named: Any) -> nn.Module:
            module._parameters.update(dict.fromkeys(own))
            apply(*arguments, **named)
            module._parameters.update(own)
            return module

        module._apply = apply_to_others

    def _bring(self, block: nn.Module, inputs: Any) -> None:
        copies = {id(parameter): self.copy(parameter.detach()) for parameter in self.parameters}
        for module, name, parameter in self.places:
            places: dict[str, Any] = module._parameters
            places[name] = copies[id(parameter)]

    def _drop(self, block: nn.Module, inputs: Any, output: Any) -> None:
        for module, name, parameter in self.places:
            module._parameters[name] = parameter
