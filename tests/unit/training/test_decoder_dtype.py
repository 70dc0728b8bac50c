"""--lpl_dtype auto: what is chosen, by what, and that a run keeps it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from tiny_models import tiny_vae
from torch import Tensor

from lpl.config import LPLConfig, TrainConfig
from lpl.diffusion.latent_space import LatentSpace
from lpl.training import decoder_dtype
from lpl.training.decoder_dtype import with_decoder_dtype

AUTO = TrainConfig(lpl=LPLConfig(lpl_dtype="auto"))
LATENTS = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
EXACT = torch.ones(4)


class Family:
    vae = tiny_vae()
    latent_space = LatentSpace.identity()


def chosen(monkeypatch: pytest.MonkeyPatch, gradient: Tensor, seconds: float) -> str:
    """What is chosen where float32 gives EXACT in a second, and bfloat16 this."""

    def measured(config: TrainConfig, *_: Any) -> tuple[Tensor, float]:
        return (EXACT, 1.0) if config.lpl.lpl_dtype == "float32" else (gradient, seconds)

    monkeypatch.setattr(decoder_dtype, "_gradient", measured)
    return with_decoder_dtype(AUTO, Family, lambda: LATENTS, Accelerator(cpu=True)).lpl.lpl_dtype


@pytest.mark.parametrize(
    ("gradient", "seconds", "dtype"),
    [
        (EXACT * 1.02, 0.6, "bfloat16"),
        (EXACT * 1.02, 0.95, "float32"),  # not worth it
        (EXACT * 1.2, 0.6, "float32"),  # too far
        (torch.tensor([1.0, 1.0, 1.0, torch.nan]), 0.6, "float32"),
        (torch.tensor([1.0, 1.0, 1.0, torch.inf]), 0.6, "float32"),
    ],
)
def test_what_is_finite_near_and_cheaper(
    monkeypatch: pytest.MonkeyPatch, gradient: Tensor, seconds: float, dtype: str
) -> None:
    assert chosen(monkeypatch, gradient, seconds) == dtype


def test_emulated_bfloat16_is_not_measured(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    latents: Any = type("Latents", (), {"device": torch.device("cuda")})
    with caplog.at_level("INFO", logger="lpl"):
        assert decoder_dtype._measured(AUTO, Family, latents) == "float32"
    assert "does not compute in bfloat16" in caplog.text


def test_it_is_measured_on_the_loss_that_trains() -> None:
    space = LatentSpace.scaled(0.5)
    family = type("Scaled", (), {"vae": Family.vae, "latent_space": space})
    noise = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(1))
    gradients = {}
    for name in ("float32", "bfloat16"):
        gradient, seconds = decoder_dtype._gradient(AUTO.changed(lpl_dtype=name), family, LATENTS, noise)
        assert gradient.dtype == torch.float32
        assert gradient.shape == LATENTS.shape
        assert seconds > 0
        gradients[name] = gradient
    error = (gradients["bfloat16"] - gradients["float32"]).norm() / gradients["float32"].norm()
    assert 0 < error < decoder_dtype.LARGEST_ERROR


def test_other_precisions_are_left_alone() -> None:
    for config in (TrainConfig(), AUTO.changed(use_lpl=False)):
        assert with_decoder_dtype(config, None, pytest.fail, Accelerator(cpu=True)) is config  # draws no batch


def test_a_run_goes_on_in_the_precision_it_began_with(
    train_in: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_dtype, "_measured", lambda *_: "bfloat16")
    train_in(tmp_path / "run", lpl_dtype="auto", max_train_steps=2)
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert recorded["lpl_dtype"] == "bfloat16"
    monkeypatch.setattr(decoder_dtype, "_measured", lambda *_: "float32")
    parts = train_in(tmp_path / "run", lpl_dtype="auto", max_train_steps=4)
    whole = train_in(tmp_path / "whole", lpl_dtype="bfloat16", max_train_steps=4)
    weights, other = parts.unet(), whole.unet()
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    other_kind = train_in(tmp_path / "narrow", lpl_dtype="float32", max_train_steps=4)
    assert any(not torch.equal(value, other_kind.unet()[name]) for name, value in weights.items())
