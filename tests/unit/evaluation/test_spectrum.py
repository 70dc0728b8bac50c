"""The power spectrum: white noise, a known exponent, a single wave, blur; and the log error of bands."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lpl.evaluation.metrics import BANDS, frequencies, log_error, power_spectrum


def coloured(count: int, size: int, exponent: float, seed: int = 0) -> Tensor:
    """Grey images whose power falls as frequency ** -exponent, around 128; floats."""
    noise = torch.randn(count, 2 * size, 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    waves = torch.fft.fftfreq(2 * size, dtype=torch.float64)
    radius = torch.sqrt(waves[:, None] ** 2 + waves**2)
    radius[0, 0] = math.inf
    made = torch.fft.ifft2(torch.fft.fft2(noise) * radius ** (-exponent / 2)).real
    made = made[:, :size, :size]  # a part: its edges do not match, as a photograph's do not
    return (128 + 20 * made / made.std())[:, None].expand(-1, 3, -1, -1)


@pytest.mark.parametrize("size", [64, 33])
def test_white_noise_has_its_variance_everywhere(size: int) -> None:
    noise = torch.randn(400, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = power_spectrum(128 + 25.5 * noise.expand(-1, 3, -1, -1))
    assert found.shape == (400, size // 2)
    # The first rings lose some to the mean that is taken out.
    torch.testing.assert_close(
        found.mean(0)[2:], torch.full((size // 2 - 2,), 0.01, dtype=torch.float64), rtol=0.06, atol=0
    )


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_known_exponent(exponent: float) -> None:
    power = power_spectrum(coloured(100, 64, exponent)).mean(0)
    f = frequencies(64)
    used = slice(3, 30)
    x, y = f[used].log(), power[used].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert float(slope) == pytest.approx(-exponent, abs=0.1)


def test_a_wave_is_at_its_frequency() -> None:
    x = torch.arange(64, dtype=torch.float64)
    wave = 128 + 50 * torch.cos(2 * math.pi * 12 * x / 64)
    power = power_spectrum(wave.expand(1, 3, 64, 64))[0]
    assert int(power.argmax()) == 11
    assert float(frequencies(64)[11]) == 12 / 64
    assert float(power[:9].max()) < 1e-9 * float(power.max())


def test_luma_of_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    grey = (images.double() * torch.tensor([0.299, 0.587, 0.114]).double()[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(power_spectrum(images), power_spectrum(grey.expand(-1, 3, -1, -1)))


def test_blur_is_an_error_of_the_high_band() -> None:
    images = coloured(60, 64, 2.0)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    power, reference = power_spectrum(blurred).mean(0), power_spectrum(images).mean(0)
    errors = [float(log_error(power, reference, band)) for band in BANDS]
    assert errors[0] < errors[1] < errors[2]
    # Three taps along each axis: (1 + 2 cos(2 pi f)) / 3 squared; along an axis at 3/8 it leaves 2 % of power.
    assert errors[2] > 2
    assert errors[0] < 0.6
    assert float(log_error(reference, reference, "high")) == 0


def test_log_error_is_in_nepers_of_power_and_takes_resamples() -> None:
    reference = torch.arange(1.0, 33, dtype=torch.float64)
    many = torch.stack([reference * 2, reference / 2, reference])
    for band in BANDS:
        torch.testing.assert_close(
            log_error(many, reference, band), torch.tensor([math.log(2), math.log(2), 0], dtype=torch.float64)
        )
    high = reference.clone()
    high[16:] *= math.e
    assert [float(log_error(high, reference, band)) for band in BANDS] == pytest.approx([0, 0, 1])
    assert math.isnan(float(log_error(reference[:2], reference[:2], "low")))
