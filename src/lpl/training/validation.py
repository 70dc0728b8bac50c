"""Validation: when it happens, both losses on what is held out, images of fixed prompts, and the files they leave.

Everything is done with each kind of weights in turn, raw and averaged. Draws have keys of their own, the denoiser is in
eval mode and no gradient is taken, so training goes on as if nothing had happened.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from lpl.base.errors import StopRequestedError
from lpl.base.files import write_atomically
from lpl.base.terminal import progress
from lpl.base.text import Prompt
from lpl.config import TrainConfig
from lpl.config.run_folder import SAMPLES, VALIDATION, read_rows, write_rows
from lpl.data.dataset import TrainingData
from lpl.data.sheets import KEY, png_of
from lpl.diffusion.draws import bin_edges, draw_normal, keyed_uniform
from lpl.diffusion.losses import diffusion_loss
from lpl.training.sharded import forget_gathered
from lpl.training.step import StepInputs, TrainingStep
from lpl.training.stopping import Stop
from lpl.training.validation_images import ImageDrawer, label_grid
from lpl.training.weights import Weights

logger = logging.getLogger("lpl")


class Item(NamedTuple):
    """One sample at one noise level."""

    sample: int
    """Number of the sample."""
    part: int
    """The bin it is in."""
    level: Tensor
    """Scalar, the noise level."""


class HeldOutLoss:
    """Measures diffusion loss and LPL on the held-out samples.

    The model is called equally often on every process, as sharded models need it: batches are dealt out in turn, and
    a process with one batch fewer computes one again and discards it. Batches are the same whatever the number of
    processes, and every mean is taken in the same order, so the result is the same too.

    Args:
        batch_size: samples that go through the model at once; with training's, no more memory is needed than there.
    """

    def __init__(self, accelerator: Accelerator, data: TrainingData, step_loss: TrainingStep, batch_size: int) -> None:
        self.accelerator, self.data, self.step, self.seed = accelerator, data, step_loss, step_loss.seed
        self.edges = bin_edges(step_loss.schedule.num_timesteps)
        held = sorted(data.split.held_out.tolist(), key=lambda index: (int(data.buckets[index]), index))
        self.items = [self._item(index, k) for index in held for k in range(len(self.edges) - 1)]
        places = range(len(self.items))
        buckets = [int(data.buckets[item.sample]) for item in self.items]
        self.batches: list[list[int]] = []
        for bucket in dict.fromkeys(buckets):
            own = [place for place in places if buckets[place] == bucket]
            self.batches += [own[first : first + batch_size] for first in range(0, len(own), batch_size)]
        self.gated = torch.zeros(len(self.items), dtype=torch.bool)
        if step_loss.objective is not None:
            self.gated = step_loss.objective.gate.opens(torch.stack([item.level for item in self.items]))
            if not self.gated.any():
                logger.warning(
                    "validation says nothing of LPL: none of its %d timesteps passes the gate %s; hold out more images",
                    *(len(self.items), step_loss.objective.gate),
                )
            self.loss_fn = step_loss.objective.loss_fn.uncropped()  # training's loss may only estimate it

    def _item(self, index: int, k: int) -> Item:
        low, high = self.edges[k], self.edges[k + 1]
        drawn = keyed_uniform(self.seed, "validation_timestep", self.data.samples[index].id, k)
        return Item(index, k, self.step.schedule.at([low + drawn * (high - low)])[0])

    @torch.no_grad()
    def measure(self, denoiser: Any, proceed: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The means over all samples and by bin, alike on every process; the denoiser is in eval mode.

        Args:
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
        found = self.accelerator.reduce(found, "sum").cpu().double()
        result = self._means("diffusion_loss", found[0], torch.ones_like(self.gated))
        return result | (self._means("lpl", found[1], self.gated) if self.gated.any() else {})

    def _losses(self, denoiser: Any, places: list[int]) -> Tensor:
        """(2, B): diffusion loss and LPL (0 where the gate is shut) of a batch."""
        step, items = self.step, [self.items[place] for place in places]
        batch = self.data.batch([(item.sample, item.part) for item in items], fixed=True)
        levels = torch.stack([item.level for item in items])
        shape = tuple(batch.raw_latents.shape[1:])
        keys = zip(batch.sample_ids, batch.counts, strict=True)
        noise = torch.stack([draw_normal(shape, self.seed, "validation_noise", *key) for key in keys])
        inputs = step.denoise(denoiser, batch, noise, levels, self.accelerator.device)
        diffusion = diffusion_loss(inputs.model_output, inputs.target, mask=inputs.mask)
        losses = torch.stack([diffusion, torch.zeros_like(diffusion)])
        for n in self.gated[places].nonzero().flatten().tolist():  # one by one: norm `batch` must not mix them
            one = StepInputs._make(None if part is None else part[n : n + 1] for part in inputs)
            losses[1, n] = self.loss_fn(one.x0(step.prediction_type), one.latents, one.mask).per_sample[0]
        return losses

    def _means(self, name: str, values: Tensor, among: Tensor) -> dict[str, Any]:
        bins = torch.tensor([item.part for item in self.items])
        chosen = [values[among & (bins == k)] for k in range(len(self.edges) - 1)]
        return {
            name: float(values[among].mean()),
            f"{name}_bins": [float(own.mean()) if len(own) else None for own in chosen],
        }


class Validation:
    """Validates a run at step 0, every --validation_steps or --validation_epochs, and at its end.

    Leaves a row for each kind of weights in validation.jsonl, samples/step-<step>.png, and the same in the trackers:
    validation/<kind>/diffusion_loss, .../diffusion_loss/bin_<k>, .../lpl, .../lpl/bin_<k>, and the images.

    Args:
        losses: on what is held out; None: nothing is.
        images: of the prompts; None: there are none.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        weights: Weights,
        losses: HeldOutLoss | None,
        images: ImageDrawer | None,
        stop: Stop,
        steps_per_epoch: float,
        num_steps: int,
    ) -> None:
        log, self.folder = config.logging, Path(config.run.output_dir)
        self.accelerator, self.weights, self.losses, self.images = accelerator, weights, losses, images
        self.stop, self.num_steps = stop, num_steps
        self.every = log.validation_steps or max(1, round(log.validation_epochs * steps_per_epoch))

    def begin(self, step: int, denoiser: Any) -> None:
        """Before the run's first step or its first after a resume: validates, unless that was done before it stopped.

        Rows of later steps are removed, as those steps are done again.

        Raises:
            UserError: a validation.jsonl that cannot be read.
        """
        if self.losses is None and self.images is None:
            return
        done = torch.zeros(1, device=self.accelerator.device)
        if self.accelerator.is_main_process:
            rows = read_rows(self.folder / VALIDATION)
            kept = [row for row in rows if row["step"] <= step]
            if len(kept) < len(rows):
                write_rows(self.folder / VALIDATION, kept)
            kinds = {row["weights"] for row in kept if row["step"] == step}
            measured = self.losses is None or kinds == set(self.weights.kinds)
            done += measured and (self.images is None or image_file(self.folder, step).is_file())
        if not float(self.accelerator.reduce(done, "sum")):
            self.at(step, denoiser)

    def at(self, step: int, denoiser: Any) -> None:
        """After a step: validates if it is time; leaves nothing if the run is asked to stop meanwhile."""
        nothing = self.losses is None and self.images is None
        if nothing or (step % self.every and step != self.num_steps):
            return
        bare = self.accelerator.unwrap_model(denoiser, keep_torch_compile=False)
        rows: list[dict[str, Any]] = []
        pictures: dict[str, list[Image.Image]] = {}
        denoiser.eval()
        try:
            # Other batch sizes, without gradients: compiling for them would not pay.
            with torch.compiler.set_stance("force_eager"):
                for kind in self.weights.kinds:
                    with self.weights.use(kind):
                        forget_gathered(denoiser)
                        if self.losses is not None:
                            what = {"step": step, "weights": kind, "samples": len(self.losses.data.split.held_out)}
                            found = self.losses.measure(denoiser, self._proceed)
                            rows.append(what | {"edges": self.losses.edges} | found)
                        if self.images is not None:
                            pictures[kind] = self.images.draw(bare, self._proceed)
        except StopRequestedError:
            return  # the trainer stops at once, and the next run validates here
        finally:
            forget_gathered(denoiser)
            denoiser.train()
        if self.accelerator.is_main_process:
            self._publish(step, rows, pictures)
        self.accelerator.wait_for_everyone()

    def _proceed(self) -> None:
        if self.stop.agreed():
            raise StopRequestedError("stopped while validating: the same command continues")

    def _publish(self, step: int, rows: list[dict[str, Any]], pictures: dict[str, list[Image.Image]]) -> None:
        for row in rows:
            metrics = scalars(row)
            if not all(map(math.isfinite, metrics.values())):
                logger.warning("step %d: a validation loss of the %s weights is not finite", step, row["weights"])
            self.accelerator.log(metrics, step=step)
        if rows:
            new = {(row["step"], row["weights"]) for row in rows}
            kept = [row for row in read_rows(self.folder / VALIDATION) if (row["step"], row["weights"]) not in new]
            write_rows(self.folder / VALIDATION, kept + rows)
        if self.images is not None:
            seeds = [seed for _, seed in self.images.jobs]
            grid = label_grid(pictures, self.images.prompts, f"step {step}", seeds)
            self._track(step, grid, pictures, self.images.prompts)
            write_atomically(image_file(self.folder, step), png_of(grid, grid.info[KEY]))

    def _track(
        self, step: int, grid: Image.Image, pictures: dict[str, list[Image.Image]], prompts: Sequence[Prompt]
    ) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")
            elif tracker.name == "wandb":
                import wandb

                texts = [prompt.text for prompt in prompts]
                for kind, images in pictures.items():
                    each = len(images) // len(texts)
                    shown = [wandb.Image(image, caption=texts[i // each]) for i, image in enumerate(images)]
                    tracker.log({f"validation/{kind}": shown}, step=step)


def image_file(folder: Path, step: int) -> Path:
    """Where the validation images of a step are."""
    return folder / SAMPLES / f"step-{step:07d}.png"


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The losses of a row under the names that they are logged by; bins in which nothing was measured are left out."""
    found = {}
    for name in ("diffusion_loss", "lpl"):
        if name in row:
            prefix = f"validation/{row['weights']}/{name}"
            found[prefix] = row[name]
            found |= {f"{prefix}/bin_{k}": v for k, v in enumerate(row[f"{name}_bins"]) if v is not None}
    return found
