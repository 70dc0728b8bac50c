"""Arms that `lpl train` has no options for: a run of it whose objective is changed in one place.

python -m benchmarks.quality.variants [--variant_...] [the options of lpl train]

variant_distance         squared or channel: a distance of latents in LPL's place, see control.py
variant_captions         captioned or uncaptioned: LPL on samples with, or without, a caption only
variant_loss_share       LPL's share of the *loss* (the paper's rule): with --lpl_weight 1; measured over the first
                         256 gated samples as L_lpl / (L_lpl + L_diffusion), then fixed
variant_weight           "a,b": the weight is multiplied by a at the first step, b at the last, linearly between
variant_layer_weights    "w,w,...": of the taps, middle block first, instead of the power law
variant_diffusion        factor of the diffusion loss of samples that pass the gate: below 1, LPL is the main loss there
variant_guided           "g,f": on a share f of the steps LPL is of the guided estimate of scale g,
                         x0_u + g (x0_c - x0_u), which takes a second pass without captions
variant_guided_both      whether its gradient flows through that second pass, too
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lpl.base.errors import StopRequestedError, TrainingStoppedError, UserError
from lpl.base.files import write_atomically
from lpl.diffusion.draws import keyed_uniform

MEASURED_SAMPLES = 256
STATE = "variant.json"
SCALED = {"lpl/weight": 1, "lpl/weighted_loss": 1, "lpl/gradient_square": 2}
"""Metrics that a factor of the weight changes, and the power of it that they have."""


@dataclass(frozen=True)
class Variant:
    """The options above, without their prefix; None: as lpl train does."""

    distance: str | None = None
    captions: str | None = None
    loss_share: float | None = None
    weight: tuple[float, float] | None = None
    layer_weights: tuple[float, ...] | None = None
    diffusion: float | None = None
    guided: tuple[float, float] | None = None
    guided_both: bool = False

    def __post_init__(self) -> None:
        for name, known in (("distance", ("squared", "channel")), ("captions", ("captioned", "uncaptioned"))):
            if getattr(self, name) not in (None, *known):
                raise UserError(f"--variant_{name} {getattr(self, name)}: is neither {known[0]} nor {known[1]}")
        if self.loss_share is not None and not 0 < self.loss_share < 1:
            raise UserError(f"--variant_loss_share {self.loss_share}: must lie between 0 and 1")
        if self.guided is not None and not 0 < self.guided[1] <= 1:
            raise UserError(
                f"--variant_guided: its share of the steps, {self.guided[1]}, must be above 0 and at most 1"
            )
        if self.guided_both and self.guided is None:
            raise UserError("--variant_guided_both acts with --variant_guided only")
        if self.distance is not None and self.layer_weights is not None:
            raise UserError("--variant_layer_weights: a distance of latents has no layers")
        if all(getattr(self, f.name) == f.default for f in fields(self)):
            raise UserError("no --variant_ option is given: use lpl train")


OPTIONS = {f"variant_{f.name}": f.name for f in fields(Variant)}


class Recording:
    """A family whose last call of the denoiser is known."""

    def __init__(self, family: Any) -> None:
        self.family = family
        self.last: tuple[Any, Tensor, Tensor, Any, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def denoise(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, text: Any, extra: Any) -> Tensor:
        """As the family's."""
        self.last = denoiser, noisy_latents, timesteps, text, extra
        output: Tensor = self.family.denoise(denoiser, noisy_latents, timesteps, text, extra)
        return output

    def captioned(self) -> Tensor:
        """(B,), on the CPU: which samples of the last call had a caption; a dropped one is all zeros."""
        assert self.last is not None
        return (self.last[3]["prompt_embeds"].flatten(1) != 0).any(1).cpu()

    def without_captions(self, index: Tensor) -> Tensor:
        """The output of some of the last call's samples without their captions."""
        assert self.last is not None
        denoiser, noisy_latents, timesteps, text, extra = self.last
        empty = {name: torch.zeros_like(value[index]) for name, value in text.items()}
        own = {name: value[index] for name, value in extra.items()}
        output: Tensor = self.family.denoise(denoiser, noisy_latents[index], timesteps[index], empty, own)
        return output.float()


class NarrowedGate:
    """A gate that only some of the samples of the next batch may pass."""

    def __init__(self, gate: Any) -> None:
        self.gate = gate
        self.open: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gate, name)

    def passes(self, timesteps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B,)."""
        found: Tensor = self.gate.passes(timesteps, alpha, sigma)
        return found if self.open is None else found & self.open


class GuidedLoss:
    """A loss of guided estimates where `other` is set: u + g (x - u) in the place of each estimate x."""

    def __init__(self, loss_fn: Any) -> None:
        self.loss_fn = loss_fn
        self.other: tuple[Tensor, Tensor] | None = None
        """u (B, C, h, w), and g (B,), for the next call."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss_fn, name)

    def __call__(self, pred_latents: Tensor, target_latents: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        """As the loss; the gradient it gives is that of the estimate."""
        if self.other is None:
            return self.loss_fn(pred_latents, target_latents, mask, **options)
        unconditional, scale = self.other
        scale = scale.view(-1, 1, 1, 1).to(pred_latents)
        out = self.loss_fn(unconditional + scale * (pred_latents - unconditional), target_latents, mask, **options)
        return out if out.gradient is None else out._replace(gradient=scale * out.gradient)


class LossShare:
    """The weight at which LPL has a share of the loss, from the sums of both over the first gated samples.

    Args:
        share: in (0, 1).
        file: keeps the weight once it is fixed, for a run that goes on.
    """

    def __init__(self, share: float, file: Path) -> None:
        self.share, self.file = share, file
        self.weight, self.samples, self.sums = 0.0, 0, [0.0, 0.0]
        if file.is_file():
            self.weight, self.samples = json.loads(file.read_text(encoding="utf-8"))["weight"], MEASURED_SAMPLES

    def measure(self, lpl: float, diffusion: float, samples: int) -> None:
        """Adds one step: both losses, LPL's at weight 1, and its gated samples."""
        if self.samples >= MEASURED_SAMPLES:
            return
        self.sums = [self.sums[0] + lpl, self.sums[1] + diffusion]
        self.samples += samples
        if self.sums[0] > 0:
            self.weight = self.share / (1 - self.share) * self.sums[1] / self.sums[0]
        if self.samples >= MEASURED_SAMPLES:
            write_atomically(self.file, json.dumps({"weight": self.weight}).encode())


class VariantObjective:
    """The objective that a training step calls, around the run's own.

    Args:
        inner: a PerceptualObjective.
        variant: what is changed.
        family: of the training step.
        alpha, sigma: (T,), the schedule.
        steps: of the run.
        seed: of the run.
        empty: share of captions that are dropped.
        folder: of the run.
    """

    def __init__(
        self,
        inner: Any,
        variant: Variant,
        family: Recording,
        alpha: Tensor,
        sigma: Tensor,
        steps: int,
        seed: int,
        empty: float,
        folder: Path,
    ) -> None:
        self.inner, self.variant, self.family, self.steps, self.seed = inner, variant, family, steps, seed
        self.alpha, self.sigma = alpha, sigma
        self.share = None if variant.loss_share is None else LossShare(variant.loss_share, folder / STATE)
        if variant.captions is not None:
            share = 1 - empty if variant.captions == "captioned" else empty
            if share == 0:
                raise UserError(f"--variant_captions {variant.captions}: there are no such samples")
            inner.gate = NarrowedGate(inner.gate)
            inner.p_gate = inner.p_gate * share
        if variant.guided is not None:
            inner.loss_fn = GuidedLoss(inner.loss_fn)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(
        self, model_output: Tensor, noisy_latents: Tensor, latents: Tensor, timesteps: Tensor, **options: Any
    ) -> Any:
        """As the inner one."""
        if self.variant.captions is not None:
            captioned = self.family.captioned()
            self.inner.gate.open = captioned if self.variant.captions == "captioned" else ~captioned
        step = int(options["step"])
        if self.variant.guided is not None:
            scale, share = self.variant.guided
            guided = keyed_uniform(self.seed, "variant_guided", step) < share
            self.inner.loss_fn.other = self._unconditional(noisy_latents, timesteps, scale) if guided else None
        term = self.inner(model_output, noisy_latents, latents, timesteps, **options)
        return self._scaled(term, self._factor(step, term, options["diffusion_loss"]))

    def _unconditional(self, noisy_latents: Tensor, timesteps: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
        """The other estimate of the samples that pass, and their scales: 1 where there is no caption."""
        from lpl.diffusion.prediction import x0_from_output

        timesteps = timesteps.cpu()
        passed = self.inner.gate.passes(timesteps, self.alpha[timesteps], self.sigma[timesteps])
        index = passed.nonzero().flatten()[: self.inner.lpl_max_samples]
        if not len(index):
            return None
        with torch.set_grad_enabled(self.variant.guided_both):
            output = self.family.without_captions(index)
            alpha, sigma = self.alpha[timesteps[index]].float(), self.sigma[timesteps[index]].float()
            other = x0_from_output(output, noisy_latents[index], alpha, sigma, self.inner.prediction_type)
        return other, torch.where(self.family.captioned()[index], scale, 1.0)

    def _factor(self, step: int, term: Any, diffusion_loss: Tensor) -> float:
        factor = 1.0
        if self.variant.weight is not None:
            first, last = self.variant.weight
            factor = first + (last - first) * min(1.0, step / max(1, self.steps - 1))
        if self.share is not None:
            weight = self.share.weight
            self.share.measure(float(term.loss.detach()), float(diffusion_loss.detach()), term.num_samples)
            factor *= weight
        return factor

    @staticmethod
    def _scaled(term: Any, factor: float) -> Any:
        if factor == 1.0:
            return term
        metrics = {name: value * factor ** SCALED.get(name, 0) for name, value in term.metrics.items()}
        return term._replace(loss=term.loss * factor, metrics=metrics)


def less_diffusion(step: Any, gate: Any, factor: float) -> None:
    """Multiplies the diffusion loss of a training step's samples that pass the gate by a factor."""
    plain = step.diffusion_per_sample

    def scaled(inputs: Any) -> Tensor:
        open_ = gate.passes(inputs.levels, *step.schedule.alpha_sigma(inputs.levels))
        each: Tensor = plain(inputs)
        return each * torch.where(open_, factor, 1.0).to(each)

    step.diffusion_per_sample = scaled


def apply(variant: Variant, trainer: Any) -> None:
    """Changes a trainer that is about to begin.

    Raises:
        UserError: options that do not go together.
    """
    from benchmarks.quality.control import LatentDistance

    config, step, objective = trainer.config, trainer.step_loss, trainer.objective
    if variant.distance is not None:
        objective.loss_fn = LatentDistance(variant.distance)
    if variant.layer_weights is not None:
        taps = len(objective.loss_fn.weights)
        if len(variant.layer_weights) != taps:
            raise UserError(f"--variant_layer_weights: {len(variant.layer_weights)} weights for {taps} taps")
        objective.loss_fn.weights = list(variant.layer_weights)
    if variant.diffusion is not None:
        less_diffusion(step, objective.gate, variant.diffusion)
    if trainer.step == 0:
        (trainer.folder / STATE).unlink(missing_ok=True)
    step.family = Recording(step.family)
    step.objective = VariantObjective(
        objective, variant, step.family, step.schedule.alpha, step.schedule.sigma, trainer.num_steps, config.run.seed,
        config.data.proportion_empty_prompts, trainer.folder,
    )  # fmt: skip


def parse(argv: list[str]) -> tuple[Variant, list[str]]:
    """The variant, and the options that are lpl train's.

    Raises:
        UserError: a value that cannot be.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.variants", allow_abbrev=False)
    for name in OPTIONS:
        parser.add_argument(f"--{name}")
    known, rest = parser.parse_known_args(argv)
    given = {OPTIONS[name]: value for name, value in vars(known).items() if value is not None}

    def numbers(text: str) -> tuple[float, ...]:
        return tuple(float(part) for part in text.split(","))

    read = {"loss_share": float, "diffusion": float, "weight": numbers, "guided": numbers, "layer_weights": numbers}
    try:
        values = {name: read.get(name, str)(text) for name, text in given.items()}
    except ValueError as error:
        raise UserError(f"--variant_: {error}") from error
    for name in ("weight", "guided"):
        if name in values and len(values[name]) != 2:
            raise UserError(f"--variant_{name} {given[name]}: expected two numbers, a,b")
    if "guided_both" in values:
        values["guided_both"] = values["guided_both"] == "true"
    return Variant(**values), rest


def train_variant(argv: list[str]) -> None:
    """A run of `lpl train` with the variant's change.

    Raises:
        UserError: bad options.
        TrainingStoppedError, StopRequestedError: as lpl.training.trainer.train.
    """
    from lpl.cli import parse_train
    from lpl.training.checkpoint import full_disk
    from lpl.training.preflight import preflight
    from lpl.training.stopping import stoppable

    variant, rest = parse(argv)
    config = parse_train(rest)
    if not config.lpl.use_lpl:
        raise UserError("--no_use_lpl: a variant changes LPL, so it needs --use_lpl")
    if variant.distance is not None and (config.lpl.lpl_random_depth or config.lpl.lpl_crop is not None):
        raise UserError("--lpl_random_depth and --lpl_crop act on a decoder, which a distance of latents has not")
    if variant.loss_share is not None and config.lpl.lpl_weight != 1:
        raise UserError(f"--variant_loss_share sets the weight: give --lpl_weight 1, not {config.lpl.lpl_weight}")
    checked = preflight(config)
    if checked.has_ended:
        return
    from lpl.training.trainer import Trainer

    with stoppable(config.run.max_minutes) as stop, full_disk(Path(config.run.output_dir)):
        trainer = Trainer(checked.config, checked, stop)
        apply(variant, trainer)
        trainer.fit()
        trainer.finish()


def main() -> int:
    """The exit code: those of `lpl train`."""
    try:
        train_variant(sys.argv[1:])
    except (UserError, TrainingStoppedError, StopRequestedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return {UserError: 2, TrainingStoppedError: 3, StopRequestedError: 4}[type(error)]
    return 0


if __name__ == "__main__":
    sys.exit(main())
