"""Multi-resolution noise against an independent computation of its levels."""

import pytest
import torch

from lpl.diffusion.draws import draw_normal, keyed_uniform, pyramid_noise

KEY = (0, "pyramid", "cat", 2)


def test_levels_by_hand():
    """Level 0 as fine as the noise, level 1 between a half and a quarter of it, interpolated between centres."""
    noise = draw_normal((4, 16, 12), 0, "noise", "cat", 2)
    expected = noise.double()
    for level in range(3):
        ratio = (2 + 2 * keyed_uniform(*KEY, "ratio", level)) ** level
        size = (max(1, int(16 / ratio)), max(1, int(12 / ratio)))
        coarse = draw_normal((1, 4, *size), *KEY, level)[0].double()
        for axis, length in ((1, 16), (2, 12)):
            cells = coarse.shape[axis]
            place = ((torch.arange(length, dtype=torch.float64) + 0.5) * cells / length - 0.5).clamp(0)
            low = place.long().clamp(max=cells - 1)
            high, part = (low + 1).clamp(max=cells - 1), place - low
            shape = [1, 1, 1]
            shape[axis] = length
            coarse = (1 - part).view(shape) * coarse.index_select(axis, low) + part.view(shape) * coarse.index_select(
                axis, high
            )
        expected = expected + 0.3**level * coarse
        if min(size) == 1:
            break
    found = pyramid_noise(noise, 3, 0.3, *KEY)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (expected / expected.std()).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(noise, draw_normal((4, 16, 12), 0, "noise", "cat", 2))


def test_it_has_unit_variance_and_more_power_where_it_is_coarse():
    noise = [pyramid_noise(draw_normal((4, 32, 32), 0, "noise", i), 8, 0.8, 0, "pyramid", i) for i in range(20)]
    assert [float(n.std()) for n in noise] == pytest.approx([1.0] * 20, rel=1e-5)
    means = torch.stack(noise).mean((2, 3)).square().mean()
    assert means > 10 / 1024  # white noise: 1 / 1024
    assert pyramid_noise(noise[0], 8, 1e-9, 0, "p").sub(pyramid_noise(noise[0], 2, 1e-9, 0, "p")).abs().max() < 1e-6


def test_it_depends_on_its_key_alone():
    noise = draw_normal((4, 8, 8), 0, "noise")
    torch.manual_seed(1)
    first = pyramid_noise(noise, 4, 0.5, *KEY)
    torch.manual_seed(2)
    assert torch.equal(first, pyramid_noise(noise, 4, 0.5, *KEY))
    assert not torch.equal(first, pyramid_noise(noise, 4, 0.5, 0, "pyramid", "cat", 3))


def test_it_ends_at_one_cell():
    """Sides of 4: at most two levels with two cells, then one of one, whatever the iterations."""
    noise = draw_normal((4, 4, 4), 0, "noise")
    assert torch.equal(pyramid_noise(noise, 4, 0.9, *KEY), pyramid_noise(noise, 40, 0.9, *KEY))
