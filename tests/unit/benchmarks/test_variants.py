"""The quality benchmark's variants: their mathematics against formulas and autograd."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from benchmarks.quality import variants
from benchmarks.quality.control import LatentDistance
from benchmarks.quality.variants import LossShare, Recording, Variant, VariantObjective, parse
from lpl.base.errors import UserError
from lpl.diffusion.prediction import alpha_sigma_table, x0_from_output
from lpl.perceptual.objective import PerceptualObjective

SIGMA = 3.0
TIMESTEPS = torch.tensor([10, 300, 990, 500])
CAPTIONED = torch.tensor([True, False, True, True])


class Setup:
    """A denoiser that is one number a channel, captions as a shift of it, and an objective around squared latents."""

    def __init__(self, variant: Variant, folder: Path, empty: float = 0.25, **options: object) -> None:
        self.scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        generator = torch.Generator().manual_seed(0)
        self.latents, self.noise = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
        self.alpha, self.sigma = alpha_sigma_table(self.scheduler)
        alpha, sigma = (table[TIMESTEPS].float().view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        self.noisy = alpha * self.latents + sigma * self.noise
        self.scale = torch.tensor([0.5, 1.0, 1.5], requires_grad=True)
        self.text = {"prompt_embeds": 0.3 * CAPTIONED.float().view(-1, 1, 1), "pooled": torch.zeros(4, 1)}
        self.family = Recording(SimpleNamespace(denoise=self.denoise))
        self.inner = PerceptualObjective(
            LatentDistance(), self.scheduler, **({"lpl_weight": 1.0, "lpl_sigma_threshold": SIGMA} | options)
        )
        self.p_gate = self.inner.p_gate
        self.objective = VariantObjective(
            self.inner, variant, self.family, self.alpha, self.sigma, 11, 0, empty, folder
        )

    def denoise(self, denoiser: object, noisy: Tensor, timesteps: Tensor, text: dict, sizes: Tensor) -> Tensor:
        return self.scale.view(1, -1, 1, 1) * noisy + text["prompt_embeds"].view(-1, 1, 1, 1)

    def call(self, step: int = 0) -> tuple[object, Tensor]:
        """The term, and the model's output."""
        output = self.family.denoise(None, self.noisy, TIMESTEPS, self.text, {"sizes": torch.zeros(4, 6)})
        loss = (output - self.noise).square().mean()
        return self.objective(output, self.noisy, self.latents, TIMESTEPS, diffusion_loss=loss, step=step), output

    def x0(self, output: Tensor) -> Tensor:
        alpha, sigma = self.alpha[TIMESTEPS].float(), self.sigma[TIMESTEPS].float()
        return x0_from_output(output, self.noisy, alpha, sigma, "epsilon")

    def expected(self, estimate: Tensor, chosen: Tensor, p_gate: float) -> Tensor:
        """Of squared latents, with LPL's scale, over the chosen samples."""
        snr = (self.alpha / self.sigma)[TIMESTEPS].square().float()
        each = (estimate - self.latents).square().mean((1, 2, 3)) * (5 / snr).clamp(max=1)
        return each[chosen].sum() / (len(TIMESTEPS) * p_gate)

    @property
    def open(self) -> Tensor:
        return (self.sigma / self.alpha)[TIMESTEPS] <= SIGMA


def gradient(value: Tensor, scale: Tensor) -> Tensor:
    return torch.autograd.grad(value, scale, retain_graph=True)[0]


@pytest.mark.parametrize("which", ["captioned", "uncaptioned"])
def test_only_samples_with_or_without_a_caption(tmp_path: Path, which: str) -> None:
    setup = Setup(Variant(captions=which), tmp_path)
    assert setup.open.tolist() == [True, True, False, True]
    term, output = setup.call()
    captioned = which == "captioned"
    chosen = setup.open & (captioned == CAPTIONED)
    wanted = setup.expected(setup.x0(output), chosen, setup.p_gate * (0.75 if captioned else 0.25))
    torch.testing.assert_close(term.loss, wanted)
    torch.testing.assert_close(gradient(term.loss, setup.scale), gradient(wanted, setup.scale))
    assert term.num_samples == int(chosen.sum())
    with pytest.raises(UserError, match="there are no such samples"):
        Setup(Variant(captions="uncaptioned"), tmp_path, empty=0.0)


@pytest.mark.parametrize("both", [False, True])
def test_guided_estimate(tmp_path: Path, both: bool) -> None:
    """u + g (c - u) where there is a caption, else the estimate itself; through u only if asked for."""
    setup = Setup(Variant(guided=(3.0, 1.0), guided_both=both), tmp_path)
    term, output = setup.call()
    with torch.set_grad_enabled(both):
        unconditional = setup.x0(setup.denoise(None, setup.noisy, TIMESTEPS, {"prompt_embeds": torch.zeros(4)}, {}))
    g = torch.where(CAPTIONED, 3.0, 1.0).view(-1, 1, 1, 1)
    wanted = setup.expected(unconditional + g * (setup.x0(output) - unconditional), setup.open, setup.p_gate)
    torch.testing.assert_close(term.loss, wanted)
    torch.testing.assert_close(gradient(term.loss, setup.scale), gradient(wanted, setup.scale))
    by_output = gradient(wanted, output).square().sum() * len(output)
    if not both:  # the meter's gradient is that at the output
        torch.testing.assert_close(torch.as_tensor(term.metrics["lpl/gradient_square"]), by_output)


def test_guided_on_a_share_of_the_steps(tmp_path: Path) -> None:
    setup, plain = Setup(Variant(guided=(3.0, 0.5)), tmp_path), Setup(Variant(weight=(1.0, 1.0)), tmp_path)
    base = float(plain.call()[0].loss.detach())
    guided = [float(setup.call(step)[0].loss.detach()) != pytest.approx(base) for step in range(60)]
    assert 15 < sum(guided) < 45
    assert guided == [float(setup.call(step)[0].loss.detach()) != pytest.approx(base) for step in range(60)]


def test_weight_goes_linearly_over_the_run(tmp_path: Path) -> None:
    plain = Setup(Variant(weight=(1.0, 1.0)), tmp_path).call()[0]
    setup = Setup(Variant(weight=(2.0, 0.0)), tmp_path)
    for step, factor in ((0, 2.0), (5, 1.0), (10, 0.0), (12, 0.0)):
        term = setup.call(step)[0]
        torch.testing.assert_close(term.loss, factor * plain.loss)
        assert term.metrics["lpl/weight"] == pytest.approx(factor)
        square = factor**2 * plain.metrics["lpl/gradient_square"]
        torch.testing.assert_close(torch.as_tensor(term.metrics["lpl/gradient_square"]), torch.as_tensor(square))
        assert term.metrics["lpl/snr_mean"] == plain.metrics["lpl/snr_mean"]


def test_share_of_the_loss_is_measured_then_fixed_and_kept(tmp_path: Path) -> None:
    share = LossShare(0.2, tmp_path / "variant.json")
    share.measure(0.0, 4.0, 0)
    assert share.weight == 0
    share.measure(2.0, 4.0, 200)
    assert share.weight == pytest.approx(0.25 * 8 / 2)
    assert not share.file.exists()
    share.measure(2.0, 8.0, 100)
    assert share.weight == pytest.approx(0.25 * 16 / 4)
    share.measure(100.0, 1.0, 100)
    assert share.weight == LossShare(0.2, share.file).weight == pytest.approx(1.0)


def test_share_of_the_loss_is_reached(tmp_path: Path) -> None:
    setup = Setup(Variant(loss_share=0.2), tmp_path)
    assert float(setup.call()[0].loss.detach()) == 0
    term, output = setup.call(1)
    diffusion, loss = float((output - setup.noise).square().mean().detach()), float(term.loss.detach())
    assert loss / (loss + diffusion) == pytest.approx(0.2)


def test_less_diffusion_where_the_gate_is_open(tmp_path: Path) -> None:
    setup = Setup(Variant(weight=(1.0, 1.0)), tmp_path)
    step = SimpleNamespace(
        schedule=setup.inner.gate.schedule,
        diffusion_per_sample=lambda inputs: (inputs.model_output - inputs.target).square().mean((1, 2, 3)),
    )  # fmt: skip
    variants.less_diffusion(step, setup.inner.gate, 0.1)
    inputs = SimpleNamespace(model_output=setup.noisy, target=setup.noise, levels=TIMESTEPS)
    found = step.diffusion_per_sample(inputs)
    each = (setup.noisy - setup.noise).square().mean((1, 2, 3))
    torch.testing.assert_close(found, torch.where(setup.open, 0.1 * each, each))


def test_layer_weights_and_distance_replace_the_losss_own(tmp_path: Path) -> None:
    def trainer() -> SimpleNamespace:
        setup = Setup(Variant(weight=(1.0, 1.0)), tmp_path)
        setup.inner.loss_fn = SimpleNamespace(weights=[1.0, 0.5, 0.25])
        config = SimpleNamespace(run=SimpleNamespace(seed=0), data=SimpleNamespace(proportion_empty_prompts=0.1))
        step = SimpleNamespace(family=setup.family, schedule=setup.inner.gate.schedule, objective=setup.inner)
        return SimpleNamespace(
            config=config, step_loss=step, objective=setup.inner, step=0, folder=tmp_path, num_steps=5
        )

    changed = trainer()
    variants.apply(Variant(layer_weights=(0.0, 0.0, 1.0)), changed)
    assert changed.objective.loss_fn.weights == [0.0, 0.0, 1.0]
    assert isinstance(changed.step_loss.objective, VariantObjective)
    with pytest.raises(UserError, match="2 weights for 3 taps"):
        variants.apply(Variant(layer_weights=(0.0, 1.0)), trainer())
    variants.apply(Variant(distance="channel"), changed := trainer())
    assert changed.objective.loss_fn.kind == "channel"


def test_options_are_read_and_refused() -> None:
    variant, rest = parse(["--variant_guided=3,0.5", "--seed=1", "--variant_guided_both=true", "--no_use_lpl"])
    assert variant == Variant(guided=(3.0, 0.5), guided_both=True)
    assert rest == ["--seed=1", "--no_use_lpl"]
    for argv, said in (
        (["--variant_captions=some"], "neither captioned nor uncaptioned"),
        (["--variant_weight=1"], "expected two numbers"),
        (["--variant_weight=1,x"], "could not convert"),
        (["--variant_guided=3,0"], "share of the steps"),
        (["--variant_guided_both=true"], "acts with --variant_guided only"),
        (["--variant_loss_share=1"], "between 0 and 1"),
        (["--variant_distance=channel", "--variant_layer_weights=1,1"], "has no layers"),
        ([], "no --variant_ option"),
    ):
        with pytest.raises(UserError, match=said):
            parse(argv)
