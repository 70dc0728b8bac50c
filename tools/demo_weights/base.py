"""How the shipped base model was made: SDXL's noise prediction on captioned crops, UNet and text encoders together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from tqdm import tqdm

from lpl.demo.architecture import UNET_WIDTHS, build_scheduler, build_text_encoders, build_tokenizers, build_unet
from lpl.demo.photographs import IMAGE_SIZE, all_captions, random_crops, to_tensor, training_crops

from .training_run import TrainingRun

NUM_RANDOM_CROPS = 3000
CAPTION_DROPOUT = 0.1
TIME_IDS = (IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE)  # original size, crop corner, target size


class EncodedCrops(NamedTuple):
    """Crops as the autoencoder's posterior, already in model space, and which caption each has."""

    mean: torch.Tensor
    std: torch.Tensor
    caption: torch.Tensor


@torch.no_grad()
def encode_crops(vae: AutoencoderKL, images: list[Image.Image], numbers: list[int]) -> EncodedCrops:
    """The posteriors of crops of 64 pixels.

    Args:
        vae: the autoencoder, with its scaling factor.
        images: the crops.
        numbers: which caption each has.
    """
    means, stds = [], []
    for start in tqdm(range(0, len(images), 50), desc="encoding crops", mininterval=5.0):
        posterior = vae.encode(to_tensor(images[start : start + 50])).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        stds.append(posterior.std * vae.config.scaling_factor)
    return EncodedCrops(torch.cat(means), torch.cat(stds), torch.tensor(numbers))


class BaseModel(nn.Module):
    """UNet and both text encoders, as one module to train.

    Args:
        captions: all captions that will be used.
        widths: the UNet's widths.
    """

    def __init__(self, captions: tuple[str, ...], widths: tuple[int, int] = UNET_WIDTHS) -> None:
        super().__init__()
        self.unet = build_unet(widths)
        self.text_encoder, self.text_encoder_2 = build_text_encoders(captions)

    def encode_text(self, ids: torch.Tensor, ids_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, 32) of both tokenizers to hidden states (B, 32, 160) and pooled embedding (B, 96)."""
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds

    def forward(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, hidden: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """Predicted noise (B, 16, 8, 8)."""
        time_ids = torch.tensor([TIME_IDS], dtype=torch.float32).expand(len(noisy_latents), -1)
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(noisy_latents, timesteps, hidden, added_cond_kwargs=conditions).sample


def tokenize(captions: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (N, 32) of all captions by the first and the second tokenizer."""
    first, second = (
        tokenizer(
            list(captions),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in build_tokenizers(captions)
    )
    return first, second


def train_base(vae: AutoencoderKL, checkpoint: Path, steps: int) -> BaseModel:
    """Train UNet and text encoders on the demo's fixed crops and 3000 random ones; see fit_base.

    Args:
        vae: the frozen autoencoder.
        checkpoint: file to resume from and to save to.
        steps: how many.
    """
    torch.manual_seed(0)
    captions = tuple(all_captions())
    run = TrainingRun(BaseModel(captions), checkpoint, steps, learning_rate=1e-3, weight_decay=0.01)
    crops = training_crops() + random_crops(NUM_RANDOM_CROPS, random.Random("base"))
    number = {caption: index for index, caption in enumerate(captions)}
    data = encode_crops(vae, [crop.image for crop in crops], [number[crop.caption] for crop in crops])
    return fit_base(run, captions, data)


def fit_base(
    run: TrainingRun[BaseModel], captions: tuple[str, ...], data: EncodedCrops, batch: int = 32, parts: int = 1
) -> BaseModel:
    """Train UNet and text encoders to the run's last step and return the averaged weights.

    Mean squared error of the predicted noise, timesteps uniform; a tenth of the captions is dropped as SDXL's
    pipeline drops an empty prompt: hidden states and pooled embedding are zero.

    Args:
        run: the model's training run.
        captions: all captions.
        data: the crops.
        batch: crops per step.
        parts: number of parts that a step is computed in, one thread each.
    """
    model, alphas_cumprod = run.module, build_scheduler().alphas_cumprod
    ids, ids_2 = tokenize(captions)

    def loss_of(step: int, part: int = 0) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(data.caption), (batch,), generator=generator)
        mean, std = data.mean[chosen], data.std[chosen]
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        kept = (torch.rand(batch, generator=generator) >= CAPTION_DROPOUT).float()
        timesteps = torch.randint(1000, (batch,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        if parts > 1:
            own = slice(part * batch // parts, (part + 1) * batch // parts)
            chosen, latents, kept, timesteps, noise = (
                value[own] for value in (chosen, latents, kept, timesteps, noise)
            )
        unique, place = data.caption[chosen].unique(return_inverse=True)
        hidden, pooled = model.encode_text(ids[unique], ids_2[unique])
        hidden, pooled = hidden[place] * kept[:, None, None], pooled[place] * kept[:, None]
        alpha_cumprod = alphas_cumprod[timesteps][:, None, None, None]
        noisy_latents = alpha_cumprod.sqrt() * latents + (1.0 - alpha_cumprod).sqrt() * noise
        loss = F.mse_loss(model(noisy_latents, timesteps, hidden, pooled), noise)
        return loss * (len(chosen) / batch), {"loss": loss.item()}

    run.fit(loss_of, parts)
    return run.average
