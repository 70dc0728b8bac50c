"""`lpl train` in several gloo processes, forked from the test's own."""

from __future__ import annotations

import os
from typing import Any

import accelerate
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule

from lpl.training.launch import environment

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
"""What `accelerate launch` sets for presets/accelerate/fsdp2.yaml."""


class ShardingAccelerator(accelerate.Accelerator):
    """Splits models by FSDP2 on a CPU too, where accelerate would take DDP."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # accelerate copies the second into the first whenever it is asked for its state.
        self.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def prepare(self, *objects: Any, **options: Any) -> Any:
        prepared = super().prepare(*objects, **options)
        assert isinstance(prepared[0], FSDPModule)
        assert any(isinstance(module, FSDPModule) for module in list(prepared[0].modules())[1:])
        return prepared


def process(commands: list[list[str]], fsdp: bool) -> None:
    """One process of a launch; real launchers name its number in the environment."""
    from lpl.cli import main
    from lpl.training import engine

    os.environ["RANK"] = str(torch.distributed.get_rank())
    if fsdp:
        engine.Accelerator = ShardingAccelerator  # type: ignore[misc]
    for argv in commands:
        main(argv)


def launch(argv: list[str], processes: int, fsdp: bool = False) -> None:
    """Runs `lpl ARGV` in so many processes, under DDP or FSDP2; raises where one fails."""
    launch_all([argv], processes, fsdp)


def launch_all(commands: list[list[str]], processes: int, fsdp: bool = False) -> None:
    """Runs commands one after the other in the same processes: what FSDP2 prepares, it prepares once."""
    with environment({"ACCELERATE_USE_CPU": "true"} | (FSDP if fsdp else {})):
        accelerate.debug_launcher(process, (commands, fsdp), num_processes=processes)
