"""What each family's denoise() hands to its denoiser lies on the latents' device, and the host waits for none of it."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stand_in import DEVICE, stand_in
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lpl.families.lumina2 import CaptionMask

CHANNELS = {"sd": 4, "sdxl_networks": 4, "flux2": 32, "sana": 32}
"""Of latents; of all others 16."""


class Denoiser:
    """Gives back the latents that it is given, and keeps all of it."""

    config = SimpleNamespace(guidance_embeds=True, timestep_scale=1.0)
    gradient_checkpointing = False

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.given = [*given, *named.values()]
        return (self.given[0],)


def text_of(batch: int) -> dict[str, Any]:
    """Every field that a family may have, of captions of two lengths."""
    embeds = torch.empty(batch, 32, 8, device=DEVICE)
    pooled = torch.empty(batch, 8, device=DEVICE)
    mask = torch.ones(batch, 32, dtype=torch.long, device=DEVICE)
    named = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "pooled": pooled, "prompt_attention_mask": mask}
    return named | {"lengths": np.array([7, 32])}


@pytest.mark.parametrize(
    "family",
    ["sd", "sdxl_networks", "sd3", "flux", "chroma", "flux2", "qwenimage", "zimage", "lumina2", "sana", "auraflow"],
)
def test_nothing_is_waited_for(family: str) -> None:
    denoise = importlib.import_module(f"lpl.families.{family}").denoise
    denoiser, text, extra = Denoiser(), text_of(2), {"sizes": torch.empty(2, 6, device=DEVICE)}
    latents, levels = torch.empty(2, CHANNELS.get(family, 16), 8, 8, device=DEVICE), torch.empty(2, device=DEVICE)
    with stand_in() as seen:
        output = denoise(denoiser, latents, levels, text, extra)
        given = [x.bool() if isinstance(x, CaptionMask) else x for x in denoiser.given]
    assert output.shape == latents.shape
    assert all(x.device == DEVICE for x in tree_leaves(given) if isinstance(x, Tensor))
    assert seen.waits == []
