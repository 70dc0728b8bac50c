"""Counted bytes against counts by hand."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.saved_bytes import count_saved_bytes


def test_bytes_equal_a_hand_count() -> None:
    """Linear keeps its input, ReLU its output, the squared sum its argument: each once."""
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    x = torch.randn(7, 3)
    count = count_saved_bytes(lambda: net(x).square().sum(), net.parameters())
    assert count == 4 * (7 * 3 + 7 * 5)  # the input; ReLU's output, which squaring keeps too


def test_weights_count_unless_left_out() -> None:
    net = nn.Linear(3, 5)
    x = torch.randn(7, 3, requires_grad=True)
    without = count_saved_bytes(lambda: net(x), net.parameters())
    assert without == 4 * 7 * 3
    assert count_saved_bytes(lambda: net(x)) == without + 4 * 5 * 3


def test_views_of_one_storage_count_once() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    y = x * 1.0
    assert count_saved_bytes(lambda: (y[:2] * y[2:]).sum()) == y.untyped_storage().nbytes()


def test_nothing_is_counted_without_gradients_and_meta_equals_cpu() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        assert count_saved_bytes(lambda: net(torch.randn(1, 3, 8, 8)), net.parameters()) == 0
    cpu = count_saved_bytes(lambda: net(torch.randn(1, 3, 8, 8)), net.parameters())
    meta = net.to("meta")
    assert cpu == count_saved_bytes(lambda: meta(torch.empty(1, 3, 8, 8, device="meta")), meta.parameters())
    assert cpu == 4 * (3 * 8 * 8 + 4 * 6 * 6 * 2)  # both inputs of the convolutions, and SiLU's
