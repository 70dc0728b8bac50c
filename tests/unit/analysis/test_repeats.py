"""A pass of which repeated blocks are counted once against the whole pass: the same bytes and FLOPs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lpl.base.counter import FusedAttention, StepCounter, checkpoint, make_fake
from lpl.config.command_line import parse_train
from lpl.families import blueprint, kind_of, plan_configs
from lpl.training.rehearsal import Rehearsal
from lpl.training.repeats import Repeats, UnlikeError

WIDTH, DEPTH = 32, 7


class Block(nn.Module):
    """Two streams, of which the second one's last output may go nowhere, and a vector that all blocks read."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.inner, self.other, self.shift = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH), nn.Linear(8, WIDTH)

    def forward(self, image: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        CALLS.append(self)
        shift = self.shift(vector)[:, None]
        joint = self.other(torch.relu(self.inner(torch.cat([image + shift, text], 1)))) * self.scale
        return image + joint[:, : image.shape[1]], text + joint[:, image.shape[1] :]


CALLS: list[Block] = []
"""The blocks that ran."""


class Network(nn.Module):
    """Blocks between a first and a last layer; `read`: only the text of these goes on, into the output."""

    def __init__(self, scales: list[float], read: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.first, self.text, self.last = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(map(Block, scales))
        self.read = read

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, run: Any) -> Tensor:
        image, text = self.first(image), self.text(text)
        vector = vector * self.last.weight.sum()
        total: Any = 0
        for number, block in enumerate(self.blocks):
            image, text = run(block, image, text, vector)
            if self.read:
                total = total + (text.sum() if number in self.read else 0)
                text = text.detach()
        return self.last(image) + total


def count(network: Network, half: bool, repeats: bool, keeps: bool = True) -> tuple[list[int], int]:
    """Forward peak, what is kept, backward peak, FLOPs; and how many blocks ran forward."""
    mode: Any = FakeTensorMode() if half else torch.device("meta")
    if half:
        make_fake(network, mode)
    else:
        network.to("meta")
    counter = StepCounter()
    blocks = Repeats(counter, keeps)
    run = blocks.checkpoint if repeats else checkpoint

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    with mode, FusedAttention():
        inputs = torch.empty(2, 64, 4), torch.empty(2, 16, 4), torch.empty(2, 8)
        if repeats:
            with blocks.trial(), autocast():
                network(*inputs, run)
        CALLS.clear()
        with counter:
            with blocks.autocast(), autocast():
                output = network(*inputs, run)
            ran = len(CALLS)
            found = [counter.peak, counter.live]
            counter.reset_peak()
            hooks = [] if keeps else [p.register_post_accumulate_grad_hook(free) for p in network.parameters()]
            output.float().sum().backward()
        for hook in hooks:
            hook.remove()
        assert all((p.grad is not None) == keeps for p in network.parameters())
        for parameter in network.parameters():
            parameter.grad = None
    return [*found, counter.peak, counter.flops], ran


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_counts_are_those_of_the_whole_pass(half: bool, keeps: bool) -> None:
    """In half precision autocast keeps each block's converted weights to its end."""
    network = Network([1.0] * DEPTH)
    whole, every = count(network, half, False, keeps)
    found, few = count(network, half, True, keeps)
    assert (every, few) == (DEPTH, 2)
    assert found == whole


def test_what_differs_in_a_plain_attribute_runs() -> None:
    network = Network([float(number) for number in range(DEPTH)])
    assert count(network, False, True)[1] == DEPTH


def test_blocks_in_between_whose_outputs_go_nowhere_are_an_error() -> None:
    """Which of their weights then have gradients is not known from the last ones, which run."""
    with pytest.raises(UnlikeError):
        count(Network([1.0] * DEPTH, read=(2, DEPTH - 1, DEPTH - 2)), False, True)
    network = Network([1.0] * DEPTH, read=tuple(range(DEPTH)))
    assert count(network, False, True)[0] == count(network, False, False)[0]


@pytest.mark.slow  # a quarter of an hour
@pytest.mark.parametrize("preset", ["sdxl", "sdxl-lora", "sd15", "sd35-lora", "flux-lora", "chroma-lora", "zimage-lora",
                                    "klein-lora", "qwen-lora", "sana-lora", "lumina2-lora",
                                    "auraflow-lora"])  # fmt: skip
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_published_models_count_as_whole_ones(preset: str, precision: str) -> None:
    config = parse_train(["--config", preset, "--mixed_precision", precision, "--gradient_checkpointing"])
    config = config.changed(resolution=kind_of(config.model).native_resolution(plan_configs(config.model)))
    rehearsal = Rehearsal(blueprint(plan_configs(config.model), config.model))
    kinds: list[tuple[Any, ...]] = []
    passes = rehearsal._passes
    rehearsal._passes = lambda *given, **named: kinds.append(given) or passes(*given, **named)  # type: ignore
    found = rehearsal.denoiser(config)
    assert len(kinds) == 1, "no repeats were found"
    assert found == passes(*kinds[0], repeats=False)
