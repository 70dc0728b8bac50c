import itertools

import pytest
import torch

from lpl.diffusion.draws import (
    draw_normal,
    keyed_generator,
    keyed_quantile,
    keyed_seed,
    keyed_uniform,
    timestep_probabilities,
)
from lpl.diffusion.schedule import Discrete

KEYS = list(itertools.product([0, 1], ["noise", "crop"], ["cat", "dog"], [0, 1, 10]))


def timestep(p, quantile):
    """The timestep at a quantile of probabilities (T,)."""
    return int(Discrete(p, p, "epsilon", p).levels([quantile]))


def test_same_key_same_draw():
    for key in KEYS:
        assert keyed_seed(*key) == keyed_seed(*key)
        assert keyed_uniform(*key) == keyed_uniform(*key)
        assert torch.equal(draw_normal((4, 8, 8), *key), draw_normal((4, 8, 8), *key))
        assert keyed_quantile(*key) == keyed_quantile(*key)


def test_different_keys_different_draws():
    """Every part of the key counts, and parts do not run into each other."""
    keys = [*KEYS, (11, "x"), (1, "1x"), (1, 1, "x"), ("1", "1", "x", "")]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)
    assert len({keyed_uniform(*key) for key in keys}) == len(keys)
    assert len({draw_normal((16,), *key).sum().item() for key in keys}) == len(keys)


def test_seed_is_the_same_on_every_machine():
    """Not Python's salted hash: a value written down."""
    assert keyed_seed(0, "noise", "cat", 3) == 4437444050987790465


def test_global_generators_neither_matter_nor_move():
    torch.manual_seed(1)
    first = draw_normal((8,), 0, "noise"), keyed_uniform(0, "t")
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = draw_normal((8,), 0, "noise"), keyed_uniform(0, "t")
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_default_device_and_dtype_do_not_matter():
    plain = draw_normal((8,), 0, "noise")
    torch.set_default_dtype(torch.float64)
    try:
        other = draw_normal((8,), 0, "noise")
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.dtype == plain.dtype == torch.float32
    assert other.device.type == keyed_generator(0).device.type == "cpu"
    assert torch.equal(plain, other)


def test_noise_is_standard_normal():
    noise = torch.stack([draw_normal((4, 16, 16), 0, "noise", i, 0) for i in range(100)])
    assert noise.mean().abs() < 4 / 102400**0.5
    assert (noise.std() - 1).abs() < 0.01
    correlation = torch.corrcoef(noise.flatten(1))
    assert (correlation - torch.eye(100)).abs().max() < 0.16


def test_uniform_is_uniform():
    """Ten bins of 5000 draws: chi-square with 9 degrees of freedom, 27.9 at one in a thousand."""
    values = torch.tensor([keyed_uniform(0, "crop", i) for i in range(5000)])
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, 10, 0, 1)
    assert ((counts - 500).square() / 500).sum() < 27.9


@pytest.mark.parametrize(("seed", "expected"), [(0, 0.0), (2**62, 0.5), (2**63 - 1, 1 - 2**-53)])
def test_uniform_is_below_one(monkeypatch, seed, expected):
    """Also for the largest seed, which a plain division would round up to 1."""
    monkeypatch.setattr("lpl.diffusion.draws.keyed_seed", lambda *key: seed)
    assert keyed_uniform("any") == expected


@pytest.mark.parametrize(
    "probabilities", [[0.1] * 10, [0.3, 0.05, 0.05, 0.1, 0.0, 0.0, 0.1, 0.2, 0.2, 0.0], [0.0, 0.0, 1.0, 0.0]]
)
def test_timesteps_follow_their_probabilities(probabilities):
    """Chi-square over the possible ones, 27.9 as above; never an impossible one, at either end."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    draws = torch.tensor([timestep(p, keyed_quantile(0, "timestep", i, 0)) for i in range(4000)])
    counts = draws.bincount(minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    expected = 4000 * p[p > 0]
    assert ((counts[p > 0] - expected).square() / expected).sum() < 27.9


@pytest.mark.parametrize(("point", "expected"), [(0.0, 1), (0.249999, 1), (0.25, 3), (0.999999, 3)])
def test_inversion_by_hand(monkeypatch, point, expected):
    """Probabilities 0, 1/4, 0, 3/4, 0: an interval holds its lower end."""
    monkeypatch.setattr("lpl.diffusion.draws.keyed_uniform", lambda *key: point)
    assert timestep(torch.tensor([0, 0.25, 0, 0.75, 0], dtype=torch.float64), keyed_quantile(0)) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 8] * 8),
        ({"strategy": "earlier", "multiplier": 3.0}, [3 / 12] * 2 + [1 / 12] * 6),
        ({"strategy": "later", "multiplier": 3.0, "portion": 0.5}, [1 / 16] * 4 + [3 / 16] * 4),
        ({"strategy": "later", "multiplier": 3.0, "portion": 0.0}, [1 / 8] * 8),
        ({"strategy": "range", "multiplier": 5.0, "begin": 1, "end": 3}, [1 / 16] + [5 / 16] * 2 + [1 / 16] * 5),
        ({"strategy": "range", "multiplier": 0.0, "begin": 0, "end": 4}, [0.0] * 4 + [1 / 4] * 4),
        ({"strategy": "none", "multiplier": 7.0}, [1 / 8] * 8),
    ],
)
def test_bias_by_hand(options, expected):
    probabilities = timestep_probabilities(8, **options)
    assert probabilities.dtype == torch.float64
    assert probabilities.tolist() == pytest.approx(expected)
    assert probabilities.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "sometimes"}, "unknown timestep strategy 'sometimes'"),
        ({"strategy": "range", "begin": -1, "end": 4}, "outside the schedule"),
        ({"strategy": "range", "begin": 4, "end": 4}, "outside the schedule"),
        ({"strategy": "range", "begin": 0, "end": 9}, "outside the schedule"),
        ({"strategy": "earlier", "multiplier": 0.0, "portion": 1.0}, "leaves no timestep"),
    ],
)
def test_impossible_bias_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timestep_probabilities(8, **options)
