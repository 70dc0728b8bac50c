"""CLIP score: how near an image is to its prompt, in a CLIP network's eyes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lpl.config import require
from lpl.errors import UserError
from lpl.evaluation.features import load_pretrained


class ClipScore:
    """100 * max(cos(image embedding, text embedding), 0) of each pair; long prompts are cut to the network's length.

    Source: Hessel et al. 2021 (arXiv 2104.08718), section 3, whose factor is 2.5: with 100, as torchmetrics and others
    report it. Figures of different networks cannot be compared.

    Args:
        name: a folder or Hub id.
        device: where it runs.

    Raises:
        UserError: it cannot be loaded, or is no CLIP.
    """

    def __init__(self, name: str, device: torch.device | None = None) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        self.device = device or torch.device("cpu")
        self.network: Any = load_pretrained(CLIPModel, "--clip", name)
        require(self.network.config.model_type == "clip", f"--clip {name}: a {self.network.config.model_type}, no CLIP")
        self.network.to(self.device).float().eval().requires_grad_(False)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.processor = CLIPImageProcessorPil.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--clip {name}: {' '.join(str(error).split())[:300]}") from error

    @torch.no_grad()
    def __call__(self, images: Iterable[Tensor], texts: Sequence[str]) -> Tensor:
        """Scores (N,), float64.

        Args:
            images: batches (B, 3, H, W), uint8; N images in all.
            texts: N of them.
        """
        found, at = [], 0
        for batch in images:
            pictures = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in batch]
            pixels = self.processor(images=pictures, return_tensors="pt").pixel_values.to(self.device)
            tokens = self.tokenizer(
                list(texts[at : at + len(batch)]),
                padding=True,
                truncation=True,
                max_length=self.network.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            output = self.network(**tokens, pixel_values=pixels)
            cosine = (output.image_embeds * output.text_embeds).sum(-1)  # both have length 1
            found.append(100 * cosine.double().clamp(min=0).cpu())
            at += len(batch)
        return torch.cat(found)
