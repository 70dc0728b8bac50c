"""What LPL costs on an SDXL-shaped decoder, counted: FLOPs in plain decodes, bytes that autograd keeps.

    python benchmarks/loss_cost.py [pixels]

Runs on the meta device: no weights, no arithmetic, the same figures everywhere.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from lpl import LatentPerceptualLoss
from lpl.analysis.memory import count_saved_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from textbook_lpl import textbook_lpl

WIDTHS = (128, 256, 512, 512)


def main(pixels: int) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=WIDTHS,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
        )
        latents = torch.empty(1, 4, pixels // 8, pixels // 8)
    vae.eval().requires_grad_(False)
    weights = list(vae.parameters())
    with FlopCounterMode(display=False) as plain:
        vae.decode(latents)
    decode = plain.get_total_flops()
    print(f"{pixels} px, one sample; a plain decode is {decode / 1e12:.3f} TFLOP\n")
    print("| way | FLOPs, in plain decodes | saved for backward |\n|---|---|---|")
    for checkpointing in (False, True):
        ways = {
            "textbook": lambda pred, c=checkpointing: (
                textbook_lpl(vae, pred, latents, checkpointing=c).sum().backward()
            ),
            "lpl": lambda pred, c=checkpointing: (
                LatentPerceptualLoss(vae, checkpointing=c)(pred, latents).per_sample.sum().backward()
            ),
        }
        for name, run in ways.items():
            pred = torch.empty_like(latents).requires_grad_()
            with FlopCounterMode(display=False) as counter:
                saved = count_saved_bytes(lambda run=run, pred=pred: run(pred), weights)
            suffix = ", checkpointing" if checkpointing else ""
            print(f"| {name}{suffix} | {counter.get_total_flops() / decode:.2f} | {saved / 2**20:.0f} MiB |")
    gated_out = LatentPerceptualLoss(vae, num_blocks=0)
    with FlopCounterMode(display=False) as counter:
        gated_out(torch.empty_like(latents).requires_grad_(), latents).per_sample.sum().backward()
    print(f"| lpl, num_blocks 0 | {counter.get_total_flops() / decode:.2f} | |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
