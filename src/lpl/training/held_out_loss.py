"""Both losses on held-out samples, with noise and timesteps that never change: comparable over steps and runs.

    diffusion(k) = mean over i of |o(x_ik, t_ik) - target_ik|^2 / n,    lpl(k) = mean over i of L(x0_hat_ik, x0_i)

for sample i and bin k of the schedule, cut into BINS equal parts; t_ik is uniform in bin k, drawn for (seed,
"validation_timestep", i, k), and the noise for (seed, "validation_noise", i, k). Neither loss is weighted: no min-SNR,
no Huber, no noise offset, no lpl_weight, no scale by SNR, no random depth and no crop, so changing those leaves the
scale of the figures as it is. LPL is measured where its gate passes. Masks count as in training.

Differs from training: timesteps are uniform over the schedule whatever --timestep_distribution says; captions are never
dropped; crops are always the first one, not mirrored.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from lpl.data.dataset import TrainingData
from lpl.diffusion.diffusion_loss import diffusion_loss
from lpl.diffusion.draws import draw_normal, keyed_uniform
from lpl.diffusion.prediction import add_noise, target_of, x0_from_output
from lpl.progress import progress
from lpl.training.step import TrainingStep

logger = logging.getLogger("lpl")

BINS = 10


class Item(NamedTuple):
    """One sample at one noise level."""

    sample: int
    """Number of the sample."""
    part: int
    """The bin it is in."""
    timestep: int


class HeldOutLoss:
    """Measures diffusion loss and LPL on the held-out samples.

    The model is called equally often on every process, as sharded models need it: batches are dealt out in turn, and
    who has one less repeats one that does not count. Batches are the same whatever the number of processes, and every
    figure is put together in the same order, so the result is the same too.

    Args:
        accelerator: of the run.
        data: with what is held out.
        step_loss: of the run: family, seed, schedule and LPL.
        batch_size: samples that go through the model at once; training's own needs no more memory than training.
    """

    def __init__(self, accelerator: Accelerator, data: TrainingData, step_loss: TrainingStep, batch_size: int) -> None:
        self.accelerator, self.data, self.step, self.seed = accelerator, data, step_loss, step_loss.seed
        self.edges = bin_edges(len(step_loss.alpha), BINS)
        self.items = [self._item(index, k) for index in self._by_bucket() for k in range(len(self.edges) - 1)]
        places = range(len(self.items))
        buckets = [int(data.buckets[item.sample]) for item in self.items]
        self.batches: list[list[int]] = []
        for bucket in dict.fromkeys(buckets):
            own = [place for place in places if buckets[place] == bucket]
            self.batches += [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
        self.gated = torch.zeros(len(self.items), dtype=torch.bool)
        if step_loss.objective is not None:
            self.gated = step_loss.objective.gate.table[torch.tensor([item.timestep for item in self.items])]
            if not self.gated.any():
                logger.warning(
                    "validation says nothing of LPL: none of its %d timesteps passes the gate %s; hold out more images",
                    *(len(self.items), step_loss.objective.gate),
                )
            # Whole images at full depth: the loss itself may be an estimate of that.
            self.loss_fn = copy.copy(step_loss.objective.loss_fn)
            self.loss_fn.crop = None

    def _by_bucket(self) -> list[int]:
        held = self.data.split.held_out.tolist()
        return sorted(held, key=lambda index: (int(self.data.buckets[index]), index))

    def _item(self, index: int, k: int) -> Item:
        low, high = self.edges[k], self.edges[k + 1]
        drawn = keyed_uniform(self.seed, "validation_timestep", self.data.samples[index].id, k)
        return Item(index, k, low + int(drawn * (high - low)))

    @torch.no_grad()
    def measure(self, denoiser: Any, proceed: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The means over all samples and by bin, alike on every process; the denoiser is in eval mode.

        Args:
            denoiser: as accelerate prepared it.
            proceed: called before every batch, on every process equally often; raises to stop there.

        Returns:
            "diffusion_loss" and, with a gate that passes, "lpl": means; "diffusion_loss_bins" and "lpl_bins": lists by
            bin, None where nothing passes.
        """
        device = self.accelerator.device
        found = torch.zeros(2, len(self.items), dtype=torch.float32, device=device)
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        rounds = range(0, len(self.batches), size)
        show = self.accelerator.is_local_main_process
        for first in progress(rounds, desc="validating", unit="batch", show=show):
            proceed()
            counts = first + rank < len(self.batches)
            places = self.batches[first + rank if counts else first]
            losses = self._losses(denoiser, places)
            if counts:
                found[:, torch.tensor(places, device=device)] = losses
        # Every place is 0 on all processes but one: the sum is exact.
        found = self.accelerator.reduce(found, "sum").double().cpu()
        result = self._means("diffusion_loss", found[0], torch.ones_like(self.gated))
        return result | (self._means("lpl", found[1], self.gated) if self.gated.any() else {})

    def _losses(self, denoiser: Any, places: list[int]) -> Tensor:
        """(2, B): diffusion loss and LPL (0 where the gate is shut) of a batch."""
        step, device = self.step, self.accelerator.device
        items = [self.items[place] for place in places]
        batch = self.data.batch([(item.sample, item.part) for item in items], fixed=True)
        timesteps = torch.tensor([item.timestep for item in items])
        alpha, sigma = step.alpha[timesteps].float(), step.sigma[timesteps].float()
        shape = tuple(batch.raw_latents.shape[1:])
        keys = zip(batch.sample_ids, batch.counts, strict=True)
        noise = torch.stack([draw_normal(shape, self.seed, "validation_noise", *key) for key in keys]).to(device)
        latents = step.latent_space.from_raw(batch.raw_latents.to(device))
        noisy_latents = add_noise(latents, noise, alpha, sigma)
        text = {name: value.to(device) for name, value in batch.text.items()}
        with torch.autocast(device.type, step.autocast, enabled=step.autocast is not None):
            output = step.family.denoise(
                denoiser, noisy_latents, timesteps.to(device), text, batch.sizes.to(device)
            ).float()
        target = target_of(latents, noise, alpha, sigma, step.prediction_type)
        mask = None if batch.mask is None else batch.mask.to(device)
        diffusion = diffusion_loss(output, target, mask=mask)
        losses = torch.stack([diffusion, torch.zeros_like(diffusion)])
        for n in self.gated[places].nonzero().flatten().tolist():  # each alone: norm `batch` is to see no other
            one = slice(n, n + 1)
            clean = x0_from_output(output[one], noisy_latents[one], alpha[one], sigma[one], step.prediction_type)
            losses[1, n] = self.loss_fn(clean, latents[one], None if mask is None else mask[one]).per_sample[0]
        return losses

    def _means(self, name: str, values: Tensor, among: Tensor) -> dict[str, Any]:
        bins = torch.tensor([item.part for item in self.items])
        chosen = [values[among & (bins == k)] for k in range(len(self.edges) - 1)]
        return {
            name: float(values[among].mean()),
            f"{name}_bins": [float(own.mean()) if len(own) else None for own in chosen],
        }


def bin_edges(num_timesteps: int, bins: int) -> list[int]:
    """Edges of equal parts of a schedule, at most one for each timestep: bin k holds edges[k] <= t < edges[k + 1]."""
    bins = min(bins, num_timesteps)
    return [num_timesteps * k // bins for k in range(bins + 1)]
