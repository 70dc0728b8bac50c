"""Which samples this process takes in which micro-batch: its share of each step of the run's one order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from accelerate import Accelerator

from lpl.config import TrainConfig
from lpl.data.dataset import Batch, TrainingData
from lpl.data.sampler import BatchOrder, share
from lpl.diffusion.strata import strata

T = TypeVar("T")


class Batches:
    """The micro-batches of a run.

    Args:
        config: the run's.
        data: its samples.
        accelerator: the engine.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, accelerator: Accelerator) -> None:
        run, processes = config.run, accelerator.num_processes
        self._config, self._data, self._accelerator = config, data, accelerator
        self.samples_per_step = run.train_batch_size * run.gradient_accumulation_steps * processes
        self._order = BatchOrder(run.seed, data.buckets, data.repeats, self.samples_per_step)
        self.steps_per_epoch = self._order.epoch_size / self.samples_per_step
        self.num_steps = config.num_steps(self._order.epoch_size, processes)

    def batch(self, step: int, micro_batch: int) -> Batch:
        """The samples of a micro-batch of an optimizer step, in this process."""
        batch = self._data.batch(list(self._share(self._order.batch(step), micro_batch)))
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
