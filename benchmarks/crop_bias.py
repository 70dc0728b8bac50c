"""The bias of lpl_crop: the mean gradient over many windows against the whole image's, on the demo's trained decoder.

    python benchmarks/crop_bias.py [windows]

Also on SDXL's shape with random weights. bias: |mean over windows - whole| / |whole|, without the sampling error of the
mean (estimated from two halves); cosine: between the two; spread: |one window's gradient - mean| / |whole|, on average.
"""

import sys
from pathlib import Path

import torch

from lpl import LatentPerceptualLoss
from lpl.demo.weights import load_pipeline

sys.path.insert(0, str(Path(__file__).parent))
from loss_cost import sdxl_vae

CELLS = 16


def bias(vae, crop, windows):
    """Relative bias, cosine and spread of the gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, vae.config.latent_channels, CELLS, CELLS)
    target = torch.randn(shape, generator=generator)
    pred = (target + 0.3 * torch.randn(shape, generator=generator)).requires_grad_()
    whole = LatentPerceptualLoss(vae)(pred, target).gradient
    cropped = LatentPerceptualLoss(vae, crop=crop)
    places = torch.rand(windows, 2, generator=generator)
    each = torch.stack([cropped(pred, target, windows=p[None]).gradient for p in places])
    mean, size = each.mean(0), whole.norm()
    halves = [half.mean(0) - whole for half in each.chunk(2)]
    squared = (halves[0] * halves[1]).sum().clamp(min=0)  # the noise of the two is independent
    cosine = torch.cosine_similarity(mean.flatten(), whole.flatten(), 0)
    return squared.sqrt() / size, cosine, (each - mean).flatten(1).norm(dim=1).mean() / size


def main(windows=200):
    print("| decoder | window of the image | bias | cosine | spread |\n|---|---|---|---|---|")
    for name, vae in {"the demo's, trained": load_pipeline().vae, "SDXL's shape, random": sdxl_vae("cpu")}.items():
        for crop in (96, 64, 32):
            found = bias(vae, crop, windows if "demo" in name else windows // 5)
            print(f"| {name} | {crop} of {8 * CELLS} px | {' | '.join(f'{v:.2f}' for v in found)} |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
