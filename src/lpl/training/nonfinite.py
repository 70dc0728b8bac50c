"""Numbers that go wrong: found before the optimizer step, named, and kept so that the step can be looked at.

A loss that is not finite makes its gradient NaN (`spoil`), whatever the gradient would have been; gradients are summed
over processes, so the norm that is computed for clipping anyway tells every process of it. Reading that norm is the one
synchronisation of an optimizer step. A condition on the device instead would have to be part of every optimizer (only
torch's fused ones have it), and zeroed gradients would still move AdamW's moments and decay the weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor

from lpl.config import TrainConfig
from lpl.config.run_folder import CONFIG_FILE, NONFINITE
from lpl.data.dataset import Batch

logger = logging.getLogger("lpl")

DUMPS = 20
"""Skipped steps that are dumped; a run that skips more often tells nothing new."""


class Seen(NamedTuple):
    """A micro-batch of the optimizer step that is under way."""

    batch: Batch
    diffusion_per_sample: Tensor
    """(B,), detached, on the device."""
    lpl: Tensor
    """Scalar, weighted, detached, on the device."""


class FiniteGuard:
    """Stops or skips an optimizer step whose loss or gradient is not finite, before weights or moments have moved.

    Args:
        draw: TrainingStep.draw, which gives a batch's noise and timesteps again.
    """

    def __init__(self, config: TrainConfig, draw: Callable[[Batch], Any]) -> None:
        self._config, self._draw = config, draw
        self._seen: list[Seen] = []
        self.skips = 0
        """Steps skipped in a row; belongs in the checkpoint."""

    def begin(self) -> None:
        """Forgets the optimizer step before."""
        self._seen = []

    def watch(self, batch: Batch, diffusion_per_sample: Tensor, lpl: Tensor) -> None:
        """Notes a micro-batch."""
        self._seen.append(Seen(batch, diffusion_per_sample, lpl))

    def fault(self, norm: Tensor, step: int, scaled: bool) -> str | None:
        """What is wrong with an optimizer step (counted from 1), by the norm of its gradient; None: nothing.

        Under a gradient scaler (`scaled`) a gradient that overflows is the scaler's to handle: only the loss counts.
        All processes must call it; where nothing is wrong they exchange nothing. Synchronises.
        """
        if bool(torch.isfinite(norm)):
            self.skips = 0
            return None
        dtype = self._config.lpl.lpl_dtype
        mine = describe(self._seen, step, dtype)
        reports = gather_object([] if mine is None else [mine])
        if reports:
            return str(reports[0])
        if scaled:
            return None
        hint = "; LPL's float16 decoder may overflow in its backward pass: --lpl_dtype bfloat16 or float32 does not"
        overflows = self._config.lpl.use_lpl and dtype == "float16"
        return f"the gradient was not finite at step {step}, though the loss was{hint * overflows}"

    def skip(self, fault: str, step: int, norm: float, rank: int) -> str | None:
        """Counts a step with a fault, dumps it and says that it is skipped; returns why the run must stop, or None."""
        run = self._config.run
        stops = run.on_nonfinite == "stop" or self.skips >= run.max_skips
        suffix = f"-process-{rank}" if rank else ""
        path = Path(run.output_dir) / f"{NONFINITE}{step}{suffix}.safetensors"
        numbers = {"fault": fault, "gradient_norm": str(norm), "seed": run.seed, "config": CONFIG_FILE}
        kept = dump(path, step, self._seen, self._draw, numbers, stops)
        fault += f"; safetensors.torch.load_file('{path}') has its latents, noise, timesteps and texts" * kept
        if not stops:
            self.skips += 1
            logger.warning("%s; the step is skipped (%d of --max_skips %d)", fault, self.skips, run.max_skips)
            return None
        if run.on_nonfinite == "skip":
            return f"{fault}; more steps in a row were skipped than --max_skips {run.max_skips}"
        return f"{fault}; --on_nonfinite skip leaves such steps out"


def spoil(loss: Tensor) -> Tensor:
    """The loss, with a gradient that is NaN where the loss is not finite; else bit for bit the same gradient."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def describe(seen: list[Seen], step: int, lpl_dtype: str) -> str | None:
    """Says which losses of an optimizer step (counted from 1) are not finite; None: all are. Synchronises.

    Names the first bad micro-batch of this process: its samples and the term, and for a decoder that overflows in
    float16 the option that avoids it.
    """
    for batch, per_sample, lpl in seen:
        bad = (~torch.isfinite(per_sample)).tolist()
        lpl_bad = not bool(torch.isfinite(lpl))
        if any(bad) or lpl_bad:
            chosen = [name for name, is_bad in zip(batch.sample_ids, bad, strict=True) if is_bad or not any(bad)]
            terms = " and ".join(["the diffusion loss"] * any(bad) + ["LPL"] * lpl_bad)
            verb = "were" if any(bad) and lpl_bad else "was"
            return (
                f"{terms} {verb} not finite at step {step} (samples {', '.join(chosen)}){overflow(lpl_bad, lpl_dtype)}"
            )
    return None


def overflow(lpl_bad: bool, lpl_dtype: str) -> str:
    """The hint at LPL's decoder in float16, if LPL failed and its decoder was in float16."""
    if not lpl_bad or lpl_dtype != "float16":
        return ""
    return ": its float16 decoder overflowed; --lpl_dtype bfloat16 or float32 does not overflow"


def dump(
    path: Path, step: int, seen: list[Seen], draw: Callable[[Batch], Any], numbers: dict[str, Any], always: bool
) -> bool:
    """Writes what an optimizer step was computed from (not the weights) to path, and numbers to a JSON beside it.

    Tensors are named <micro-batch>.<name>: raw_latents (B, C, h, w), noise (B, C, h, w), timesteps (B,) (of flow
    matching sigmas), sizes (B, 6), weights (B,), mask (B, 1, h, w), text.<field>, and the losses diffusion_per_sample
    (B,) and lpl. The JSON has, for each micro-batch, its samples as [id, number of the draw]: with the seed they are
    the key of every draw.

    Args:
        draw: gives a batch's noise and timesteps again.
        numbers: what else the JSON gets.
        always: write it however many dumps there are.

    Returns:
        Whether it was written.
    """
    if not always and len(list(path.parent.glob(f"{NONFINITE}*.safetensors"))) >= DUMPS:
        return False
    tensors: dict[str, Tensor] = {}
    samples = []
    for i, (batch, per_sample, lpl) in enumerate(seen):
        drawn = draw(batch)
        own = {"raw_latents": batch.raw_latents, "noise": drawn.noise, "timesteps": drawn.levels}
        own |= batch.extra | {"diffusion_per_sample": per_sample, "lpl": lpl}
        own |= {f"text.{name}": value for name, value in batch.text.items()}
        if batch.weights is not None:
            own["weights"] = batch.weights
        if batch.mask is not None:
            own["mask"] = batch.mask
        tensors |= {f"{i}.{name}": value.detach().cpu().clone().contiguous() for name, value in own.items()}
        samples.append([list(pair) for pair in zip(batch.sample_ids, batch.counts, strict=True)])
    save_file(tensors, path)
    path.with_suffix(".json").write_text(
        json.dumps(numbers | {"step": step, "samples": samples}, indent=1), encoding="utf-8"
    )
    return True
