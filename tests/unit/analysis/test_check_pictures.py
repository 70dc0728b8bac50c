"""Which images are read and how, what the VAE loses, the walk, and the maps."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_images, tiny_vae

import lpl.perceptual.precision
from lpl.analysis.check import maps, precision
from lpl.analysis.check.images import Encoded, Picture, read_pictures, same_size, spread
from lpl.analysis.check.table import faults_of, warnings_of
from lpl.base.errors import UserError
from lpl.config import DataConfig, RunConfig, TrainConfig
from lpl.data.crops import plan_crop
from lpl.data.prepare import prepare_data
from lpl.data.sources import open_source
from lpl.perceptual.decoders.autoencoder_kl import AutoencoderKLTaps
from lpl.perceptual.distance import NORM_TYPES
from lpl.perceptual.loss import LatentPerceptualLoss


class Pool:
    """An encoder that averages over 8 x 8 pixels."""

    latent_key, text_key, latent_stride = "aa", "bb", 8

    def encode_images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, 0.1 + mean.abs()

    def encode_text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return {"e": torch.tensor([[float(len(c)), sum(map(ord, c))] for c in captions])}

    def entry_bytes(self, height: int, width: int) -> tuple[int, int]:
        return 1000, 8


class Piece:
    def __init__(self, name: str, size: int | None, holds: int) -> None:
        self.key = self.stamp = name
        self.size, self.holds, self.opened = size, holds, 0

    def samples(self) -> Any:
        for n in range(self.holds):
            self.opened += 1
            yield f"{self.key}{n}"


def chosen(pieces: list[Piece], count: int) -> list[tuple[str, list[int]]]:
    source: Any = SimpleNamespace(pieces=pieces)
    return [(piece.key, numbers) for piece, numbers in spread(source, count)]


def test_samples_are_taken_evenly_from_all_pieces() -> None:
    assert chosen([Piece("a", 100, 100)], 4) == [("a", [12, 37, 62, 87])]
    assert chosen([Piece("a", 6, 6), Piece("b", 2, 2)], 4) == [("a", [1, 3, 5]), ("b", [1])]
    assert chosen([Piece("a", 3, 3)], 16) == [("a", [0, 1, 2])]
    assert chosen([], 16) == []


def test_of_large_shards_the_first_samples_and_not_all_shards_are_opened() -> None:
    found = chosen([Piece(f"{n:02}", 10_000, 0) for n in range(64)], 32)
    assert len(found) == 16
    assert {len(numbers) for _, numbers in found} == {2}
    assert max(numbers[-1] for _, numbers in found) < 256
    unknown = chosen([Piece("a", None, 0), Piece("b", None, 0)], 16)
    assert unknown == [("a", list(range(8))), ("b", list(range(8)))]


@pytest.mark.parametrize(
    "options", [{}, {"buckets": True, "resolution": 32, "bucket_step": 8}, {"random_flip": True, "crop_variants": 3}]
)
def test_pictures_are_the_first_draws_of_a_run(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_images(tmp_path / "data", count=4, size=40)
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20] = 255
    rgba = Image.open(folder / "0.png").convert("RGB")
    rgba.putalpha(Image.fromarray(mask).resize(rgba.size))
    rgba.save(folder / "0.png")
    options = {"resolution": 16, "masked_loss": "alpha", "latent_cache_dir": str(tmp_path / "cache")} | options
    data = DataConfig(train_data_dir=str(folder), **options)
    config = TrainConfig(data=data, run=RunConfig(seed=5))
    source = open_source(data, None)
    pictures, refused = read_pictures(config, source, 16, 8)
    assert refused == []
    assert not (tmp_path / "cache").exists()
    encoder: Any = Pool()
    encoded = Encoded.of(config, encoder, pictures)
    run = prepare_data(source, None, data, encoder, 5, tmp_path / "bad.jsonl")
    assert sorted(n for group in same_size(pictures) for n in group) == list(range(4))
    for n in range(4):
        ours, theirs = encoded.batch([n], 0), run.batch([(n, 0)])
        assert ours.sample_ids == theirs.sample_ids
        assert torch.equal(ours.raw_latents, theirs.raw_latents)
        assert torch.equal(ours.text["e"], theirs.text["e"])
        assert torch.equal(ours.extra["sizes"], theirs.extra["sizes"])
        assert (ours.mask is None) == (theirs.mask is None)
        if ours.mask is not None and theirs.mask is not None:
            assert torch.equal(ours.mask, theirs.mask)
            assert ours.weights is not None
            assert torch.equal(ours.weights, theirs.weights)
    again = encoded.batch([1], 1)
    assert not torch.equal(again.raw_latents, encoded.batch([1], 0).raw_latents)


def test_bad_images_are_told_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    folder = tiny_images(tmp_path, count=3)
    (folder / "1.png").write_bytes(b"no picture")
    data = DataConfig(train_data_dir=str(folder), resolution=16)
    pictures, refused = read_pictures(TrainConfig(data=data), open_source(data, None), 16, 8)
    assert [picture.id for picture in pictures] == ["0.png", "2.png"]
    assert len(refused) == 1
    assert "1.png: " in refused[0]
    for name in ("0.png", "2.png"):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no image can be used, first: .*0\.png"):
        read_pictures(TrainConfig(data=data), open_source(data, None), 16, 8)


def pictures_of(values: list[int]) -> Encoded:
    crop = plan_crop(8, 8, (8, 8), True)
    pictures = [Picture(f"p{v}", f"p{v}", "", crop, torch.full((3, 8, 8), v, dtype=torch.uint8), None) for v in values]
    latents = [torch.full((1, 4, 1, 1), float(v)) for v in values]
    return Encoded(pictures, latents, latents, [{} for _ in values], 0, 0.0)


def test_psnr_by_hand() -> None:
    """A decoder that is off by 0.1 everywhere: 10 log10(4 / 0.01); beyond white nothing counts."""
    vae = SimpleNamespace(
        decode=lambda z: SimpleNamespace(sample=(z[:, :1, :1, :1] / 127.5 - 1 + 0.1).expand(1, 3, 8, 8))
    )
    encoded = pictures_of([0, 100, 255])
    found = precision.reconstruct(vae, encoded, torch.device("cpu"))
    assert found.psnr == pytest.approx([10 * math.log10(400), 10 * math.log10(400), math.inf], rel=1e-4)
    sheet = precision.draw_losses(encoded, found)
    assert sheet.width > 6 * 256


def test_the_nearest_to_the_median_is_most_typical() -> None:
    assert precision.Reconstructions([], [20.0, 50.0, 30.0, 31.0, 10.0]).typical[0] == 2


COMPONENTS = {"vae_decoder": {name: {"finite": True, "max_abs": 1.0} for name in ("float32", "bfloat16", "float16")}}


def test_the_walk_is_the_decoder_and_a_broken_one_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latents = tiny_vae(), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    found = precision.walk_difference(vae, latents)
    assert found < 1e-4
    assert faults_of({"components": COMPONENTS, "walk_equals_decode": found}) == []

    class Skips(AutoencoderKLTaps):
        """The diffusers project's fault: conv_in without post_quant_conv."""

        def __init__(self, vae: Any) -> None:
            super().__init__(vae)
            self._vae = SimpleNamespace(decoder=vae.decoder, config=vae.config)

    monkeypatch.setattr(lpl.perceptual.precision, "decoder_taps", Skips)
    found = precision.walk_difference(vae, latents)
    assert found > 0.02
    (fault,) = faults_of({"components": COMPONENTS, "walk_equals_decode": found})
    assert fault.startswith("LPL's walk through the decoder differs from vae.decode by ")
    assert "--pretrained_vae_model_name_or_path" in fault


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("loss_type", ["mse", "l1"])
def test_maps_sum_up_to_the_loss(norm_type: str, loss_type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 1, 4, 6, 8, generator=generator)
    target[..., 2, 1] *= 30
    loss = LatentPerceptualLoss(tiny_vae(), norm_type=norm_type, loss_type=loss_type)
    with torch.no_grad():
        out = loss(pred, target)
    found = maps.layer_maps(loss, pred, target)
    assert [layer.tap for layer in found] == ["mid", "up_0", "up_1", "up_2", "up_3"]
    for layer in found:
        assert float(layer.distance.sum()) == pytest.approx(float(out.per_layer[layer.tap]), rel=1e-4)
        assert float(layer.outliers.mean()) == pytest.approx(float(out.outlier_fraction[layer.tap]), abs=1e-6)
        assert layer.target.shape == (6 * 8 // layer.stride, 8 * 8 // layer.stride)
    assert sum(float(layer.outliers.max()) > 0 for layer in found) >= 1
    assert maps.draw_maps(found[0], 7, "p").width > 4 * 256


def test_heat_goes_from_dark_to_bright_and_stops_there() -> None:
    image = maps.heat(torch.tensor([[0.0, 2.0, 9.0, float("nan")]]), 2.0)
    dark, bright = maps.ANCHORS[0], maps.ANCHORS[-1]
    assert [image.getpixel((x, 0)) for x in range(4)] == [dark, bright, bright, dark]


def report(**changed: Any) -> dict[str, Any]:
    layers = [{"tap": "up_3", "bins": [{"outlier_fraction": 0.01}, {"outlier_fraction": float("nan")}]}]
    sound: dict[str, Any] = {
        "components": COMPONENTS, "reconstruction": {"psnr_mean": 30.0}, "layers": layers, "p_gate": 0.2,
        "gate": "t < 200", "suggestion": {"own_share": None},
    }  # fmt: skip
    return sound | changed


LONG = TrainConfig(run=RunConfig(max_train_steps=100_000))


def test_nothing_is_said_of_a_sound_model() -> None:
    assert warnings_of(report(), LONG, 100) == []


@pytest.mark.parametrize(
    ("changed", "config", "said"),
    [
        ({"reconstruction": {"psnr_mean": 22.0}}, LONG, "the VAE reconstructs images at 22.0 dB"),
        (
            {"layers": [{"tap": "up_2", "bins": [{"outlier_fraction": 0.4}]}]},
            LONG,
            "up_2 has 40.0% of its values masked",
        ),
        (
            {},
            TrainConfig(run=RunConfig(max_train_steps=100)),
            "about 20 of the run's 100 samples pass the gate t < 200",
        ),
    ],
)
def test_warnings(changed: dict[str, Any], config: TrainConfig, said: str) -> None:
    (line,) = warnings_of(report(**changed), config, None)
    assert said in line
