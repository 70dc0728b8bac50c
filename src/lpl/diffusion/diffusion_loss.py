"""The diffusion loss, per sample: mean squared or pseudo-Huber error, weighted by min-SNR where asked.

Source: Ho et al. 2020; min-SNR weighting: Hang et al., ICCV 2023 (arXiv 2303.09556); pseudo-Huber: huber.py.
"""

import torch
from torch import Tensor

from lpl.diffusion.prediction import expand


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str, sigma: Tensor | None = None) -> Tensor:
    """Weight of each sample's loss, (B,), with m = min(SNR, gamma).

        epsilon m / SNR    v_prediction m / (SNR + 1)    sample m    flow m * sigma^2

    Each is m times |do/dx0|^-2: the weight m on the implied x0 error, stated for the model's output.

    Raises:
        ValueError: flow without sigma.
    """
    m = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        # SNR = 0 (a zero-terminal schedule) carries no signal: weight 1, the limit of m / SNR.
        return torch.where(snr > 0, m / snr.clamp_min(torch.finfo(snr.dtype).tiny), torch.ones_like(snr))
    if prediction_type == "v_prediction":
        return m / (snr + 1)
    if prediction_type == "sample":
        return m
    if sigma is None:
        raise ValueError("min-SNR weighting of a flow model needs sigma")
    return m * sigma.square()


def diffusion_loss(
    model_output: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    huber_c: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """weight_i * mean(f(model_output_i - target_i)), (B,), in float32, for tensors (B, C, ...).

    f(d) = d^2, or with huber_c, (B,) and above 0:    f(d) = 2 c (sqrt(d^2 + c^2) - c)

    With a mask m, (B, 1, ...) in [0, 1], the mean is sum(m f) / (C sum(m)), as LPL's is at each layer: however small
    the marked part, it has the gradient of a whole image, and LPL keeps its share. 0 where the mask is 0 everywhere.
    Differs from kohya-ss/sd-scripts and OneTrainer's default, which divide by the whole area.
    """
    square = (model_output.float() - target.float()).square()
    if huber_c is not None:
        c = expand(huber_c.to(square.dtype), square)
        # 2 c (sqrt(d^2 + c^2) - c) without its cancellation where d is small
        square = 2 * c * square / ((square + c.square()).sqrt() + c)
    if mask is None:
        loss = square.flatten(1).mean(1)
    else:
        counted = (mask.to(square.dtype) * square).flatten(1).sum(1)
        total = square.shape[1] * mask.to(square.dtype).flatten(1).sum(1)
        loss = counted / torch.where(total > 0, total, 1)
    return loss if weight is None else loss * weight.to(loss)
