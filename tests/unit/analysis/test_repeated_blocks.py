"""A pass of which repeated blocks are counted once against the whole pass: the same bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from lpl.training.repeats import Repeats, UnlikeError, _Replayed

WIDTH, DEPTH = 32, 7


class Block(nn.Module):
    """Two streams, a vector that all blocks read, and a third output, which may go nowhere."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.inner, self.other, self.shift = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH), nn.Linear(8, WIDTH)

    def forward(self, image: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        CALLS.append(self)
        shift = self.shift(vector)[:, None]
        joint = self.other(torch.relu(self.inner(torch.cat([image + shift, text], 1)))) * self.scale
        mean = joint.mean(1)
        return image + joint[:, : image.shape[1]], text + joint[:, image.shape[1] :], mean


def blocks(number: int = DEPTH) -> list[nn.Module]:
    return [Block() for _ in range(number)]


CALLS: list[Block] = []
"""The blocks that ran."""


class Network(nn.Module):
    """Blocks between a first and a last layer; the third outputs of those that are `read` go into the output."""

    def __init__(self, blocks: list[nn.Module], read: Iterable[int] = range(99)) -> None:
        super().__init__()
        self.first, self.text, self.last = nn.Linear(4, WIDTH), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(blocks)
        self.read = read

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, run: Any) -> Tensor:
        image, text = self.first(image), self.text(text)
        vector = vector * self.last.weight.sum()
        means = []
        for number, block in enumerate(self.blocks):
            image, text, mean = run(block, image, text, vector)
            means += [mean] * (number in self.read)
        return self.last(image) + sum(mean.square().sum() for mean in means) + text.square().sum()


def count(network: Network, half: bool, repeats: bool, keeps: bool = True) -> tuple[list[int], int]:
    """Forward peak, what is kept, backward peak, FLOPs; and how many blocks ran forward."""
    mode: Any = FakeTensorMode() if half else torch.device("meta")
    if half:
        make_fake(network, mode)
    else:
        network.to("meta")
    counter = StepCounter()
    repeated = Repeats(counter, keeps)
    run = repeated.checkpoint if repeats else checkpoint

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    with mode, FusedAttention():
        inputs = torch.empty(2, 64, 4), torch.empty(2, 16, 4), torch.empty(2, 8)
        if repeats:
            with repeated.trial(), autocast():
                network(*inputs, run)
        CALLS.clear()
        with counter:
            with repeated.autocast(), autocast():
                output = network(*inputs, run)
            ran = len(CALLS)
            found = [counter.peak, counter.live]
            counter.reset_peak()
            hooks = [] if keeps else [p.register_post_accumulate_grad_hook(free) for p in network.parameters()]
            output.float().sum().backward()
            repeated.close()
        for hook in hooks:
            hook.remove()
        for parameter in network.parameters():
            parameter.grad = None
    return [*found, counter.peak, counter.flops], ran


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("keeps", [False, True])
def test_counts_are_those_of_the_whole_pass(half: bool, keeps: bool) -> None:
    """In half precision autocast keeps each block's converted weights to its end."""
    network = Network(blocks())
    whole, every = count(network, half, False, keeps)
    found, few = count(network, half, True, keeps)
    assert (every, few) == (DEPTH, 2)
    assert found == whole


class Detached(Block):
    """Its inputs get no gradient."""

    def forward(self, image: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        return super().forward(image.detach(), text.detach(), vector.detach())


class Listed(Block):
    """Gives a list, which has no gradients of its own."""

    def forward(self, image: Tensor, text: Tensor, vector: Tensor) -> Any:
        return [*super().forward(image, text, vector)]


class Unfinished(Block):
    """The third output has no gradient."""

    def forward(self, image: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        image, text, mean = super().forward(image, text, vector)
        return image, text, mean.detach() * 2


class Partial(Block):
    """Has weights and inputs that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(500, 500)

    def forward(self, image: Tensor, text: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        return super().forward(image, text, vector.detach())


class Writing(Network):
    """Writes to what its blocks give."""

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, run: Any) -> Tensor:
        image, text = self.first(image), self.text(text)
        for block in self.blocks:
            image, text, _ = run(block, image, text, vector)
            image += 1
        return self.last(image)


class Working(Network):
    """Computes something between the making of an input and the block."""

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, run: Any) -> Tensor:
        image, text = self.first(image), self.text(text)
        for block in self.blocks:
            beside = torch.relu(self.first(self.last(image)))
            image, text, _ = run(block, image, text, vector)
            image = image * beside
        return self.last(image)


def with_attribute(*values: object) -> list[nn.Module]:
    made = blocks(len(values))
    for block, value in zip(made, values, strict=True):
        block.kept = value
    return made


class Processor:
    """What an attention block does is an object of its own."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale


class Other(Processor):
    pass


def hook(module: nn.Module, given: Any) -> None:
    module.calls = 1


def other_hook(module: nn.Module, given: Any) -> None:
    module.calls = 1


def hooked() -> list[nn.Module]:
    made = blocks()
    for number, block in enumerate(made):
        block.register_forward_pre_hook(hook if number % 2 else other_hook)
        block.calls = 1
    return made


def sharing() -> list[nn.Module]:
    made = blocks()
    for block in made:
        block.inner = made[0].inner
    return made


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "network",
    [
        lambda: Network([Block(float(n)) for n in range(DEPTH)]),
        lambda: Network([Detached() for _ in range(DEPTH)]),
        lambda: Network([Listed() for _ in range(DEPTH)]),
        lambda: Network([Unfinished() for _ in range(DEPTH)], read=()),
        lambda: Network([Partial() for _ in range(DEPTH)]),
        lambda: Network(blocks(), read=(2, 5, 6)),
        lambda: Network(blocks(), read=(6,)),
        lambda: Network([Block()] * DEPTH),
        lambda: Network(sharing()),
        lambda: Network(hooked()),
        lambda: Writing(blocks()),
        lambda: Working(blocks()),
    ],
    ids=["scales", "detached", "list", "unfinished", "partial", "read some", "read last", "one block", "shared weight",
         "hooks", "writing", "working"],
)  # fmt: skip
def test_blocks_that_are_odd_count_as_in_the_whole_pass(
    network: Callable[[], Network], half: bool, keeps: bool
) -> None:
    whole, _ = count(network(), half, False, keeps)
    try:
        found, _ = count(network(), half, True, keeps)
    except UnlikeError:  # then the whole pass is counted
        return
    assert found == whole


@pytest.mark.parametrize(
    "attributes",
    [
        ["a", "b", "a", "a", "a"],
        [None, (1,), None, None, None],
        [[1], [2], [1], [1], [1]],
        [{"a": 1}, {"a": 2}, {"a": 1}, {"a": 1}, {"a": 1}],
        [hook, other_hook, hook, hook, hook],
        [Processor(), Other(), Processor(), Processor(), Processor()],
        [Processor(), Processor(2.0), Processor(), Processor(), Processor()],
        [torch.empty(1), torch.empty(2), torch.empty(1), torch.empty(1), torch.empty(1)],
    ],
)  # fmt: skip
def test_what_differs_in_an_attribute_is_another_kind(attributes: list[object]) -> None:
    assert count(Network(with_attribute(*attributes)), False, True)[1] == 3
    assert count(Network(with_attribute(*attributes[2:], *attributes[2:])), False, True)[1] == 2


def test_a_name_in_the_model_is_no_difference() -> None:
    """peft's layers know theirs."""
    named = with_attribute(*({"target_name": f"blocks.{number}"} for number in range(DEPTH)))
    assert count(Network(named), False, True)[1] == 2


@pytest.mark.slow  # minutes
@pytest.mark.parametrize("preset", ["sdxl", "sdxl-lora", "sd15", "sd35-lora", "flux-lora", "chroma-lora", "zimage-lora",
                                    "klein-lora", "qwen-lora", "sana-lora", "lumina2-lora",
                                    "auraflow-lora"])  # fmt: skip
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_published_models_count_as_whole_ones(preset: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_train(["--config", preset, "--mixed_precision", precision, "--gradient_checkpointing"])
    config = config.changed(resolution=kind_of(config.model).native_resolution(plan_configs(config.model)))
    rehearsal = Rehearsal(blueprint(plan_configs(config.model), config.model))
    given: list[tuple[Any, ...]] = []
    replayed: list[Any] = []
    passes, apply = rehearsal._passes, _Replayed.apply
    monkeypatch.setattr(rehearsal, "_passes", lambda *all_of, **named: given.append(all_of) or passes(*all_of, **named))
    monkeypatch.setattr(_Replayed, "apply", lambda *all_of: replayed.append(1) or apply(*all_of))
    found = rehearsal.denoiser(config)
    assert len(given) == 1
    assert bool(replayed) == (preset != "zimage-lora")  # its blocks have numbers
    assert found == passes(*given[0], repeats=False)
