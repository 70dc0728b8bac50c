"""Live and peak bytes against counts by hand, and FLOPs against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lpl.base.counter import FusedAttention, StepCounter
from lpl.base.counter import checkpoint as fused_checkpoint

KIB = 1024


def block(n: int = 1) -> torch.Tensor:
    """n KiB."""
    return torch.empty(n * KIB // 4)


def test_what_is_freed_no_longer_counts_but_was_part_of_the_peak() -> None:
    with StepCounter() as counter:
        a = block(3)
        b = a + 1
        del a
        assert (counter.live, counter.peak) == (3 * KIB, 6 * KIB)
        counter.reset_peak()
        c = block(2)
        assert (counter.live, counter.peak) == (5 * KIB, 5 * KIB)
        del b, c
    assert counter.live == 0


def test_a_temporary_within_an_expression_counts_while_it_is_there() -> None:
    x = block()
    with StepCounter() as counter:
        y = (x + 1) * (x + 2)  # both sums and the product
        assert (counter.live, counter.peak) == (KIB, 3 * KIB)
        del y


def test_views_and_changes_in_place_are_no_new_bytes() -> None:
    outside = block()
    with StepCounter() as counter:
        outside.add_(1)
        outside.view(2, -1).t()[0].zero_()
        assert counter.peak == 0
        a = block(2)
        views = [a[10:], a.view(2, -1), a.detach()]
        a.mul_(3)
        assert counter.live == counter.peak == 2 * KIB
        del a
        assert counter.live == 2 * KIB
        del views
    assert counter.live == 0


def test_a_tensor_from_before_does_not_count_when_it_is_freed() -> None:
    outside = block()
    with StepCounter() as counter:
        del outside
        kept = block()
    assert counter.live == KIB
    del kept


def test_training_step_by_hand() -> None:
    """Linear keeps its input (not counted: it was there), ReLU its output, the square ReLU's output."""
    layer = nn.Linear(16, 64, bias=False)
    x = torch.randn(8, 16)
    weight, hidden = 16 * 64 * 4, 8 * 64 * 4
    with StepCounter() as counter:
        loss = layer(x).relu().square().sum()
        assert counter.live == hidden + 4  # ReLU's output and the loss; Linear's output is gone
        assert counter.peak == 2 * hidden + 4  # the square beside ReLU's output, and the loss
        counter.reset_peak()
        loss.backward()
        assert layer.weight.grad is not None
        del loss
        assert counter.live == weight
        assert 2 * hidden + weight <= counter.peak <= 3 * hidden + weight + 8


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


def numbers(net: nn.Module, checkpointing: bool) -> tuple[int, ...]:
    """What is kept, the peaks of both passes, gradients and FLOPs."""
    x = torch.ones(2, 3, 16, 16)
    with StepCounter() as counter:
        y = checkpoint(net, x, use_reentrant=False) if checkpointing else net(x)
        loss = y.square().sum()
        kept, forward = counter.live, counter.peak
        counter.reset_peak()
        loss.backward()
        backward = counter.peak
        del loss, y
    return kept, forward, backward, counter.live, counter.flops


@pytest.mark.parametrize("checkpointing", [False, True])
def test_meta_and_fake_tensors_count_as_real_ones(checkpointing: bool) -> None:
    real = numbers(network(), checkpointing)
    with torch.device("meta"):
        assert numbers(network(), checkpointing) == real
    with FakeTensorMode():
        assert numbers(network(), checkpointing) == real
    kept, _, _, gradients, _ = real
    assert gradients == sum(p.numel() for p in network().parameters()) * 4
    other = numbers(network(), not checkpointing)
    assert (kept < other[0]) == checkpointing


def test_flops_are_those_of_torchs_counter() -> None:
    net = network()
    x = torch.randn(2, 3, 16, 16)
    with FlopCounterMode(display=False) as expected:
        net(x).sum().backward()
    with StepCounter() as counter:
        net(x).sum().backward()
    assert counter.flops == expected.get_total_flops() > 0


def test_attention_on_a_cpu_is_counted() -> None:
    """Two products forward, five backward (the scores are made again), each of 2 * B * H * S * S * D."""
    q = torch.randn(2, 3, 8, 4, requires_grad=True)
    with StepCounter() as counter:
        scaled_dot_product_attention(q, q, q).sum().backward()
    assert counter.flops == 7 * 2 * 2 * 3 * 8 * 8 * 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_attention_writes_no_scores_on_the_meta_device(checkpointing: bool) -> None:
    def attend(q: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, q, q)

    def peak() -> int:
        with StepCounter() as counter:
            y = fused_checkpoint(attend, q) if checkpointing else attend(q)
            y.sum().backward()
        return counter.peak

    tokens = 512
    q = torch.empty(1, 1, tokens, 8, device="meta", requires_grad=True)
    with FusedAttention():
        assert peak() < tokens * tokens * 4
    real = torch.randn(1, 1, tokens, 8, requires_grad=True)
    with FusedAttention():
        found = attend(real)
    assert torch.equal(found, attend(real))


@pytest.mark.parametrize("kind", ["real", "meta", "fake"])
def test_what_is_written_to_is_what_comes_back_every_time(kind: str) -> None:
    """An operation of known form is not derived again: it must still write, grow what is empty, and change views."""
    where = {"real": torch.device("cpu"), "meta": torch.device("meta"), "fake": FakeTensorMode()}[kind]
    with where, StepCounter() as counter:  # type: ignore[union-attr]
        for _ in range(3):
            x, y = torch.ones(2, 128), torch.full((2, 128), 2.0)
            assert x.add_(y) is x
            assert torch.mul(x, y, out=y) is y
            empty = torch.empty(0)
            assert torch.add(x, y, out=empty) is empty
            assert empty.shape == (2, 128)
            assert x.t_().shape == (128, 2)
            assert x.t_().shape == (2, 128)
            assert kind != "real" or (x.sum(), y.sum(), empty.sum()) == (768, 1536, 2304)
            assert counter.live == 2 * KIB  # without what the empty one has grown by
            del x, y, empty
        assert counter.live == 0
        with pytest.raises(RuntimeError):  # its traceback keeps tensors alive
            torch.ones(2, 128).add_(torch.ones(3, 128))
