"""The weight of LPL, set from measured gradients instead of guessed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MEASURED_SAMPLES = 256
"""Gated samples after which the weight is fixed."""


def weight_of_share(target_share: float, lpl_square: Tensor, diffusion_square: Tensor) -> Tensor:
    """share / (1 - share) * sqrt(diffusion_square / lpl_square), of any shape: the weight that gives LPL this share.

    Args:
        target_share: in (0, 1).
        lpl_square, diffusion_square: mean (or summed) squared gradients at the model's output, LPL's at weight 1; the
            weight is 0 where LPL's is 0.
    """
    odds = target_share / (1 - target_share)
    return torch.where(lpl_square > 0, odds * (diffusion_square / lpl_square).sqrt(), 0.0)


class AutoWeight:
    """The weight at which LPL has a target share of the gradient at the denoiser's output.

    With r = sqrt(mean over all samples of |d(term)/d(model_output)|^2), reduction included, and the share
    r_lpl / (r_lpl + r_diffusion):    weight = share / (1 - share) * r_diffusion / r_lpl(weight 1).

    Measured over the first 256 gated samples of the run. Until then the weight of an optimizer step is the estimate
    from the steps before it (0 before the first gated sample); after that it is fixed and belongs in the checkpoint.

    Args:
        target_share: in (0, 1).
    """

    def __init__(self, target_share: float) -> None:
        self.target_share = target_share
        self.weight: Tensor | float = 0.0
        self.fixed = False
        self.measured = 0
        self._squares: Tensor | None = None
        self._step_squares: Tensor | None = None
        self._step_samples = 0

    def measure(self, lpl_square: Tensor, diffusion_square: Tensor, gated: int) -> None:
        """Adds one micro-batch.

        Args:
            lpl_square, diffusion_square: squared gradients at the model's output of LPL at weight 1 and of the
                diffusion loss, each sample's of its own loss, summed over the micro-batch.
            gated: its gated samples.

        Raises:
            RuntimeError: end_step() was never called.
        """
        if self.fixed:
            return
        pair = torch.stack([lpl_square, diffusion_square]).float().detach()
        self._step_squares = pair if self._step_squares is None else self._step_squares + pair
        self._step_samples += gated
        if self._step_samples > 64 * MEASURED_SAMPLES:
            raise RuntimeError("lpl_weight 'auto' needs objective.end_step() after each optimizer step")

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Takes over what the finished optimizer step measured.

        Args:
            reduce: sums a tensor over processes; needed where there are several.
        """
        if self.fixed or self._step_squares is None:
            return
        squares, samples = self._step_squares, self._step_samples
        if reduce is not None:
            summed = reduce(torch.cat([squares, squares.new_tensor([samples])]))
            squares, samples = summed[:2], int(summed[2])
        self._squares = squares if self._squares is None else self._squares.to(squares) + squares
        self.measured += samples
        self._step_squares, self._step_samples = None, 0
        lpl, diffusion = self._squares.unbind()
        self.weight = weight_of_share(self.target_share, lpl, diffusion).float()
        if self.measured >= MEASURED_SAMPLES:
            self.weight, self.fixed = float(self.weight), True

    def discard_step(self) -> None:
        """Forgets what the optimizer step under way has measured; instead of end_step() where the step is left out."""
        self._step_squares, self._step_samples = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {
            "weight": float(self.weight),
            "fixed": self.fixed,
            "measured": self.measured,
            "squares": None if self._squares is None else self._squares.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what state_dict gave."""
        self.fixed, self.measured = bool(state["fixed"]), int(state["measured"])
        self.weight = float(state["weight"])
        squares = state["squares"]
        self._squares = None if squares is None else torch.tensor(squares, dtype=torch.float32)
