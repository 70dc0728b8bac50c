"""Steps of single parameters: bfloat16 weights follow float32's, states stay float32, gradients never exist at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lpl.base.counter import StepCounter
from lpl.config import OptimConfig
from lpl.training.checkpoint import join_optimizer, split_optimizer
from lpl.training.optimizers import build_optimizer
from lpl.training.per_parameter import FusedBackward, rounding
from lpl.training.states import one_step_size

SHAPES = ((128, 64), (64,))


def start(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    return [nn.Parameter(weight.to(dtype)) for weight in weights]


def moved(parameters: list[nn.Parameter], optimizer: Any, steps: int = 100) -> torch.Tensor:
    """How far the weights go in so many steps of gradients that have a mean and noise, all weights in one vector."""
    before = torch.cat([p.detach().float().flatten() for p in parameters])
    mean = torch.randn(len(before), generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        noise = torch.randn(len(before), generator=torch.Generator().manual_seed(2 + step))
        for p, gradient in zip(parameters, (mean + noise).split([p.numel() for p in parameters]), strict=True):
            p.grad = gradient.view(p.shape).to(p.dtype)
        torch.manual_seed(step)
        optimizer.step()
    return torch.cat([p.detach().float().flatten() for p in parameters]) - before


@pytest.mark.parametrize("rate", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_rounded_weights_go_as_far_as_float32_ones(name: str, rate: float) -> None:
    """The share of float32's displacement that is kept; rounding to the nearest keeps next to none of small ones."""
    config = OptimConfig(optimizer=name, adam_weight_decay=0.0)
    exact = start(torch.float32)
    expected = moved(exact, build_optimizer(exact, config, rate))
    low = start(torch.bfloat16)
    config = OptimConfig(optimizer=name, adam_weight_decay=0.0, weights_dtype="bfloat16")
    found = moved(low, build_optimizer(low, config, rate))
    kept = float(found @ expected / (expected @ expected))
    assert kept == pytest.approx(1, abs=0.06)
    if rate > 1e-4:
        return
    plain = start(torch.bfloat16)
    lost = moved(plain, build_optimizer(plain, OptimConfig(optimizer=name, adam_weight_decay=0.0), rate))
    assert float(lost @ expected / (expected @ expected)) < {1e-5: 0.1, 1e-4: 0.45}[rate]


def test_kahan_summation_of_optimi_goes_as_far() -> None:
    """Of optimi, what rounding leaves over is kept beside the weights: it lags by no more than half a unit of them."""
    config = OptimConfig(optimizer="optimi.AdamW", optimizer_args="weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8")
    exact, low = start(torch.float32), start(torch.bfloat16)
    expected = moved(exact, build_optimizer(exact, config, 1e-4))
    config = OptimConfig(
        optimizer="optimi.AdamW", optimizer_args=config.optimizer_args, weights_dtype="bfloat16", max_grad_norm=0
    )
    optimizer = build_optimizer(low, config, 1e-4)
    found = moved(low, optimizer)
    left = torch.cat([optimizer.state[p]["kahan_comp"].float().flatten() for p in low])
    assert float((found + left) @ expected / (expected @ expected)) == pytest.approx(1, abs=0.06)


def test_rounding_is_right_on_average_and_goes_to_neighbours_only() -> None:
    torch.manual_seed(0)
    for value in (1 + 2**-10, -(1 + 2**-9), 3e-5):
        exact = torch.full((200_000,), value)
        rounded = rounding()(exact).float()
        assert rounded.unique().numel() == 2
        unit = float(rounded.max() - rounded.min())
        assert unit <= abs(value) * 2**-7
        # The mean of so many has a standard deviation of at most unit / 2 / 447.
        assert float(rounded.double().mean()) == pytest.approx(float(exact[0]), abs=unit / 150)
    kept = torch.tensor([0.0, 1.0, -2.5, 65280.0])
    assert torch.equal(rounding()(kept).float(), kept)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "optimi.AdamW"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_state_comes_back_as_it_was(name: str, fused: bool) -> None:
    config = OptimConfig(optimizer=name, weights_dtype="bfloat16", fused_backward_pass=fused, max_grad_norm=0)
    parameters = start(torch.bfloat16)
    optimizer = build_optimizer(parameters, config, 1e-4)
    moved(parameters, optimizer, 2)
    tensors, rest = split_optimizer(optimizer.state_dict())
    assert all("group." not in key.removeprefix("group") for key in tensors)
    if name != "optimi.AdamW":
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    other = [nn.Parameter(p.detach().clone()) for p in parameters]
    again = build_optimizer(other, config, 1e-4)
    again.load_state_dict(join_optimizer({key: tensor.clone() for key, tensor in tensors.items()}, rest))
    assert torch.equal(moved(other, again, 3), moved(parameters, optimizer, 3))
    for p, q in zip(parameters, other, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "optimi.AdamW"])
def test_gradients_never_exist_all_at_once(name: str, dtype: Any) -> None:
    """Peak of a backward pass through equal layers: one gradient at a time, not all, and what its step writes."""
    layers, width = 24, 256
    size = width * width * (2 if dtype == "bfloat16" else 4)

    def peak(fused: bool) -> int:
        config = OptimConfig(optimizer=name, weights_dtype=dtype, fused_backward_pass=fused, max_grad_norm=0)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(getattr(torch, dtype))
        optimizer = build_optimizer(list(model.parameters()), config, 1e-4)
        step = FusedBackward(model.parameters(), optimizer) if fused else None
        x = torch.randn(1, width).to(getattr(torch, dtype))
        for last in (False, True):
            with StepCounter() as counter:
                loss = model(x).float().square().mean()
                if step is None:
                    loss.backward()
                else:
                    step(lambda value: value.backward(), loss, 1)
                    assert all(p.grad is None for p in model.parameters())
                if last:
                    return counter.peak
            optimizer.step()
            optimizer.zero_grad()
        raise AssertionError

    stepping = one_step_size(OptimConfig(optimizer=name, weights_dtype=dtype), (width, width), "cpu")
    small = 64 * 1024
    assert peak(False) == pytest.approx(layers * size, abs=small)
    assert peak(True) <= size + stepping + small
    assert peak(True) < 0.6 * peak(False)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_step_takes_what_its_arithmetic_says(name: str, dtype: Any) -> None:
    config = OptimConfig(optimizer=name, weights_dtype=dtype, fused_backward_pass=True, max_grad_norm=0)
    parameter = nn.Parameter(torch.ones(512, 256, dtype=getattr(torch, dtype)))
    optimizer = build_optimizer([parameter], config, 1e-4)
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        with StepCounter() as counter:
            optimizer.step()
    assert counter.peak == pytest.approx(one_step_size(config, (512, 256), "cpu"), rel=0.02)
