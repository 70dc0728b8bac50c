"""Validation: when it happens, both losses on what is held out, images of fixed prompts, and what is left of them.

Everything is done with each kind of weights in turn, raw and averaged. Draws have keys of their own, the denoiser is in
eval mode and no gradient is taken, so training goes on as if there had been none.
"""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from lpl.config import TrainConfig
from lpl.data.files import write_atomically
from lpl.data.picture_cells import KEY, cells_note
from lpl.data.prompts import Prompt
from lpl.errors import StopRequestedError
from lpl.training.held_out_loss import HeldOutLoss
from lpl.training.sharded import forget_gathered
from lpl.training.stopping import Stop
from lpl.training.validation_images import ImageDrawer, label_grid
from lpl.training.weights import Weights
from lpl.written_files import read_validated

logger = logging.getLogger("lpl")

FILE = "validation.jsonl"
SAMPLES = "samples"


class Validation:
    """Validates a run at step 0, every --validation_steps or --validation_epochs, and at its end.

    Leaves a row for each kind of weights in validation.jsonl, samples/step-<step>.png, and the same in the trackers:
    validation/<kind>/diffusion_loss, .../diffusion_loss/bin_<k>, .../lpl, .../lpl/bin_<k>, and the images.

    Args:
        config: the options.
        accelerator: of the run.
        weights: what is validated.
        losses: on what is held out; None: nothing is.
        images: of the prompts; None: there are none.
        stop: asked between batches and sampling steps.
        steps_per_epoch: for --validation_epochs.
        num_steps: of the run.
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
            rows = read_rows(self.folder / FILE)
            kept = [row for row in rows if row["step"] <= step]
            if len(kept) < len(rows):
                write_rows(self.folder / FILE, kept)
            kinds = {row["weights"] for row in kept if row["step"] == step}
            measured = self.losses is None or kinds == set(self.weights.kinds)
            done += measured and (self.images is None or image_file(self.folder, step).is_file())
        if not float(self.accelerator.reduce(done, "sum")):
            self.at(step, denoiser)

    def at(self, step: int, denoiser: Any) -> None:
        """After so many optimizer steps: validates if it is time; leaves nothing if the run is asked to stop meanwhile.

        Args:
            step: optimizer steps done.
            denoiser: as accelerate prepared it.
        """
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
                            rows.append(self._row(step, kind, self.losses.measure(denoiser, self._proceed)))
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

    def _row(self, step: int, kind: str, found: dict[str, Any]) -> dict[str, Any]:
        assert self.losses is not None
        samples = len(self.losses.data.split.held_out)
        return {"step": step, "weights": kind, "samples": samples, "edges": self.losses.edges} | found

    def _publish(self, step: int, rows: list[dict[str, Any]], pictures: dict[str, list[Image.Image]]) -> None:
        for row in rows:
            metrics = scalars(row)
            if not all(map(math.isfinite, metrics.values())):
                logger.warning("step %d: a validation loss of the %s weights is not finite", step, row["weights"])
            self.accelerator.log(metrics, step=step)
        if rows:
            new = {(row["step"], row["weights"]) for row in rows}
            kept = [row for row in read_rows(self.folder / FILE) if (row["step"], row["weights"]) not in new]
            write_rows(self.folder / FILE, kept + rows)
        if self.images is not None:
            seeds = [seed for _, seed in self.images.jobs]
            grid = label_grid(pictures, self.images.prompts, f"step {step}", seeds)
            self._track(step, grid, pictures, self.images.prompts)
            content = io.BytesIO()
            grid.save(content, "PNG", pnginfo=cells_note(grid.info[KEY]))
            write_atomically(image_file(self.folder, step), content.getvalue())

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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a validation.jsonl, none if there is no file.

    Raises:
        UserError: a line that is no row.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            rows.append(read_validated(line, f"{path}, line {number}"))
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replaces the rows, ordered by step; the file is whole at any moment."""
    ordered = sorted(rows, key=lambda row: int(row["step"]))
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in ordered).encode())
