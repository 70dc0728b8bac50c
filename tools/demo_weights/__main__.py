"""Make the shipped weights again: `python -m tools.demo_weights vae`, then `decoder` and `base` in either order.

Each part resumes from its checkpoint; with `--steps 0` it only writes the checkpoint's weights.

The shipped weights took two shared processor cores: vae 45 minutes (4,160 steps, the first 2,420 with batches of 16
crops that were also turned and recoloured), decoder 36 minutes (5,040 steps) and base 57 minutes (7,680 steps, the
first 1,900 on latents of the half-trained autoencoder).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from lpl.demo.architecture import build_vae
from lpl.demo.weights import WEIGHTS_FOLDER, load_component, shipped_scaling_factor

from .base import train_base
from .vae import held_out_psnr, latent_std, refine_decoder, train_vae


def save_component(name: str, module: nn.Module, metadata: dict[str, str] | None = None) -> Path:
    """Write one network's weights, rounded to bfloat16, into the package; "vae" needs its "scaling_factor"."""
    path = WEIGHTS_FOLDER / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    tensors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in module.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt", **(metadata or {})})
    partial.replace(path)
    return path


def _load_vae() -> AutoencoderKL:
    vae = build_vae(shipped_scaling_factor()).eval()
    load_component("vae", vae)
    return vae


def _save_vae(vae: AutoencoderKL, scaling_factor: float) -> None:
    path = save_component("vae", vae, {"scaling_factor": f"{scaling_factor:.6f}"})
    psnr = held_out_psnr(_load_vae())
    print(f"{path}: scaling factor {scaling_factor:.4f}, held-out PSNR {psnr.mean():.2f} dB (worst {psnr.min():.2f})")


def make_vae(checkpoint: Path, steps: int) -> None:
    """Train the autoencoder, write its weights and print its held-out PSNR."""
    vae = train_vae(checkpoint, steps)
    _save_vae(vae, 1.0 / latent_std(vae))


def make_decoder(checkpoint: Path, steps: int) -> None:
    """Continue training the shipped autoencoder's decoder and write it; the latents do not change."""
    _save_vae(refine_decoder(_load_vae(), checkpoint, steps), shipped_scaling_factor())


def make_base(checkpoint: Path, steps: int) -> None:
    """Train UNet and text encoders on the shipped autoencoder's latents and write their weights."""
    model = train_base(_load_vae(), checkpoint, steps)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        print(save_component(name, getattr(model, name)))


PARTS = {"vae": (make_vae, 4160), "decoder": (make_decoder, 5040), "base": (make_base, 7680)}


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_weights", description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--steps", type=int, help="over all resumed calls")
    parser.add_argument("--checkpoints", type=Path, default=Path("demo_checkpoints"), help="folder of checkpoints")
    arguments = parser.parse_args(argv)
    make, steps = PARTS[arguments.part]
    make(arguments.checkpoints / f"{arguments.part}.pt", steps if arguments.steps is None else arguments.steps)


if __name__ == "__main__":
    main()
