"""The control arm: LPL's place in the objective, gate, scale, reduction and share, but a plain distance of latents.

    L_i = mean over channels and locations of (x0_hat_i - x0_i)^2

If it does as well as LPL, then it is LPL's weighting of noise levels that helps, and not the decoder's features.

    python -m benchmarks.quality.control [the options of lpl train]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from lpl.cli import parse_train
from lpl.errors import StopRequestedError, TrainingStoppedError, UserError
from lpl.perceptual.forward_gradient import WithGradient
from lpl.perceptual.loss import LPLOutput
from lpl.training.checkpoint import full_disk
from lpl.training.preflight import preflight
from lpl.training.stopping import stoppable


class LatentSquaredDistance:
    """The squared distance of latents, called as a LatentPerceptualLoss is; its one "layer" is the latent."""

    reach = None
    crop = None

    def __call__(
        self,
        pred_latents: Tensor,
        target_latents: Tensor,
        mask: Tensor | None = None,
        *,
        depth: int | None = None,
        windows: Tensor | None = None,
    ) -> LPLOutput:
        """Compares two batches of latents.

        Args:
            pred_latents, target_latents: (B, C, h, w), model space; gradients flow into the first alone.
            mask, depth, windows: not taken.

        Raises:
            ValueError: shapes that differ, or one of the options that are not taken.
        """
        if pred_latents.shape != target_latents.shape:
            raise ValueError(f"latents of one shape, not {pred_latents.shape} and {target_latents.shape}")
        if mask is not None or depth is not None or windows is not None:
            raise ValueError("this distance takes no mask, depth or windows")
        with_gradient = torch.is_grad_enabled() and pred_latents.requires_grad
        with torch.no_grad():
            target = target_latents.float()
            difference = pred_latents.float() - target
            per_sample = difference.square().mean((1, 2, 3))
            gradient = 2 * difference / difference[0].numel() if with_gradient else None
            mean, std = target.mean((1, 2, 3)), target.flatten(1).std(1)
        detached = per_sample
        if gradient is not None:
            per_sample = WithGradient.apply(pred_latents, per_sample, gradient)
        zero = torch.zeros_like(detached)
        return LPLOutput(
            per_sample, {"latent": detached}, {"latent": zero}, {"latent": mean}, {"latent": std}, gradient
        )


def train_control(argv: list[str]) -> None:
    """A run of `lpl train` whose perceptual distance is LatentSquaredDistance.

    Raises:
        UserError: bad options.
        TrainingStoppedError, StopRequestedError: as lpl.training.trainer.train.
    """
    config = parse_train(argv)
    if not config.lpl.use_lpl:
        raise UserError("--no_use_lpl: the control takes LPL's place, so it needs --use_lpl")
    if config.lpl.lpl_random_depth or config.lpl.lpl_crop is not None:
        raise UserError("--lpl_random_depth and --lpl_crop act on a decoder, which the control has not: drop them")
    checked = preflight(config)
    if checked.has_ended:
        return
    from lpl.training.trainer import Trainer

    with stoppable(config.run.max_minutes) as stop, full_disk(Path(config.run.output_dir)):
        trainer = Trainer(checked.config, checked, stop)
        assert trainer.objective is not None
        trainer.objective.loss_fn = LatentSquaredDistance()  # type: ignore[assignment]
        trainer.fit()
        trainer.finish()


def main() -> int:
    """The exit code: those of `lpl train`."""
    try:
        train_control(sys.argv[1:])
    except (UserError, TrainingStoppedError, StopRequestedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return {UserError: 2, TrainingStoppedError: 3, StopRequestedError: 4}[type(error)]
    return 0


if __name__ == "__main__":
    sys.exit(main())
