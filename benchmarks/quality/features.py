"""A second feature space, which owes nothing to EfficientNet: a small residual network trained on data/train alone.

    python -m benchmarks.quality.features FOLDER WEIGHTS [STEPS]    # WEIGHTS/features.safetensors and features.json

Two augmented views of one picture are to be nearer to each other than to views of other pictures (NT-Xent; Chen et al.
2020, arXiv 2002.05709, eq. 1), and a linear head is to tell the words of the caption. Images are compared by the 256
averaged values of the last map. Half an hour of one core.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.quality.pictures import SIDE
from lpl.base.files import write_atomically
from tools.demo_weights.training_run import TrainingRun

FILE, JUDGED = "features.safetensors", "features.json"
WIDTHS = (32, 64, 128, 256)
STEPS, BATCH = 1500, 96
LEARNING_RATE = 1e-3
TEMPERATURE = 0.2
WORD_WEIGHT, WORD_COUNT = 0.1, 20
"""Of the words' loss; in how many views a word has to occur."""
NEIGHBOURS = 10


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; stride 2 but in the first."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        inner = self.second(F.relu(self.norms[0](self.first(x))))
        return F.relu(self.norms[1](inner) + self.shortcut(x))


class Network(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] to features (B, 256); heads for training alone.

    Args:
        words: outputs of the words' head; 0: no heads.
    """

    def __init__(self, words: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 4, 2, 1, bias=False)
        pairs = zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        self.blocks = nn.Sequential(*(Residual(a, b, 1 if n == 0 else 2) for n, (a, b) in enumerate(pairs)))
        if words:
            last = WIDTHS[-1]
            self.projection = nn.Sequential(nn.Linear(last, last), nn.ReLU(), nn.Linear(last, 128))
            self.words = nn.Linear(last, words)
            nn.init.constant_(self.words.bias, -4.0)  # a word is in one caption of fifty

    def forward(self, images: Tensor) -> Tensor:
        """Features."""
        return self.blocks(self.stem(images)).mean((2, 3))


class FeatureNetwork:
    """The trained network as lpl.evaluation.features.Extractor has it.

    Args:
        file: its weights.
    """

    name = "contrastive-64"
    frechet_name, kernel_name = f"frechet_{name}", None

    def __init__(self, file: Path) -> None:
        self.network = Network().eval().requires_grad_(False)
        self.network.load_state_dict({name: value.float() for name, value in load_file(file).items()})
        self.key = f"{self.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:32]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, 256), float32, of images (B, 3, 64, 64), uint8."""
        return self.network(images.float() / 127.5 - 1)


class Views(NamedTuple):
    """The views of a folder."""

    images: Tensor
    """(N, 3, 64, 64), uint8."""
    pictures: list[str]
    captions: list[str]


def read_views(folder: Path) -> Views:
    """All of them, in the order of metadata.jsonl."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    arrays = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Views(images, [row["picture"] for row in rows], [row["text"] for row in rows])


def words_of(captions: list[str]) -> tuple[list[str], Tensor]:
    """Words that occur often enough, and (N, W) which caption has which."""
    split = [set(re.findall(r"[a-z-]+", caption)) - {"of"} for caption in captions]
    counts = Counter(word for words in split for word in words)
    known = sorted(word for word, count in counts.items() if count >= WORD_COUNT)
    return known, torch.tensor([[float(word in words) for word in known] for words in split])


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of each (half to all of its side), mirrored or not, in other colours; (B, 3, 64, 64) in [-1, 1]."""
    size = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    scale = uniform(0.5, 1.0)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(size, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * flip, scale
    theta[:, 0, 2], theta[:, 1, 2] = (1 - scale) * uniform(-1, 1), (1 - scale) * uniform(-1, 1)
    grid = F.affine_grid(theta, [size, 3, SIDE, SIDE], align_corners=False)
    x = F.grid_sample(images.float() / 127.5 - 1, grid, padding_mode="border", align_corners=False)
    grey = x.mean(1, keepdim=True)
    saturation = torch.where(uniform(0, 1) < 0.1, 0.0, uniform(0.6, 1.4))
    x = grey + saturation[:, None, None, None] * (x - grey)
    x = uniform(0.7, 1.3)[:, None, None, None] * x + uniform(-0.2, 0.2)[:, None, None, None]
    return x.clamp(-1, 1)


def contrast(first: Tensor, second: Tensor) -> Tensor:
    """NT-Xent of two views, (B, d) each: cross entropy of finding the other view among all 2 B - 1."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = z @ z.T / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    size = len(first)
    return F.cross_entropy(similarity, torch.cat([torch.arange(size, 2 * size), torch.arange(size)]))


def train_features(data: Path, checkpoint: Path, steps: int = STEPS) -> Network:
    """Trains the network on the views of a folder; goes on from its checkpoint.

    Args:
        data: data/train.
        checkpoint: file to resume from and to save to.
        steps: of 96 pictures with two views each.
    """
    views = read_views(data)
    known, has = words_of(views.captions)
    of: dict[str, list[int]] = {}
    for index, picture in enumerate(views.pictures):
        of.setdefault(picture, []).append(index)
    pictures = list(of.values())
    torch.manual_seed(0)
    run = TrainingRun(
        Network(max(1, len(known))), checkpoint, steps, LEARNING_RATE, weight_decay=0.01, ema_decay=0.99, warmup=100
    )

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randperm(len(pictures), generator=generator)[:BATCH].tolist()
        drawn = torch.rand(2, len(chosen), generator=generator).tolist()
        pairs = [[pictures[p][int(u * len(pictures[p]))] for p, u in zip(chosen, row, strict=True)] for row in drawn]
        indices = torch.tensor(pairs[0] + pairs[1])
        images = augmented(views.images[indices], generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            features = run.module(images)
        features = features.float()
        near = contrast(*run.module.projection(features).chunk(2))
        told = F.binary_cross_entropy_with_logits(run.module.words(features), has[indices], reduction="none")
        told = told.sum(1).mean()
        return near + WORD_WEIGHT * told, {"contrast": near.item(), "words": told.item()}

    run.fit(loss_of)
    return run.average


def save_features(network: Network, file: Path) -> None:
    """Writes the weights without the heads, in half precision."""
    kept = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in network.state_dict().items()
        if not name.startswith(("projection.", "words."))
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(kept, partial, metadata={"format": "pt"})
    partial.replace(file)


@torch.no_grad()
def judge(network: Network, train: Views, held_out: Views) -> dict[str, float]:
    """How well features tell what pictures show, which were not seen in training: two shares of held-out views.

    neighbours: the most frequent subject among the 10 nearest training views (cosine) is the view's own; a view's
    subject is the last part of its caption, such as "fruit". same_picture: the nearest other held-out view is of the
    same picture.
    """

    def features(views: Views) -> Tensor:
        made = [network(part.float() / 127.5 - 1) for part in views.images.split(64)]
        return torch.cat(made)

    known, asked = features(train), features(held_out)
    mean = known.mean(0)
    known, asked = F.normalize(known - mean, dim=1), F.normalize(asked - mean, dim=1)
    subjects = [caption.split(", ")[-1] for caption in train.captions]
    right = 0
    for part, captions in zip(asked.split(256), _chunks(held_out.captions, 256), strict=True):
        for nearest, caption in zip((part @ known.T).topk(NEIGHBOURS, 1).indices.tolist(), captions, strict=True):
            vote = Counter(subjects[i] for i in nearest).most_common(1)[0][0]
            right += vote == caption.split(", ")[-1]
    similarity = asked @ asked.T
    similarity.fill_diagonal_(-1)
    same = [
        held_out.pictures[i] == name for i, name in zip(similarity.argmax(1).tolist(), held_out.pictures, strict=True)
    ]
    return {"neighbours": right / len(asked), "same_picture": sum(same) / len(same)}


def _chunks(items: list[str], size: int) -> list[list[str]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def main() -> None:
    """Trains, keeps and judges; the same command continues."""
    folder, weights = Path(sys.argv[1]), Path(sys.argv[2])
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else STEPS
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    network = train_features(folder / "data" / "train", folder / "checkpoints" / "features.pt", steps).eval()
    train, held_out = read_views(folder / "data" / "train"), read_views(folder / "data" / "held-out")
    torch.manual_seed(0)
    found = {"steps": steps, "trained": judge(network, train, held_out), "random": judge(Network(), train, held_out)}
    weights.mkdir(parents=True, exist_ok=True)
    write_atomically(weights / JUDGED, (json.dumps(found, indent=1) + "\n").encode())
    save_features(network, weights / FILE)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
