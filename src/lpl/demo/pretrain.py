"""Make the shipped weights again: `python -m lpl.demo.pretrain vae`, then `python -m lpl.demo.pretrain base`.

Both resume from their checkpoint; with `--minutes 0` they only write the weights of the checkpoint as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lpl.demo.architecture import build_vae
from lpl.demo.pretrain_base import train_base
from lpl.demo.pretrain_vae import held_out_psnr, latent_std, train_vae
from lpl.demo.weights import load_component, save_component, shipped_scaling_factor


def make_vae(checkpoint: Path, minutes: float) -> None:
    """Train the autoencoder, write its weights and say its held-out PSNR."""
    trained = train_vae(checkpoint, minutes)
    scaling_factor = 1.0 / latent_std(trained)
    path = save_component("vae", trained, {"scaling_factor": f"{scaling_factor:.6f}"})
    shipped = build_vae().eval()
    load_component("vae", shipped)
    psnr = held_out_psnr(shipped)
    print(f"{path}: scaling factor {scaling_factor:.4f}, held-out PSNR {psnr.mean():.2f} dB (worst {psnr.min():.2f})")


def make_base(checkpoint: Path, minutes: float) -> None:
    """Train UNet and text encoders on the shipped autoencoder's latents and write their weights."""
    vae = build_vae(shipped_scaling_factor()).requires_grad_(False).eval()
    load_component("vae", vae)
    model = train_base(vae, checkpoint, minutes)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        print(save_component(name, getattr(model, name)))


def main(argv: list[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m lpl.demo.pretrain", description=__doc__)
    parser.add_argument("part", choices=("vae", "base"))
    parser.add_argument("--minutes", type=float, help="budget of training time; 36 for vae, 55 for base")
    parser.add_argument("--checkpoints", type=Path, default=Path("demo_checkpoints"), help="folder of checkpoints")
    arguments = parser.parse_args(argv)
    make, minutes = {"vae": (make_vae, 36.0), "base": (make_base, 55.0)}[arguments.part]
    make(arguments.checkpoints / f"{arguments.part}.pt", minutes if arguments.minutes is None else arguments.minutes)


if __name__ == "__main__":
    main()
