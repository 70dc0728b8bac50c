"""Both arms' UNets of one reported seed and the decoder, in half precision beside this file, for anyone to resample.

python -m benchmarks.quality.kept baseline FOLDER    # or lpl: an ordinary pipeline, for lpl eval and diffusers
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "weights"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def keep(run: Path, arm: str, folder: Path) -> None:
    """Writes the UNet of a run's result, and its VAE's decoder.

    Args:
        run: folder of a finished run.
        arm: names the UNet's file.
        folder: where to.
    """
    folder.mkdir(exist_ok=True)
    unet, vae = (load_file(run / part / WEIGHTS) for part in ("unet", "vae"))
    decoder = {name: value for name, value in vae.items() if name.startswith(("decoder.", "post_quant_conv."))}
    for name, weights in ((arm, unet), ("decoder", decoder)):
        halves = {key: value.to(torch.float16).contiguous() for key, value in weights.items()}
        save_file(halves, folder / f"{name}.safetensors", metadata={"format": "pt"})


def kept_pipeline(arm: str, folder: Path = FOLDER) -> StableDiffusionXLPipeline:
    """lpl.demo's pipeline, float32, with an arm's UNet and the benchmark's decoder."""
    from lpl.demo.weights import load_pipeline

    pipeline = load_pipeline()
    unet, decoder = (load_file(folder / f"{name}.safetensors") for name in (arm, "decoder"))
    pipeline.unet.load_state_dict({name: value.float() for name, value in unet.items()})
    found = pipeline.vae.load_state_dict({name: value.float() for name, value in decoder.items()}, strict=False)
    assert not found.unexpected_keys
    return pipeline


if __name__ == "__main__":
    kept_pipeline(sys.argv[1]).save_pretrained(sys.argv[2])
