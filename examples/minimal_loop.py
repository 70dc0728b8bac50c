"""A whole training loop with the Latent Perceptual Loss, on the small SDXL that the package ships.

    lpl demo --export_model model && lpl demo --export_data data
    python examples/minimal_loop.py model data

Read it top to bottom: load, encode, draw, predict, diffusion loss, LPL (three lines, marked), step. It works the same
for any diffusers model whose VAE is an AutoencoderKL.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image

from lpl import LatentPerceptualLoss, PerceptualObjective

STEPS, BATCH, LEARNING_RATE, SEED = 50, 8, 1e-4, 0


def load_data(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Images (N, 3, H, W) in [-1, 1] and their captions, from an image folder with metadata.jsonl."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [np.asarray(Image.open(folder / line["file_name"]).convert("RGB")) for line in lines]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1, [line["text"] for line in lines]


def main(model: str, data: str) -> None:
    torch.manual_seed(SEED)
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, use_safetensors=True, add_watermarker=False)
    unet, vae = pipeline.unet.train(), pipeline.vae.eval().requires_grad_(False)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

    # Encode once: latents in model space, embeddings of both text encoders.
    images, captions = load_data(Path(data))
    with torch.no_grad():
        encoded = [vae.encode(batch).latent_dist.mean for batch in images.split(16)]
        latents_all = torch.cat(encoded) * vae.config.scaling_factor
        embeds_all, _, pooled_all, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    height, width = images.shape[-2:]
    sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(BATCH, -1)

    # LPL, 1 and 2: the loss on the frozen decoder, and the term with its gate, weight and scale.
    loss_fn = LatentPerceptualLoss(vae)
    objective = PerceptualObjective(loss_fn, scheduler, lpl_weight="auto", lpl_sigma_threshold=3.0)

    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        index = torch.randint(len(captions), (BATCH,))
        latents, noise = latents_all[index], torch.randn_like(latents_all[index])
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,))
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        conditions = {"text_embeds": pooled_all[index], "time_ids": sizes}
        model_output = unet(noisy_latents, timesteps, embeds_all[index], added_cond_kwargs=conditions).sample

        diffusion_loss = torch.nn.functional.mse_loss(model_output, noise)
        # LPL, 3: add the term. `diffusion_loss` is what "auto" measures its weight against.
        lpl = objective(model_output, noisy_latents, latents, timesteps, diffusion_loss=diffusion_loss)
        (diffusion_loss + lpl.loss).backward()

        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        objective.end_step()
        if step % 10 == 0:
            metrics = lpl.read()  # an error where LPL's gradient is exactly 0
            print(
                f"step {step}: diffusion {diffusion_loss.item():.4f}, weighted LPL {metrics['lpl/weighted_loss']:.4f}"
            )

    pipeline.save_pretrained("minimal-loop-output")
    print("saved to minimal-loop-output")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/minimal_loop.py MODEL_FOLDER DATA_FOLDER")
    main(sys.argv[1], sys.argv[2])
