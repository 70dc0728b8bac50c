"""The pictures of docs/how_it_works.md, made with the demo's model and one of its photographs.

    python benchmarks/loss_pictures.py

Draws docs/loss_errors.png (errors of one size in a channel of the latent each, decoded), docs/loss_estimates.png (what
the model's output implies for the clean latent, by noise level, decoded) and docs/loss_features.png (what LPL compares
of one of these at each tap of the decoder). Prints the numbers for their captions.
"""

import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler

from lpl import LatentPerceptualLoss
from lpl.analysis.check.maps import heat, layer_maps
from lpl.analysis.check.precision import to_image
from lpl.data.contact_sheet import GREY, INK, Cell, compose, fit
from lpl.demo.photographs import to_tensor, training_crops
from lpl.demo.weights import load_pipeline
from lpl.diffusion.prediction import add_noise, x0_from_output
from lpl.diffusion.schedule import schedule_of
from lpl.perceptual.gate import Gate

sys.path.insert(0, str(Path(__file__).parent))
from loss_cost import DOCS

PHOTOGRAPH = "chelsea"
TIMESTEPS = (100, 300, 500, 650, 800, 950)
MAPPED = 300
"""The timestep of the estimate in docs/loss_features.png."""
ERROR = 0.5
"""Standard deviation of the error added to one channel; that of the latents is about 1."""


def picture(pixels):
    """(1, 3, H, W) in [-1, 1] as a cell's picture."""
    return fit(to_image(pixels[0]))


def draw_errors(vae, loss_fn, latents, noise):
    """The same noise in one channel at a time: the decoded image, and LPL."""
    decoded, found = loss_fn.latent_space.to_raw, []
    clean = vae.decode(decoded(latents)).sample
    for channel in range(latents.shape[1]):
        wrong = latents.clone()
        wrong[:, channel] += ERROR * noise[:, 0]
        pixels = vae.decode(decoded(wrong)).sample
        found.append(
            (float(loss_fn(wrong, latents).per_sample), float((pixels - clean).square().mean()), channel, pixels)
        )
    found.sort(key=lambda each: each[0])
    cells = [Cell(picture(clean), [("no error", INK), ("the decoded latent", GREY)])]
    for lpl, squared, channel, pixels in (found[0], found[len(found) // 2], found[-1]):
        lines = [(f"error in channel {channel}", INK), (f"LPL {lpl:.3f}, pixels {squared:.4f}", GREY)]
        cells.append(Cell(picture(pixels), lines))
    print(f"errors: LPL {found[-1][0] / found[0][0]:.1f} times, pixels {found[-1][1] / found[0][1]:.1f} times")
    about = "The same noise, in another channel of the latent each: one squared error of latents, three of features."
    return compose("Errors that a loss on latents cannot tell apart", about, cells, 4)


def draw_estimates(pipeline, loss_fn, image, latents, noise, conditions):
    """The estimates at TIMESTEPS, and the one at MAPPED."""
    schedule = schedule_of(DDPMScheduler.from_config(pipeline.scheduler.config))
    gate, to_raw, mapped = Gate(schedule), loss_fn.latent_space.to_raw, latents
    clean = pipeline.vae.decode(to_raw(latents)).sample
    cells = [Cell(picture(image), [("photograph", INK)])]
    cells.append(Cell(picture(clean), [("target", INK), ("its latent, decoded", GREY)]))
    for t in TIMESTEPS:
        timestep = torch.tensor([t])
        alpha, sigma = (x.float() for x in schedule.alpha_sigma(timestep))
        noisy = add_noise(latents, noise, alpha, sigma)
        estimate = x0_from_output(pipeline.unet(noisy, timestep, **conditions).sample, noisy, alpha, sigma, "epsilon")
        mapped = estimate if t == MAPPED else mapped
        passes = "LPL applies" if bool(gate.table[t]) else "left out by the gate"
        lpl = float(loss_fn(estimate, latents).per_sample)
        lines = [(f"t = {t}, noise/signal {float(sigma / alpha):.2f}", INK), (f"LPL {lpl:.3f}; {passes}", GREY)]
        cells.append(Cell(picture(pipeline.vae.decode(to_raw(estimate)).sample), lines))
    about = "What the model's output implies for the clean latent, decoded, from more and more noise."
    return compose("Estimates of the clean latent", about, cells, 4), mapped


def draw_features(loss_fn, estimate, latents):
    """One row per tap: lengths of target's and estimate's features, distance, mask."""
    cells = []
    for maps in layer_maps(loss_fn, estimate, latents):
        top, most = float(maps.target.max()), float(maps.distance.max())
        height, width = maps.target.shape
        densest = float(maps.outliers.max())
        masked = f"{float(maps.outliers.mean()):.2%}; bright: {densest:.0%} of channels" if densest else "none"
        cells += [
            Cell(fit(heat(maps.target, top)), [(f"{maps.tap}: target", INK), (f"{height} x {width} cells", GREY)]),
            Cell(fit(heat(maps.prediction, top)), [("estimate", INK), ("the same scale", GREY)]),
            Cell(fit(heat(maps.distance, most)), [("distance", INK), (f"{float(maps.distance.sum()):.3f}", GREY)]),
            Cell(fit(heat(maps.outliers, densest or 1.0)), [("masked as outliers", INK), (masked, GREY)]),
        ]
    about = (
        f"t = {MAPPED}. A row a tap: lengths of the feature vectors, what each place adds to the distance, the mask."
    )
    return compose("What LPL compares", about, cells, 4)


@torch.no_grad()
def main():
    pipeline = load_pipeline()
    loss_fn = LatentPerceptualLoss(pipeline.vae)
    crop = next(crop for crop in training_crops() if crop.photograph == PHOTOGRAPH)
    image = to_tensor([crop.image])
    latents = loss_fn.latent_space.from_raw(pipeline.vae.encode(image).latent_dist.mean)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    embeds, _, pooled, _ = pipeline.encode_prompt([crop.caption], do_classifier_free_guidance=False)
    height, width = image.shape[-2:]
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[height, width, 0, 0, height, width]]).float()}
    conditions = {"encoder_hidden_states": embeds, "added_cond_kwargs": added}
    draw_errors(pipeline.vae, loss_fn, latents, noise).save(DOCS / "loss_errors.png")
    sheet, estimate = draw_estimates(pipeline, loss_fn, image, latents, noise, conditions)
    sheet.save(DOCS / "loss_estimates.png")
    draw_features(loss_fn, estimate, latents).save(DOCS / "loss_features.png")


if __name__ == "__main__":
    main()
