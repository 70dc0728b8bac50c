"""The order in which samples are drawn: one endless sequence, cut into batches by arithmetic alone.

Position n of the sequence is sample `permutation of epoch n // size` at `n % size`. Which process or micro-batch
takes a position depends on how the global batch is split, the sequence does not, and resuming needs the step only.
"""

from __future__ import annotations

import torch

from lpl.diffusion.draws import keyed_generator


class DrawOrder:
    """An endless sequence of draws in which each run of `size` draws, an epoch, holds every sample once.

    Args:
        seed: seed of the run.
        size: number of samples.

    Raises:
        ValueError: no samples.
    """

    def __init__(self, seed: int, size: int) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self.seed = seed
        self.size = size
        self._epoch = -1
        self._permutation: list[int] = []

    def draw(self, position: int) -> tuple[int, int]:
        """(sample index, epoch) at a position; the epoch is how often the sample has been drawn before."""
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            generator = keyed_generator(self.seed, "order", epoch)
            self._permutation = torch.randperm(self.size, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[offset], epoch


def positions(
    step: int, micro_batch: int, process: int, batch_size: int, accumulation: int, processes: int
) -> list[int]:
    """Positions of the sequence that one process takes in one micro-batch.

    Optimizer step s covers [s G, (s + 1) G), G = batch_size * accumulation * processes, however G is split; batches
    run on across the ends of epochs, so nothing is dropped or repeated.

    Args:
        step: optimizer step, from 0.
        micro_batch: which of the step's micro-batches, 0 to accumulation - 1.
        process: which process, 0 to processes - 1.
        batch_size: samples per process and micro-batch.
        accumulation: micro-batches per optimizer step.
        processes: number of processes.

    Raises:
        ValueError: a micro-batch or process outside its range.
    """
    if not (step >= 0 and 0 <= micro_batch < accumulation and 0 <= process < processes):
        raise ValueError(f"no micro-batch {micro_batch} of {accumulation}, process {process} of {processes}, {step=}")
    start = ((step * accumulation + micro_batch) * processes + process) * batch_size
    return list(range(start, start + batch_size))
