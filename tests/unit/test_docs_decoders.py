"""The examples of docs/decoders.md run as they stand, on tiny decoders of the kinds that they are written for."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_vae
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "decoders.md"
EXAMPLES = re.findall(r"```python (\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)


class Block(nn.Module):
    """A residual block as ldm writes it, which takes the timestep's embedding too."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, temb=None):
        return self.nin_shortcut(x) + self.conv1(nn.functional.silu(self.norm1(x)))


class Doubling(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0))


def ldm():
    """CompVis's AutoencoderKL: levels from the last to the first."""
    model, decoder = nn.Module(), nn.Module()
    model.post_quant_conv, model.decoder = nn.Conv2d(3, 3, 1), decoder
    decoder.conv_in, decoder.mid = nn.Conv2d(3, 8, 3, padding=1), nn.Module()
    decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2 = Block(8, 8), nn.Identity(), Block(8, 8)
    decoder.up = nn.ModuleList()
    for n, (inputs, outputs) in enumerate([(6, 4), (8, 6), (8, 8)]):
        level = nn.Module()
        level.block = nn.ModuleList([Block(inputs, outputs)])
        if n:
            level.upsample = Doubling(outputs)
        decoder.up.append(level)
    return model


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


MODELS = {"vae": lambda: tiny_vae(), "ldm": ldm, "monai": monai, "decoder": decoder, "vit": ViT}
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
