"""Runs with masks: what they leave out has no influence, what they mark is all there is, and nothing else changes."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lpl.data.dataset import Batch
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.training.step import TrainingStep

STEPS = 4
OPTIONS: dict[str, Any] = {"max_train_steps": STEPS, "train_batch_size": 2, "center_crop": True}


def mask_all(folder: Path, draw: Any) -> None:
    """Puts a mask beside every image: draw(width, height), uint8 (height, width)."""
    for path in folder.glob("?.png"):
        with Image.open(path) as image:
            mask = Image.fromarray(draw(*image.size))
        mask.save(folder / f"{path.stem}-masklabel.png")


def left_half(width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


@pytest.fixture
def images(data: Path, tmp_path: Path) -> Path:
    """The six pictures, to be given masks."""
    return Path(shutil.copytree(data, tmp_path / "images"))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def disturb(patch: pytest.MonkeyPatch, amount: float, device_columns: slice) -> None:
    """Adds a constant to some columns of what the network predicts."""
    from lpl.families.sdxl import SDXL

    original = SDXL.denoise

    def denoise(*arguments: Any) -> torch.Tensor:
        out = original(*arguments)
        extra = torch.zeros_like(out)
        extra[..., device_columns] = amount
        return out + extra

    patch.setattr(SDXL, "denoise", staticmethod(denoise))


@pytest.mark.slow
def test_masks_of_ones_change_nothing(train: Any, images: Path) -> None:
    """The mean is summed in another order, hence not bit for bit."""
    plain = train(**OPTIONS, train_data_dir=images)
    mask_all(images, lambda width, height: np.full((height, width), 255, np.uint8))
    masked = train(**OPTIONS, train_data_dir=images, masked_loss="files", unmasked_weight=0.3, output="masked")
    assert plain.losses().keys() == masked.losses().keys()
    for name, values in plain.losses().items():
        assert masked.losses()[name] == pytest.approx(values, rel=2e-4), name
    for name, value in plain.unet().items():
        torch.testing.assert_close(masked.unet()[name], value, rtol=1e-4, atol=1e-5)


def test_images_without_masks_train_bit_for_bit_as_before(train: Any, images: Path) -> None:
    """Opaque ones, under alpha."""
    plain, masked = train(**OPTIONS), train(**OPTIONS, masked_loss="alpha", output="masked")
    assert same(plain.unet(), masked.unet())
    assert plain.losses() == masked.losses()
    assert "--masked_loss alpha: 0 of 6 images have a mask" in masked.stderr


@pytest.mark.parametrize("extra", [{"loss_type": "huber"}, pytest.param({"snr_gamma": 5.0}, marks=pytest.mark.slow)])
def test_what_is_predicted_outside_the_mask_has_no_influence(
    train: Any, images: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    """The diffusion loss alone: LPL's features see beyond the mask's edge."""
    mask_all(images, left_half)
    options = OPTIONS | {"train_data_dir": images, "use_lpl": False, **extra}
    # Center crops of 16: the widest image is 44 x 24, scaled to 29 x 16, its middle at 14.5 of 29; so the last column
    # of latents is outside in all of them.
    for masked_loss in ("files", "none"):
        runs = []
        for amount in (0.0, 3.0):
            with monkeypatch.context() as patch:
                disturb(patch, amount, slice(3, 4))
                runs.append(train(**options, masked_loss=masked_loss, output=f"{masked_loss}-{amount}"))
        assert same(runs[0].unet(), runs[1].unet()) == (masked_loss == "files")
        assert (runs[0].losses() == runs[1].losses()) == (masked_loss == "files")
    with monkeypatch.context() as patch:
        disturb(patch, 3.0, slice(0, 1))
        inside = train(**options, masked_loss="files", output="inside")
    assert inside.losses() != runs[0].losses()


def test_loss_and_lpl_get_the_mask_of_each_sample(train: Any, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under flips, and with LPL for the gated samples alone; weights are those of the masks' maxima."""
    mask_all(images, lambda width, height: left_half(width, height) // 2 + 1)
    (images / "0-masklabel.png").unlink()
    seen: list[Batch] = []
    given: list[torch.Tensor] = []
    step, loss = TrainingStep.__call__, LatentPerceptualLoss.__call__

    def watch_step(self: Any, denoiser: Any, batch: Batch, *rest: Any) -> Any:
        seen.append(batch)
        return step(self, denoiser, batch, *rest)

    def watch_loss(self: Any, pred: Any, target: Any, mask: Any = None, **rest: Any) -> Any:
        given.append(mask)
        return loss(self, pred, target, mask, **rest)

    monkeypatch.setattr(TrainingStep, "__call__", watch_step)
    monkeypatch.setattr(LatentPerceptualLoss, "__call__", watch_loss)
    run = train(
        **OPTIONS | {"max_train_steps": 8, "train_batch_size": 3, "resolution": 24},
        train_data_dir=images,
        masked_loss="files",
        random_flip=True,
        lpl_t_threshold=500,
    )
    assert run.code == 0
    sides = set()
    for batch in seen:
        assert batch.mask is not None
        assert batch.weights is not None
        for name, mask, weight in zip(batch.sample_ids, batch.mask, batch.weights.tolist(), strict=True):
            row = mask[0, 3].tolist()
            if name == "0.png":
                assert (row, weight) == ([1.0] * 6, 1.0)
                continue
            assert weight == mask.max().item() == pytest.approx(128 / 255)
            assert sorted(row) in (row, row[::-1])  # falls or rises
            assert min(row) == pytest.approx(1 / 255)
            sides.add(row[0] > row[-1])
    assert sides == {True, False}
    known = {tuple(mask.flatten().tolist()) for batch in seen if batch.mask is not None for mask in batch.mask}
    reached = [tuple(mask.flatten().tolist()) for batch in given for mask in batch]
    assert 0 < len(reached) < 24
    assert set(reached) <= known
    assert len(set(reached)) > 2


def test_a_second_start_makes_nothing_and_one_changed_mask_one(
    train: Any, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lpl")
    mask_all(images, left_half)
    options = OPTIONS | {"train_data_dir": images, "masked_loss": "files", "latent_cache_dir": tmp_path / "cache"}
    counts = []
    for number in range(3):
        caplog.clear()
        train(**options, output=str(number))
        lines = [record.getMessage() for record in caplog.records]
        (encoded,) = [line.partition("; ")[2].partition(",")[0] for line in lines if "captions encoded" in line]
        (made,) = [line.rpartition("; ")[2] for line in lines if "masks made" in line]
        counts.append((encoded, made))
        if number == 1:
            with Image.open(images / "3-masklabel.png") as mask:
                turned = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            turned.save(images / "3-masklabel.png")
    assert counts == [
        ("6 crops and 6 captions encoded", "6 masks made"),
        ("0 crops and 0 captions encoded", "0 masks made"),
        ("0 crops and 0 captions encoded", "1 masks made"),
    ]


def test_resumed_run_is_bit_for_bit_and_knows_other_masks(train: Any, images: Path) -> None:
    mask_all(images, left_half)
    options = OPTIONS | {"train_data_dir": images, "masked_loss": "files", "unmasked_weight": 0.1}
    options |= {"checkpointing_steps": 2}
    whole = train(**options)
    train(**options | {"max_train_steps": 2}, output="parts")
    parts = train(**options, output="parts")
    assert same(whole.unet(), parts.unet())
    mask_all(images, lambda width, height: left_half(width, height)[:, ::-1].copy())
    refused = train(**options | {"max_train_steps": 6}, output="parts", expect_error=True)
    assert "was trained on other images or captions" in refused.errors[0]


def test_accumulation_changes_nothing(train: Any, images: Path) -> None:
    """Masks of different areas: every sample is normalised by its own."""
    mask_all(images, lambda width, height: left_half(width, height) if width > 30 else left_half(width, height) // 3)
    options = OPTIONS | {"train_data_dir": images, "masked_loss": "files", "unmasked_weight": 0.1}
    whole = train(**options | {"train_batch_size": 4})
    split = train(**options | {"train_batch_size": 1, "gradient_accumulation_steps": 4}, output="split")
    for name, values in whole.losses().items():
        if name != "lpl/loss":  # a mean over gated samples of each micro-batch
            assert split.losses()[name] == pytest.approx(values, rel=1e-4), name


def test_dump_of_a_bad_step_has_the_mask(train: Any, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask_all(images, left_half)
    step = TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda *a: (o := step(*a))._replace(loss=o.loss * float("nan")))
    failed = train(**OPTIONS, train_data_dir=images, masked_loss="files", expect_error=True)
    found = load_file(failed.folder / "nonfinite-step-1.safetensors")
    assert found["0.mask"].shape == (2, 1, 4, 4)
    assert found["0.mask"].unique().tolist()[0] == 0
    assert found["0.weights"].shape == (2,)


def test_data_report_counts_masks(run_cli: Any, images: Path, tmp_path: Path) -> None:
    mask_all(images, left_half)
    (images / "1-masklabel.png").unlink()
    argv = ["data", f"--train_data_dir={images}", "--resolution=16", f"--output_dir={tmp_path / 'out'}"]
    code, out, err = run_cli([*argv, "--masked_loss=files"])
    assert (code, err) == (0, "")
    assert "\nmasks        5 of 6 images have one\n" in out
    found = json.loads((tmp_path / "out" / "data-report" / "data.json").read_text())
    assert found["parts"][0]["masks"] == 5
    code, out, err = run_cli([*argv, "--masked_loss=alpha"])
    assert "--masked_loss alpha: no image has a mask" in out
