"""Gate and weight from figures with known answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from lpl.analysis.check.levels import Levels
from lpl.analysis.check.suggest import reduction_factor, share_at, suggestion, supported_threshold, weight_for
from lpl.analysis.check.table import verdict_of
from lpl.config import LPLConfig, RunConfig, TrainConfig
from lpl.diffusion.schedule import schedule_of
from lpl.perceptual.gate import Gate

N, T = 20, 1000
SCHEDULER = schedule_of(DDPMScheduler(num_train_timesteps=T))


def levels(informed: list[float], cosine: float | list[float] = 0.5, lpl_square: float = 1.0) -> Levels:
    """N pictures with a little spread; the distance of one that knows nothing is 1."""
    parts = len(informed)
    edges = [T * k // parts for k in range(parts + 1)]
    spread = torch.linspace(0.99, 1.01, N, dtype=torch.float64)[:, None]
    full = torch.ones(N, parts, dtype=torch.float64)
    cosines = full * torch.tensor(cosine, dtype=torch.float64)
    middles = torch.tensor([(low + high) // 2 for low, high in pairwise(edges)])
    return Levels(
        edges, ["mid"], middles.expand(N, parts), spread * torch.tensor(informed).double(), torch.ones(N).double(),
        full[None], full[None], lpl_square * spread**2 * full, 4 * full, cosines, torch.ones(N).double(),
    )  # fmt: skip


def test_the_threshold_is_the_end_of_what_is_informative() -> None:
    found, why = supported_threshold(levels([0.1, 0.2, 0.3, 0.45, 0.7, 0.3, 0.9, 1.0, 1.0, 1.1]), seed=0)
    assert found == 400
    assert why.startswith("for t in 400..499 the estimate's distance is 0.70 (95 % up to 0.70) of that of one ")


def test_losses_that_pull_apart_end_it_too() -> None:
    found, why = supported_threshold(levels([0.1] * 4, [0.5, 0.4, 0.0, 0.4]), seed=0)
    assert found == 500
    assert why == "for t in 500..749 both losses need not pull the same way: cosine 0.00, 95 % from 0.00"


def test_the_interval_decides_not_the_mean() -> None:
    scattered = levels([0.4, 0.4])
    scattered.lpl[:, 1] = torch.tensor([0.0, 0.9] * (N // 2)).double()
    assert supported_threshold(scattered, seed=0)[0] == 500  # mean 0.45, but up to 0.65 or so


def test_weight_and_share_by_hand() -> None:
    """Half the schedule passes: the mean square of LPL is 0.5 * 1 / 0.5^2 = 2, of diffusion 4."""
    gate, config = Gate(SCHEDULER, 500), TrainConfig()
    found = levels([0.1] * 10)
    mean_square = float((torch.linspace(0.99, 1.01, N).double() ** 2).mean()) * 2
    weight = weight_for(found, gate, config, 0.2, seed=0)
    assert weight.value == pytest.approx(0.25 * (4 / mean_square) ** 0.5)
    assert weight.low < weight.value < weight.high < 1.01 * weight.value
    assert share_at(found, gate, config, weight.value) == pytest.approx(0.2)
    assert share_at(found, gate, config, 0.0) == 0


def test_timesteps_that_are_drawn_more_often_count_more() -> None:
    """Nothing but t < 500 is drawn: all samples pass, so LPL's mean square is 1."""
    biased = torch.cat([torch.full((500,), 1 / 500), torch.zeros(500)]).double()
    found = levels([0.1] * 10)
    found.diffusion_square[:, 5:] = 1e9
    weight = weight_for(found, Gate(replace(SCHEDULER, weights=biased), 500), TrainConfig(), 0.5, seed=0)
    assert weight.value == pytest.approx(2, rel=1e-3)


def test_pictures_count_by_their_weight() -> None:
    found = levels([0.1] * 10)
    found.lpl_square[0] *= 1e6
    found.weights[0] = 0
    weight = weight_for(found, Gate(SCHEDULER, 1000), TrainConfig(), 0.5, seed=0)
    assert weight.value == pytest.approx(2, rel=1e-2)


@pytest.mark.parametrize(
    ("reduction", "batch", "limit", "p", "expected"),
    [
        ("expected", 1, None, 0.25, 16),
        ("expected", 8, None, 0.25, 16),
        ("gated", 1, None, 0.25, 1),
        ("gated", 2, None, 0.5, 0.5 * 4 + 0.5 * 1),
        # One of two is decoded in the place of both: half the samples, doubled.
        ("expected", 2, 1, 0.5, 0.5 * 4 + 0.5 * 4 * 2),
        ("gated", 2, 1, 0.5, 0.5 * 4 + 0.5 * 1 * 2),
    ],
)
def test_reduction_factor(reduction: Any, batch: int, limit: int | None, p: float, expected: float) -> None:
    config = TrainConfig(
        lpl=LPLConfig(lpl_reduction=reduction, lpl_max_samples=limit), run=RunConfig(train_batch_size=batch)
    )
    assert reduction_factor(config, p) == pytest.approx(expected)


def suggest(found: Levels, gate: Gate, **lpl: Any) -> dict[str, Any]:
    return suggestion(found, gate, replace(TrainConfig(), lpl=LPLConfig(**lpl)))


def test_suggestion_names_gate_and_weight_and_why() -> None:
    made = suggest(levels([0.1] * 5 + [0.9] * 5), Gate(SCHEDULER, 200), lpl_weight=3.0)
    assert made["lpl_t_threshold"] == 500
    assert made["lpl_weight"] == pytest.approx(2**0.5, rel=1e-3)
    assert made["own_gate"]["gate"] == "t < 200"
    assert made["own_gate"]["lpl_weight"] == pytest.approx((4 / (0.2 / 0.2**2)) ** 0.5, rel=1e-3)
    assert made["p_gate"] == pytest.approx(0.5)
    assert made["why"][0].startswith("--lpl_t_threshold 500: for t in 500..599 ")
    assert "a run's t < 200 stays within it" in made["why"][1]
    assert made["own_share"] == pytest.approx(3 * 5**0.5 / (3 * 5**0.5 + 2), rel=1e-3)


def test_where_the_figures_do_not_decide_the_gate_stays() -> None:
    made = suggest(levels([0.9] * 10), Gate(SCHEDULER, 300))
    assert made["lpl_t_threshold"] is None
    assert made["why"][0].startswith("no threshold is suggested: for t in 0..99 ")
    assert made["why"][0].endswith("; the gate stays at t < 300")
    assert made["lpl_weight"] == made["own_gate"]["lpl_weight"]
    assert made["lpl_weight"] is not None


@pytest.mark.parametrize(("square", "said"), [(0.0, "has no gradient"), (float("nan"), "is not finite")])
def test_without_a_gradient_nothing_is_suggested(square: float, said: str) -> None:
    made = suggest(levels([0.1] * 10, lpl_square=square), Gate(SCHEDULER), lpl_dtype="float16")
    assert made["lpl_t_threshold"] is made["lpl_weight"] is None
    assert said in made["why"][0]


def test_too_few_pictures_have_no_interval_and_no_threshold() -> None:
    found, config = levels([0.1] * 10), TrainConfig()
    for name in ("levels", "lpl", "uninformed", "lpl_square", "diffusion_square", "cosine", "weights"):
        setattr(found, name, getattr(found, name)[:4])
    assert supported_threshold(found, seed=0) == (0, "4 pictures are too few, at least 5 are needed")
    said = suggestion(found, Gate(SCHEDULER, 500), config)
    assert said["lpl_t_threshold"] is said["lpl_weight_interval"] is said["own_gate"]["lpl_weight_interval"] is None
    assert said["lpl_weight"] > 0
    assert "(from fewer than 5 pictures: no interval)" in " ".join(said["why"])
    assert "95 %" not in " ".join(said["why"])


def judged(found: Levels, gate: Gate, faults: tuple[str, ...] = (), **lpl: Any) -> tuple[str, str]:
    own = {"gate": str(gate), "p_gate": gate.probability(None), "suggestion": suggest(found, gate, **lpl)}
    return verdict_of(own | {"faults": list(faults)}, replace(TrainConfig(), lpl=LPLConfig(**lpl)))


def test_verdict_on_a_run_where_lpl_acts() -> None:
    outcome, said = judged(levels([0.1] * 10), Gate(SCHEDULER, 500))
    assert outcome == "acts"
    assert said == (
        "LPL will act: it gets 50 % of the gradient on 50 % of the samples, with a weight of about 1.41, and pulls the "
        "same way as the diffusion loss (cosine 0.50); nothing needs to be changed"
    )
    outcome, said = judged(levels([0.1] * 10, cosine=0.0), Gate(SCHEDULER, 500), lpl_weight=0.5)
    assert outcome == "acts"
    assert "it gets 26 % of the gradient" in said
    assert "with a weight of 0.5, and neither follows the diffusion loss nor opposes it" in said


@pytest.mark.parametrize(
    ("found", "gate", "lpl", "outcome", "said"),
    [
        ({}, Gate(SCHEDULER, 500), {"lpl_weight": 0.0}, "idles", "--lpl_weight is 0; give auto, or a number above 0"),
        ({}, Gate(SCHEDULER, 40), {}, "idles", "4 % of the samples pass the gate (t < 40); give a wider one"),
        (
            {"lpl_square": 0.0},
            Gate(SCHEDULER, 500),
            {},
            "idles",
            "its gradient is exactly 0 for all that passes the gate (t < 500)",
        ),
        (
            {},
            Gate(SCHEDULER, 500),
            {"lpl_weight": 0.01},
            "idles",
            "--lpl_weight 0.01 gives it 0.7 % of the gradient; raise it, or use auto",
        ),
        (
            {},
            Gate(SCHEDULER, 500),
            {"lpl_weight": 50.0},
            "harms",
            "--lpl_weight 50.0 gives it 97 % of the gradient; lower it, or use auto",
        ),
        ({}, Gate(SCHEDULER, 500), {"lpl_target_share": 0.9}, "harms", "--lpl_target_share 0.9 gives it 90 % of the"),
        (
            {"lpl_square": float("nan")},
            Gate(SCHEDULER, 500),
            {"lpl_dtype": "float16"},
            "harms",
            "it is not finite with --lpl_dtype float16 within the gate (t < 500); keep --lpl_dtype float32",
        ),
        (
            {"cosine": [0.5, 0.5, *[-0.6] * 8]},
            Gate(SCHEDULER, 1000),
            {},
            "harms",
            "it pulls against the diffusion loss within the gate (t < 1000): cosine -0.38; give --lpl_t_threshold 200",
        ),
        (
            {"informed": [0.9] * 10},
            Gate(SCHEDULER, 500),
            {},
            "harms",
            "even where noise is least the model's distance to the picture is 0.90 of that of an estimate that knows",
        ),
    ],
)
def test_verdict_says_why_not_and_what_to_change(found: Any, gate: Gate, lpl: Any, outcome: str, said: str) -> None:
    made = judged(levels(**{"informed": [0.1] * 10} | found), gate, **lpl)
    assert made[0] == outcome
    assert made[1].removeprefix("LPL will idle: ").removeprefix("LPL will likely harm: ").startswith(said)


def test_a_fault_is_the_verdict() -> None:
    assert verdict_of({"faults": ["the VAE is broken, take another"]}, TrainConfig()) == (
        "harms",
        "LPL will likely harm: the VAE is broken, take another",
    )
