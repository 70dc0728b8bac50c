"""Options of loss, noise and timesteps through `lpl train`: each changes what it should, as computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lpl.base.errors import UserError
from lpl.config.command_line import parse_train
from lpl.diffusion.draws import draw_normal, timestep_probabilities
from lpl.training.step import Drawn, StepLoss, TrainingStep

BASE = {"train_batch_size": 4, "max_train_steps": 2}


class Spy:
    """What every micro-batch drew, put out and was to put out, and its loss."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[Drawn] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.out: list[StepLoss] = []
        self.step: TrainingStep | None = None
        draw, call = TrainingStep.draw, TrainingStep.__call__
        import lpl.training.step as module

        loss = module.diffusion_loss

        def draws(step: TrainingStep, *args: Any) -> Drawn:
            self.step = step
            self.drawn.append(draw(step, *args))
            return self.drawn[-1]

        def calls(*args: Any) -> StepLoss:
            self.out.append(call(*args))
            return self.out[-1]

        def losses(output: Tensor, target: Tensor, *args: Any) -> Tensor:
            self.pairs.append((output.detach(), target))
            return loss(output, target, *args)

        monkeypatch.setattr(TrainingStep, "draw", draws)
        monkeypatch.setattr(TrainingStep, "__call__", calls)
        monkeypatch.setattr(module, "diffusion_loss", losses)

    def snr(self, micro_batch: int = 0) -> Tensor:
        assert self.step is not None
        alpha, sigma = self.step.schedule.alpha_sigma(self.drawn[micro_batch].levels)
        return (alpha / sigma).square()

    def squares(self, micro_batch: int = 0) -> Tensor:
        output, target = self.pairs[micro_batch]
        return (output - target).double().square()


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.parametrize(
    ("weighting", "kind"),
    [("debiased", "epsilon"), ("debiased", "v_prediction"), ("p2", "v_prediction"), ("p2", "sample")],
)
def test_weighting(train: Any, spy: Spy, weighting: str, kind: str) -> None:
    train(**BASE, loss_weighting=weighting, p2_gamma=0.5, prediction_type=kind)
    snr = spy.snr()
    epsilon = {"debiased": snr.clamp(max=1000) ** -0.5, "p2": (1 + snr) ** -0.5}[weighting]
    factor = {"epsilon": 1.0, "v_prediction": snr / (snr + 1), "sample": snr}[kind]
    expected = epsilon * factor * spy.squares().flatten(1).mean(1)
    assert spy.out[0].diffusion_per_sample.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.parametrize("weighting", ["debiased", "p2"])
def test_scale_of_lpl_does_not_know_the_weighting(train: Any, weighting: str) -> None:
    """lpl_scale is min(1, 5 / SNR) without --snr_gamma: the first step's LPL is the same."""
    plain = train(**BASE, output="plain").logged()
    run = train(**BASE, loss_weighting=weighting).logged()
    assert run["lpl/weighted_loss"][1] == plain["lpl/weighted_loss"][1] > 0
    assert run["diffusion_loss"][1] != plain["diffusion_loss"][1]


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber(train: Any, spy: Spy, schedule: str) -> None:
    run = train(**BASE, loss_type="huber", huber_c=0.2, huber_schedule=schedule, snr_gamma=5.0)
    snr, t = spy.snr(), spy.drawn[0].levels
    c = {
        "constant": torch.full((4,), 0.2, dtype=torch.float64),
        "exponential": torch.exp(math.log(0.2) * t.double() / 1000),
        "snr": 0.8 / (1 + snr**-0.5) ** 2 + 0.2,
    }[schedule]
    c = c.view(4, 1, 1, 1)
    per_sample = (2 * c * ((spy.squares() + c**2).sqrt() - c)).flatten(1).mean(1) * snr.clamp(max=5) / snr
    assert spy.out[0].diffusion_per_sample.tolist() == pytest.approx(per_sample.tolist(), rel=1e-4)
    assert run.logged()["diffusion_loss"][1] == pytest.approx(float(per_sample.mean()), rel=1e-4)


def test_pyramid_noise(train: Any, spy: Spy) -> None:
    """The noise of a run is coarse and of unit variance, and its target is that noise."""
    options = {**BASE, "resolution": 64, "use_lpl": False, "lpl_weight": None, "lpl_norm_type": None}
    options |= {"lpl_t_threshold": None, "max_train_steps": 4}
    train(**options, pyramid_noise_iterations=6, pyramid_noise_discount=0.9)
    noise = torch.cat([drawn.noise for drawn in spy.drawn])
    assert noise.flatten(1).std(1).tolist() == pytest.approx([1.0] * 16, rel=1e-5)
    assert noise.mean((2, 3)).square().mean() > 4 / 256  # white noise of 16 x 16 cells: 1 / 256
    assert all(torch.equal(target, drawn.noise) for (_, target), drawn in zip(spy.pairs, spy.drawn, strict=True))
    assert not torch.equal(noise[0], draw_normal((4, 16, 16), 0, "noise", "0", 0))


def test_logit_normal_timesteps_and_their_gate(train: Any, spy: Spy) -> None:
    run = train(**BASE | {"train_batch_size": 64}, use_lpl=False, lpl_weight=None, lpl_norm_type=None,
                lpl_t_threshold=None, timestep_distribution="logit_normal", logit_mean=-1.0, logit_std=0.5)  # fmt: skip
    t = torch.cat([drawn.levels for drawn in spy.drawn]).double() / 1000
    logits = torch.logit(t + 0.0005)
    assert float(logits.mean()) == pytest.approx(-1.0, abs=4 * 0.5 / 128**0.5)
    assert float(logits.std()) == pytest.approx(0.5, abs=4 * 0.5 / 256**0.5)
    assert "no effect" not in run.stderr


def test_p_gate_of_the_objective_is_that_of_the_distribution(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lpl.training import trainer

    found: list[float] = []
    original = trainer.build_objective

    def spy(*args: Any) -> Any:
        objective = original(*args)
        found.append(objective.p_gate)
        return objective

    monkeypatch.setattr(trainer, "build_objective", spy)
    train(timestep_distribution="logit_normal", logit_mean=-1.0, logit_std=0.5, lpl_t_threshold=200)
    x = (math.log(0.25) + 1) / 0.5
    assert found == [pytest.approx((1 + math.erf(x / 2**0.5)) / 2, rel=1e-9)]


def test_gate_that_the_distribution_never_passes_is_refused(train: Any) -> None:
    failed = train(timestep_distribution="logit_normal", logit_mean=30.0, logit_std=0.1, lpl_t_threshold=20,
                   expect_error=True)  # fmt: skip
    assert failed.errors[0].startswith("error: --lpl_t_threshold 20, --timestep_distribution logit_normal: p_gate is 0")
    assert not failed.folder.exists()


def test_stratified_timesteps(train: Any, spy: Spy) -> None:
    """16 samples a step, gate at 700: 11 or 12 pass in every step, and each of 16 parts has one timestep."""
    options = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "max_train_steps": 4}
    run = train(**options, timestep_sampling="stratified")
    ratios = run.logged()["lpl/application_ratio"]
    assert {round(16 * ratio) for ratio in ratios.values()} <= {11, 12}
    counts = [out.num_lpl_samples for out in spy.out]
    assert all(abs(a - b) <= 1 for a, b in zip(counts[::2], counts[1::2], strict=True))
    cumulative = timestep_probabilities(1000).cumsum(0)
    for first, second in zip(spy.drawn[::2], spy.drawn[1::2], strict=True):
        t = torch.cat([first.levels, second.levels]).sort().values
        low, high = cumulative[t] - 0.001, cumulative[t]
        edges = torch.arange(17, dtype=torch.float64) / 16
        assert (high > edges[:-1] - 1e-9).all()
        assert (low < edges[1:] + 1e-9).all()


def test_warmup_of_lpl(train: Any) -> None:
    """Weights from step lpl_start on: 1/4, 2/4, 3/4 and all of 2."""
    run = train(lpl_weight=2.0, lpl_start=2, lpl_warmup_steps=3, max_train_steps=7, lpl_t_threshold=1000)
    logged = run.logged()
    assert logged["lpl/weight"] == pytest.approx({3: 0.5, 4: 1.0, 5: 1.5, 6: 2.0, 7: 2.0})
    for step in range(3, 8):
        assert logged["lpl/weighted_loss"][step] > 0
    whole = train(lpl_weight=2.0, lpl_start=2, max_train_steps=3, lpl_t_threshold=1000, output="whole").logged()
    assert logged["lpl/weighted_loss"][3] == pytest.approx(whole["lpl/weighted_loss"][3] / 4, rel=1e-6)


def test_share_is_not_judged_while_the_weight_rises(train: Any) -> None:
    options = {"lpl_weight": 1e-9, "train_batch_size": 12, "lpl_t_threshold": 1000, "max_train_steps": 5}
    assert "LPL idles" not in train(**options, lpl_warmup_steps=5, output="all").stderr
    assert "LPL idles" in train(**options, lpl_warmup_steps=2, output="some").stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--snr_gamma=5", "--loss_weighting=p2"], "--snr_gamma 5.0 and --loss_weighting p2 are two weightings"),
        (["--p2_k=0"], "--p2_k must be positive, not 0.0"),
        (["--p2_gamma=-1"], "--p2_gamma must be 0 or more, not -1.0"),
        (["--huber_c=0"], "--huber_c must be positive, not 0.0"),
        (["--loss_type=huber", "--huber_c=2"], "--huber_c 2.0: the threshold falls from 1 to it"),
        (["--pyramid_noise_iterations=1"], "--pyramid_noise_iterations must be 0 or at least 2, not 1"),
        (["--pyramid_noise_iterations=-2"], "--pyramid_noise_iterations must lie in 0..100, not -2"),
        (["--pyramid_noise_discount=1.5"], "--pyramid_noise_discount must lie above 0 and be 1 at most, not 1.5"),
        (["--noise_offset=0.1", "--pyramid_noise_iterations=6"], "both make coarse noise: drop one"),
        (["--logit_std=0"], "--logit_std must be positive, not 0.0"),
        (["--logit_mean=inf"], "--logit_mean must be a finite number, not inf"),
        (["--lpl_warmup_steps=-1"], "--lpl_warmup_steps must be 0 or more, not -1"),
    ],
)
def test_contradictions_are_refused_in_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_train(flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"p2_gamma": 0.5}, "--p2_gamma has no effect without --loss_weighting p2"),
        ({"p2_k": 2.0}, "--p2_k has no effect without --loss_weighting p2"),
        ({"huber_c": 0.5}, "--huber_c has no effect without --loss_type huber"),
        ({"huber_schedule": "constant"}, "--huber_schedule has no effect without --loss_type huber"),
        ({"pyramid_noise_discount": 0.5}, "--pyramid_noise_discount has no effect without --pyramid_noise_iterations"),
        ({"logit_mean": 0.5}, "--logit_mean has no effect without --timestep_distribution logit_normal"),
        ({"logit_std": 0.5}, "--logit_std has no effect without --timestep_distribution logit_normal"),
        (
            {"timestep_sampling": "stratified"},
            "--timestep_sampling has no effect without more than one sample",
        ),
        ({"lpl_warmup_steps": 5}, "--lpl_warmup_steps 5: LPL's weight rises to step 5, and the run of 2 steps never"),
    ],
)
def test_idle_options_are_named(train: Any, options: dict[str, Any], named: str) -> None:
    assert train(**options).stderr.count(named) == 1
