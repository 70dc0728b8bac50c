"""Makes the pipeline that all arms begin with: the VAE, then the denoiser with its text encoders, then its weights.

    python -m benchmarks.quality.pretrain vae FOLDER
    python -m benchmarks.quality.pretrain denoiser FOLDER

FOLDER has data/ and packages/ of the stage fetch. Each goes on from its checkpoint.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps

from benchmarks.quality.pictures import Picture, selected
from lpl.demo.architecture import build_vae
from lpl.demo.photographs import to_tensor
from lpl.demo.pretrain_vae import fit_vae, reconstruct
from lpl.demo.training_run import TrainingRun
from lpl.demo.weights import load_component

VAE_STEPS = 6_000


def draw_views(pictures: list[Picture], count: int, rng: random.Random) -> list[Image.Image]:
    """Views of pictures, half of them mirrored; a photograph is drawn three times as often as a drawing."""
    weights = [1 if p.whole else 3 for p in pictures]
    views = [p.view(rng)[0] for p in rng.choices(pictures, weights, k=count)]
    return [ImageOps.mirror(view) if rng.random() < 0.5 else view for view in views]


def train_vae(pictures: list[Picture], folder: Path, steps: int = VAE_STEPS) -> AutoencoderKL:
    """The VAE, encoder too, from the demo's weights on; its latents' scale is measured anew.

    Args:
        pictures: of which the training ones are used.
        folder: gets the checkpoint and, in the end, vae/.
        steps: of 8 views.
    """
    training = [p for p in pictures if not p.held_out]
    vae = build_vae()
    load_component("vae", vae)
    torch.manual_seed(0)
    run = TrainingRun(vae, folder / "checkpoints" / "vae.pt", steps, learning_rate=1e-3)
    trained = fit_vae(run, True, lambda count, rng: draw_views(training, count, rng))
    with torch.no_grad():
        views = [to_tensor(draw_views(training, 16, random.Random(f"latent std {i}"))) for i in range(32)]
        std = torch.cat([trained.encode(batch).latent_dist.mode() for batch in views]).std().item()
    trained.register_to_config(scaling_factor=1.0 / std)
    trained.save_pretrained(folder / "vae")
    print(f"scaling factor {1 / std:.4f}, held-out PSNR {psnr(trained, [p for p in pictures if p.held_out]).mean():.2f} dB")
    return trained


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: list[Picture], count: int = 512) -> torch.Tensor:
    """PSNR in dB of so many reconstructed views, (count,), for pixels in [0, 1]."""
    images = to_tensor(draw_views(pictures, count, random.Random("psnr")))
    made = torch.cat([reconstruct(vae, batch) for batch in images.split(32)])
    return -10.0 * ((made - images) / 2.0).square().mean((1, 2, 3)).log10()


def main() -> None:
    """Runs what the command line names."""
    part, folder = sys.argv[1], Path(sys.argv[2])
    if part == "vae":
        train_vae(selected(folder / "packages"), folder)


if __name__ == "__main__":
    main()
