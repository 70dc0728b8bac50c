"""The examples of docs/decoders.md run as they stand, on tiny decoders of the kinds that they are written for."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_vae
from tiny_networks import compvis_autoencoder
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "decoders.md"
EXAMPLES = re.findall(r"```python (\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)


def monai():
    """MONAI's own AutoencoderKL, in 3-D."""
    from monai.networks.nets.autoencoderkl import AutoencoderKL

    return AutoencoderKL(
        3, 1, 1, (1, 1, 1), (4, 8, 8), (False,) * 3, 3, 4, 1e-6, False, False
    )  # axes, channels in and out, blocks, widths, attention, latent channels, groups, eps, attention in the middle


def decoder():
    model = nn.Module()
    model.head = nn.Conv2d(3, 8, 3, padding=1)
    model.up = nn.ModuleList(
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2)
    )
    return model


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    def embed(self, z):
        return torch.cat([self.token.expand(len(z), -1, -1), z.flatten(2).transpose(1, 2)], 1)


MODELS = {"vae": lambda: tiny_vae(), "ldm": compvis_autoencoder, "monai": monai, "decoder": decoder, "vit": ViT}
SHAPES = {
    "vae": (2, 4, 4, 4),
    "ldm": (2, 3, 4, 4),
    "monai": (2, 3, 4, 2, 3),
    "decoder": (2, 3, 4, 4),
    "vit": (2, 8, 4, 4),
}


def test_page_has_an_example_of_each_kind():
    assert {kind for kind, _ in EXAMPLES} == set(MODELS)


@pytest.mark.parametrize(("kind", "code"), EXAMPLES)
def test_example_trains(kind, code):
    """It gives a loss whose gradient is the derivative; of ten lines at most."""
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    pred, target = torch.randn(SHAPES[kind]).requires_grad_(), torch.randn(SHAPES[kind])
    names = {kind: model, "torch": torch, "pred_latents": pred, "target_latents": target}
    exec(code, names)
    (gradient,) = torch.autograd.grad(names["loss"], pred)
    step = gradient / gradient.norm()
    size = 1e-2
    ahead, behind = (names["loss_fn"](pred.detach() + s * size * step, target).per_sample.mean() for s in (1, -1))
    assert float(gradient.norm()) == pytest.approx(float(ahead - behind) / (2 * size), rel=0.05)
