"""Multi-resolution noise: white noise plus coarser and coarser noise, scaled to unit variance."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lpl.diffusion.draws import keyed_generator, keyed_uniform


def pyramid_noise(noise: Tensor, iterations: int, discount: float, *key: int | str) -> Tensor:
    """Adds `iterations` levels of coarser noise to one sample's white noise.

        n = noise + sum_i discount^i * upsample(normal(C, h / r_i^i, w / r_i^i))    r_i uniform in [2, 4), i = 0, 1, ...
        n / std(n)

    It ends at the first level with a side of one cell. Level 0 has the full resolution, as kohya's has.

    Source: J. Whitaker, "Multi-Resolution Noise for Diffusion Model Training" (2023), as kohya-ss/sd-scripts'
    --multires_noise_iterations does it. Differs from kohya: the standard deviation is a sample's own, not the
    batch's, and draws are keyed, so the noise of a sample does not depend on the batch it is in.

    Args:
        noise: (C, h, w), standard normal, float32, on the CPU.
        iterations: levels at most.
        discount: factor from one level to the next, in (0, 1].
        key: of the draws, such as (seed, "pyramid", sample_id, count).

    Returns:
        (C, h, w), float32, of standard deviation 1.
    """
    channels, height, width = noise.shape
    total = noise.clone()
    for level in range(iterations):
        ratio = (2 + 2 * keyed_uniform(*key, "ratio", level)) ** level
        size = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = torch.randn((1, channels, *size), generator=keyed_generator(*key, level), dtype=torch.float32)
        total += interpolate(coarse, (height, width), mode="bilinear")[0] * discount**level
        if min(size) == 1:
            break
    return total / total.std()
