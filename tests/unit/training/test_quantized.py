"""A frozen base in codes: how near it is, what it keeps, what is trained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from lpl.base.errors import UserError
from lpl.config import ModelConfig, TrainConfig
from lpl.families import blueprint, load_family, plan_configs
from lpl.training.launch import as_launched, check_launch
from lpl.training.quantized import Kind, QuantizedLinear, decode, encode, quantize
from lpl.training.rehearsal import Rehearsal

KINDS: tuple[Kind, ...] = get_args(Kind)
CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "error", "bits"), [("int8", 0.008, 8), ("fp8", 0.03, 8), ("nf4", 0.1, 4)])
def test_codes_are_near_and_small(kind: Kind, error: float, bits: int) -> None:
    """Of normal weights; a row of zeros stays one, and what is in codes already stays as it is."""
    weight = torch.randn(37, 51, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 37)[:, None]
    weight[5] = 0
    stored = encode(weight, kind)
    dense = decode(stored, kind, (37, 51), torch.float32)
    if kind != "nf4":  # by rows; its blocks go over the ends of these
        assert torch.equal(dense[5], weight[5])
    normal = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    again = decode(encode(normal, kind), kind, (64, 256), torch.float32)
    assert 0 < ((again - normal).norm() / normal.norm()).item() < error
    assert torch.allclose(decode(encode(again, kind), kind, (64, 256), torch.float32), again, rtol=1e-6)
    assert stored.codes.numel() <= -(-37 * 51 // 64) * 64 * bits // 8
    assert torch.equal(decode(stored, kind, (37, 51), torch.bfloat16).float(), dense.bfloat16().float())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_written_out_weights_and_none_is_kept(kind: Kind) -> None:
    layers = nn.ModuleList([nn.Linear(96, 96, bias=number > 0) for number in range(3)]).requires_grad_(False)
    quantize(layers, kind, CPU)
    assert all(isinstance(layer, QuantizedLinear) for layer in layers)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    def through(x: torch.Tensor, dense: bool) -> torch.Tensor:
        for layer in layers:
            product = x @ layer.dense(torch.float32).t() if dense else None
            x = (product if layer.bias is None else product + layer.bias) if product is not None else layer(x)
        return x

    x, y = (torch.linspace(-1, 1, 2 * 96).view(2, 96).requires_grad_() for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = through(x, dense=False)
    wanted = through(y, dense=True)
    assert torch.allclose(made, wanted, atol=1e-6)
    made.square().sum().backward()
    wanted.square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    assert not [number for number in kept if number >= 96 * 96]  # torch's own layers keep their weights for it
    with torch.autocast("cpu", torch.bfloat16):
        assert layers[0](x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_the_bytes_that_are_there(kind: Kind, model: Path) -> None:
    options = ModelConfig(str(model), rank=4, quantize_base=kind)
    plain = ModelConfig(str(model), rank=4)
    sizes = [
        Rehearsal(blueprint(plan_configs(each), each), "cpu").parameters(TrainConfig(model=each))
        for each in (options, plain)
    ]
    denoiser: Any = load_family(options, CPU, torch.float32).denoiser
    before = sum(p.numel() for p in denoiser.parameters())
    quantize(denoiser, kind, CPU)
    there = sum(p.numel() * p.element_size() for p in denoiser.parameters())
    assert sizes[0].base == sizes[1].base == before
    assert sizes[0].size - 4 * sizes[0].trained == there < 4 * before
    assert sizes[0].shapes == sizes[1].shapes


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_lora_trains_on_it_and_goes_on_as_the_whole_run(
    kind: str, train_in: Callable[..., Any], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"rank": 2, "quantize_base": kind, "lora_targets": "all", "max_train_steps": 4}
    whole = train_in(tmp_path / "whole", **options)
    train_in(tmp_path / "parts", **(options | {"max_train_steps": 2}))
    parts = train_in(tmp_path / "parts", **options)
    plain = train_in(tmp_path / "plain", **(options | {"quantize_base": None}))
    weights, other, exact = whole.unet(), parts.unet(), plain.unet()
    assert all(torch.equal(weights[name], other[name]) for name in weights | other)
    assert weights.keys() == exact.keys()  # a LoRA like any other
    moved = [name for name in weights if not torch.equal(weights[name], exact[name])]
    assert moved
    loss, wanted = (run.logged()["diffusion_loss"][1] for run in (whole, plain))
    assert loss != wanted
    assert loss == pytest.approx(wanted, rel=0.2)


def test_text_encoders_stay_as_they_are(model: Path) -> None:
    options = ModelConfig(str(model), rank=4, quantize_base="int8", train_text_encoder=True)
    joint: Any = load_family(options, CPU, torch.float32).denoiser
    quantize(joint, "int8", CPU)
    unet, *encoders = joint.parts
    assert len(encoders) == 2
    assert any(isinstance(module, QuantizedLinear) for module in unet.modules())
    assert not any(isinstance(module, QuantizedLinear) for encoder in encoders for module in encoder.modules())


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(UserError, match="--use_dora with --quantize_base int8: a DoRA needs whole weights"):
        ModelConfig("m", rank=4, use_dora=True, quantize_base="int8")
    config = TrainConfig(model=ModelConfig("m", rank=4, quantize_base="int8"))
    with (
        as_launched(2, True),
        pytest.raises(UserError, match="--quantize_base int8: FSDP2 splits no quantized weights"),
    ):
        check_launch(config)
