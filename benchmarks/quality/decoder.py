"""The demo's decoder trained on, on the benchmark's training crops: it was made for 13 photographs.

The encoder stays, so latents are what they were, and denoisers can be trained on them meanwhile. Held-out photographs
are not seen.

    python -m benchmarks.quality.decoder VAE CROPS RESULT CHECKPOINT MINUTES
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image

from lpl.data.sources.base import IMAGE_SUFFIXES
from lpl.demo.pretrain_vae import refine_decoder

SIDE = 64


class Crops:
    """Training images: crops of a folder, whole or a part of them, half of them mirrored."""

    def __init__(self, folder: Path) -> None:
        files = sorted(file for file in folder.iterdir() if file.suffix in IMAGE_SUFFIXES)
        self.images = [Image.open(file).convert("RGB") for file in files]

    def __call__(self, count: int, rng: random.Random) -> list[Image.Image]:
        """So many images of 64 pixels."""
        found = []
        for _ in range(count):
            image = rng.choice(self.images)
            side = rng.randint(SIDE, image.width)
            left, upper = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
            box = (left, upper, left + side, upper + side)
            part = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)
            found.append(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part)
        return found


def main() -> None:
    """Trains what the command line names; the same command goes on from the checkpoint."""
    vae, crops, target, checkpoint, minutes = sys.argv[1:]
    torch.set_num_threads(1)
    found = AutoencoderKL.from_pretrained(vae)
    refine_decoder(found, Path(checkpoint), float(minutes), Crops(Path(crops))).save_pretrained(target)


if __name__ == "__main__":
    main()
