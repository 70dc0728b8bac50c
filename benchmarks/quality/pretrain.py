"""Makes the pipeline that all arms begin with: the VAE, then the denoiser with its text encoders, then its weights.

    python -m benchmarks.quality.pretrain vae FOLDER [STEPS]
    python -m benchmarks.quality.pretrain denoiser FOLDER [STEPS [WEIGHTS]]

FOLDER has data/ and packages/ of the stage fetch. Each goes on from its checkpoint; without one, the denoiser from what
is kept in WEIGHTS, with a new optimizer.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.quality.kept import PARTS, kept_pipeline, read_kept
from benchmarks.quality.pictures import Picture, selected
from lpl.demo.architecture import build_scheduler, build_tokenizers, build_vae
from lpl.demo.photographs import to_tensor
from lpl.demo.pretrain_base import BaseModel, EncodedCrops, encode_crops, fit_base
from lpl.demo.pretrain_vae import fit_vae, reconstruct
from lpl.demo.training_run import TrainingRun
from lpl.demo.weights import load_component
from lpl.errors import UserError
from lpl.families.base import weights_hash

VAE_STEPS = 6_000
DENOISER_STEPS, BATCH, THREADS = 30_000, 64, 2
UNET_WIDTHS = (96, 144)
DENOISER = Path("checkpoints", "denoiser.pt")
LEARNING_RATE = 8e-4


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
    held_out = psnr(trained, [p for p in pictures if p.held_out])
    print(f"scaling factor {1 / std:.4f}, held-out PSNR {held_out.mean():.2f} dB")
    return trained


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: list[Picture], count: int = 512) -> torch.Tensor:
    """PSNR in dB of so many reconstructed views, (count,), for pixels in [0, 1]."""
    images = to_tensor(draw_views(pictures, count, random.Random("psnr")))
    made = torch.cat([reconstruct(vae, batch) for batch in images.split(32)])
    return -10.0 * ((made - images) / 2.0).square().mean((1, 2, 3)).log10()


def train_denoiser(folder: Path, steps: int = DENOISER_STEPS, weights: Path | None = None) -> None:
    """UNet and text encoders on the latents of the training views and their mirror images, at a constant rate.

    Args:
        folder: with vae/ and data/; gets the checkpoint and, in the end, pipeline/.
        steps: of 64 views; more than there have been prolongs the run.
        weights: kept ones that it goes on from where there is no checkpoint.
    """
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    captions = captions_of(folder / "data" / "train")
    data = encoded_views(vae, folder, captions)
    torch.manual_seed(0)
    if (step := trained_steps(folder)) > steps:
        raise UserError(f"{folder / DENOISER}: has been trained for {step} steps, more than {steps}")
    run = TrainingRun(
        BaseModel(captions, UNET_WIDTHS), folder / DENOISER, steps, LEARNING_RATE,
        weight_decay=0.01, ema_decay=0.9995, warmup=1000, save_every=300.0, decay=False,
    )  # fmt: skip
    if weights is not None and run.step == 0:
        go_on_from_kept(run, weights)
    model = fit_base(run, captions, data, BATCH, THREADS)
    write_pipeline(folder / "pipeline", vae, model, captions)


def trained_steps(folder: Path) -> int:
    """Steps of the denoiser's checkpoint; 0 where there is none."""
    file = folder / DENOISER
    return int(torch.load(file, weights_only=True, mmap=True)["step"]) if file.is_file() else 0


def captions_of(folder: Path) -> tuple[str, ...]:
    """The different captions of a folder of views, sorted: the tokenizers are made of them."""
    return tuple(sorted({text for _, text in read_rows(folder)}))


def encoded_views(vae: AutoencoderKL, folder: Path, captions: tuple[str, ...]) -> EncodedCrops:
    """The posteriors of the training views and their mirror images; kept in cache/, of this VAE."""
    rows, number = read_rows(folder / "data" / "train"), {text: index for index, text in enumerate(captions)}
    file, key = folder / "cache" / "views.safetensors", weights_hash(vae, settings=str(len(rows)))
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            if opened.metadata().get("key") == key:
                return EncodedCrops(*(opened.get_tensor(name) for name in EncodedCrops._fields))
    images = [Image.open(view).convert("RGB") for view, _ in rows]
    views = [view for image in images for view in (image, ImageOps.mirror(image))]
    found = encode_crops(vae, views, [number[text] for _, text in rows for _ in range(2)])
    data = EncodedCrops(*(value.contiguous() for value in found))
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(data._asdict(), partial, metadata={"key": key})
    partial.replace(file)
    return data


def go_on_from_kept(run: TrainingRun[BaseModel], weights: Path) -> None:
    """Puts kept weights and their step into a run that has none."""
    kept = read_kept(weights)
    if kept is None or kept["steps"] > run.steps:
        return
    pipeline = kept_pipeline(weights)
    for part in PARTS:
        for model in (run.module, run.average):
            getattr(model, part).load_state_dict(getattr(pipeline, part).state_dict())
    run.step = kept["steps"]


def write_pipeline(folder: Path, vae: AutoencoderKL, model: BaseModel, captions: tuple[str, ...]) -> None:
    """Writes a StableDiffusionXLPipeline of the parts."""
    tokenizer, tokenizer_2 = build_tokenizers(captions)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        text_encoder_2=model.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=model.unet,
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)


def read_rows(folder: Path) -> list[tuple[Path, str]]:
    """Files and captions of a folder of views."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return [(folder / row["file_name"], row["text"]) for row in rows]


def main() -> None:
    """Runs what the command line names."""
    part, folder = sys.argv[1], Path(sys.argv[2])
    steps = [int(argument) for argument in sys.argv[3:4]]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if part == "vae":
        train_vae(selected(folder / "packages"), folder, *steps)
    else:
        train_denoiser(folder, *steps, *map(Path, sys.argv[4:5]))


if __name__ == "__main__":
    main()
