"""LPL as a term of a training loss: gate, scale, reduction, weight and gradient meter, for any loop.

    total = L_diffusion + lpl_weight * sum_i gate_i * scale_i * L_i / (B * p_gate)

Source: Berrada et al., ICLR 2025. Differs from the paper: it averages over all samples, zeros included, so its weight
is lpl_weight / p_gate. Differs from the diffusers project: that divides by the gated samples of each micro-batch
(lpl_reduction="gated"), which makes the weight depend on the batch size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lpl.diffusion.draws import keyed_uniform
from lpl.diffusion.prediction import (
    DISCRETE_TYPES,
    FLOW_TYPES,
    expand,
    output_sensitivity,
    signal_to_noise,
    x0_from_output,
)
from lpl.perceptual.auto_weight import AutoWeight, count_zero_gradients, gradient_of, zero_gradient
from lpl.perceptual.defaults import TARGET_SHARE
from lpl.perceptual.gate import Gate, snr_scale
from lpl.perceptual.input_checks import (
    FirstCalls,
    check_latents,
    check_mask,
    check_options,
    check_sigmas,
    check_timesteps,
    check_windows,
    diffusion_gradient,
    per_sample,
)
from lpl.perceptual.loss import LatentPerceptualLoss, LPLOutput, depth_of

logger = logging.getLogger(__name__)


class PerceptualTerm(NamedTuple):
    """LPL of one micro-batch."""

    loss: Tensor
    """Scalar, weighted: add it to the diffusion loss. An exact 0 without graph where no sample passed the gate."""
    metrics: dict[str, Tensor | float]
    """Scalars on the device, detached: reading one synchronises, keeping it does not. See read()."""
    num_samples: int
    """Samples that went through the decoder."""

    def read(self) -> dict[str, float]:
        """The metrics as numbers, for where they are logged. Synchronises.

        Raises:
            RuntimeError: LPL's gradient is exactly 0 for every gated sample that has a weight, a mask and a value
                that are not: it trains nothing.
        """
        numbers = {name: float(value) for name, value in self.metrics.items()}
        if fault := zero_gradient(numbers):
            raise RuntimeError(fault)
        return numbers


def describe(out: LPLOutput, snr: Tensor) -> dict[str, Tensor | float]:
    """Metrics of the samples that went through the decoder, under the diffusers project's names; snr: (B,)."""
    metrics: dict[str, Tensor | float] = {
        "lpl/loss": out.per_sample.detach().mean(),
        "lpl/snr_mean": snr.mean(),
        "lpl/snr_min": snr.min(),
        "lpl/snr_max": snr.max(),
    }
    for i, tap in enumerate(out.per_layer):
        prefix = f"lpl/features/layer_{i}"
        metrics[f"{prefix}/distance"] = out.per_layer[tap].mean()
        metrics[f"{prefix}/outlier_ratio"] = out.outlier_fraction[tap].mean()
        metrics[f"{prefix}/mean"] = out.feature_mean[tap].mean()
        metrics[f"{prefix}/std"] = out.feature_std[tap].mean()
    return metrics


IDLE_SAMPLES = 100
"""Samples that should have passed the gate by its probability, before none having passed is a warning."""


class PerceptualObjective:
    """Turns a model's output into the weighted LPL term.

    Pass timesteps and sigmas on the CPU where they were drawn there: the gate then costs no synchronisation.

    What is handed over is checked: shapes, devices, graphs, timesteps and sigmas at every call; what lies on the device
    (whether sigma is the noise fraction of noisy_latents, finite weights, a gradient of exactly 0) at the first
    `checked_calls` calls and where PerceptualTerm.read() is called.

    Args:
        loss_fn: the loss, or another callable of its signature that returns an LPLOutput.
        noise_scheduler: a diffusers scheduler: one with alphas_cumprod, or a flow-matching one (then pass sigmas); None
            for flow matching, with prediction_type; or a Schedule of diffusion/schedule.py.
        lpl_weight: against the diffusion loss; "auto" sets it from measured gradients (AutoWeight): pass
            diffusion_loss with every call and call end_step() after every optimizer step.
        lpl_t_threshold, lpl_snr_threshold, lpl_sigma_threshold: the gate, one; none: sigma / alpha of at most 3.
        lpl_scale: multiply by min(1, g / SNR), g = snr_gamma or 5.
        lpl_reduction: "expected" divides by B * p_gate, "gated" by the gated samples of the micro-batch.
        p_gate: probability of passing the gate: None for levels as a Schedule draws them, with a diffusers scheduler
            for uniform timesteps (for flow matching: uniform sigma, which a shift is not: see Gate); a number; or
            weights per timestep (T,).
        snr_gamma: g of lpl_scale.
        lpl_max_samples: decode at most this many gated samples a call (the first ones; rescaled, so unbiased where
            batches are shuffled).
        lpl_target_share: for "auto", LPL's share of the gradient at the model's output.
        prediction_type: one of diffusion.prediction.PREDICTION_TYPES; None: the scheduler's ("flow" without
            alphas_cumprod).
        seed: of the depths that a loss with random_depth stops at.
        lpl_start, lpl_warmup_steps: where one of them is above 0 the weight of optimizer step s (pass step with every
            call) is multiplied by min(1, (s - lpl_start + 1) / (n + 1)), n = lpl_warmup_steps, and is 0 before
            lpl_start: n steps of a linear ramp. "auto" measures without the ramp, so its weight is that of the whole
            run, and what acts is the product of both.
        checked_calls: calls whose values on the device are checked, a synchronisation or a few each; 0: none.

    Raises:
        ValueError: options that contradict each other or the schedule.
    """

    def __init__(
        self,
        loss_fn: LatentPerceptualLoss,
        noise_scheduler: Any,
        lpl_weight: float | Literal["auto"] = 1.0,
        lpl_t_threshold: int | None = None,
        lpl_scale: bool = True,
        lpl_reduction: Literal["expected", "gated"] = "expected",
        p_gate: float | Tensor | None = None,
        *,
        lpl_snr_threshold: float | None = None,
        lpl_sigma_threshold: float | None = None,
        snr_gamma: float | None = None,
        lpl_max_samples: int | None = None,
        lpl_target_share: float = TARGET_SHARE,
        prediction_type: str | None = None,
        seed: int = 0,
        lpl_start: int = 0,
        lpl_warmup_steps: int = 0,
        checked_calls: int = 3,
    ) -> None:
        check_options(loss_fn, lpl_weight, lpl_reduction, lpl_max_samples, snr_gamma, lpl_start, lpl_warmup_steps)
        if noise_scheduler is None and prediction_type not in FLOW_TYPES:
            raise ValueError(
                f"noise_scheduler is None and prediction_type {prediction_type!r}: without a scheduler say what the "
                "flow-matching model predicts: 'flow' (noise - latents) or 'flow_to_data' (latents - noise)"
            )
        self.loss_fn = loss_fn
        self.gate = Gate(noise_scheduler, lpl_t_threshold, lpl_snr_threshold, lpl_sigma_threshold)
        self.p_gate = self.gate.probability(p_gate)
        self.lpl_scale, self.snr_gamma, self.lpl_reduction = lpl_scale, snr_gamma, lpl_reduction
        self.lpl_max_samples, self.seed = lpl_max_samples, seed
        self.lpl_start, self.lpl_warmup_steps = lpl_start, lpl_warmup_steps
        self.auto = AutoWeight(lpl_target_share) if lpl_weight == "auto" else None
        self._weight = 0.0 if lpl_weight == "auto" else float(lpl_weight)
        self.schedule = self.gate.schedule
        self.prediction_type = prediction_type or self.schedule.prediction_type
        if self.prediction_type not in (FLOW_TYPES if self.gate.is_flow else DISCRETE_TYPES):
            kind = "a flow-matching" if self.gate.is_flow else "a discrete"
            fits = ", ".join(FLOW_TYPES if self.gate.is_flow else DISCRETE_TYPES)
            raise ValueError(
                f"prediction type {self.prediction_type!r} does not go with {kind} schedule, which has {fits}"
                + "; for flow matching pass noise_scheduler=None" * (not self.gate.is_flow)
            )
        if self.prediction_type == "epsilon":
            levels = self.schedule.at(range(self.schedule.num_timesteps))
            if (self.schedule.alpha_sigma(levels)[0][self.gate.table] == 0).any():
                raise ValueError(
                    "epsilon prediction says nothing where alpha is 0 (zero-terminal SNR): close the gate there"
                )
        self._first = FirstCalls(checked_calls)
        self._seen = self._passed = 0

    @property
    def weight(self) -> Tensor | float:
        """The weight where the ramp has ended."""
        return self._weight if self.auto is None else self.auto.weight

    def __call__(
        self,
        model_output: Tensor,
        noisy_latents: Tensor,
        latents: Tensor,
        timesteps: Tensor | None = None,
        sigmas: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        diffusion_loss: Tensor | None = None,
        step: int | None = None,
        windows: Tensor | None = None,
    ) -> PerceptualTerm:
        """LPL of one micro-batch.

        Args:
            model_output: (B, C, h, w), any float dtype; gradients flow into it alone. B = 0 gives an exact 0.
            noisy_latents: (B, C, h, w), float32, model space, exactly as they were made.
            latents: (B, C, h, w), the clean ones, model space.
            timesteps: (B,), integer timesteps of the schedule; not used for flow matching.
            sigmas: (B,), float32, flow matching alone: the noise fractions in [0, 1] that made noisy_latents.
            sample_weight: (B,), multiplies each sample's LPL.
            mask: (B, 1, h, w), 0 or more: how much each location counts, in a mean of that weight.
            diffusion_loss: the scalar that LPL is added to, for the gradient meter; its graph is kept. Not used in
                torch.no_grad().
            step: the optimizer step, the same on every process: with the seed it decides how deep a loss with
                random_depth goes. While "auto" measures, that is all the way. Needed for lpl_warmup_steps, too.
            windows: (B, 2) in [0, 1), for a loss with crop: where each sample's window lies.

        Per-sample values may be (B, 1) or (B, 1, 1, 1), too.

        Raises:
            ValueError: what does not fit the above or one another, a scheduler's timesteps or sigmas outside of its
                range, "auto" without diffusion_loss, random_depth, lpl_start or lpl_warmup_steps without step, or crop
                without windows; in the first calls, values on the device that cannot be right.
            RuntimeError: LPL's gradient is exactly 0 in the first calls, or "auto" without end_step().
        """
        check_latents(model_output, noisy_latents, latents)
        if self.auto is not None and diffusion_loss is None and torch.is_grad_enabled():
            raise ValueError("lpl_weight 'auto' measures gradients: pass diffusion_loss=")
        size = len(model_output)
        depth, weight = self._depth(step), self.weight_at(step)
        timesteps, alpha, sigma = self._coefficients(timesteps, sigmas, size)
        if sample_weight is not None:
            sample_weight = per_sample(sample_weight, size, "sample_weight")
            self._first.weights(sample_weight)
        if mask is not None:
            check_mask(mask, latents)
        if windows is not None:
            check_windows(windows, size)
        self._first.noise(noisy_latents, latents, alpha, sigma, "sigmas" if self.gate.is_flow else "timesteps")
        passed = self.gate.passes(timesteps, alpha, sigma).nonzero().flatten()
        gated = len(passed)
        self._expect_gated(size, gated)
        metrics: dict[str, Tensor | float] = {
            "lpl/num_samples": float(gated),
            "lpl/application_ratio": gated / max(size, 1),
            "lpl/weight": weight,
        }
        diffusion_square = None
        if diffusion_loss is not None and not size:  # a mean over nothing; "auto" takes part in its sum all the same
            diffusion_square = torch.zeros((), device=model_output.device)
        elif diffusion_loss is not None and (g := diffusion_gradient(diffusion_loss, model_output)) is not None:
            # Of each sample's own loss, whatever the size of the micro-batch that its mean is taken over.
            diffusion_square = g.float().square().sum() * size**2
            self._first.direction(g, model_output, noisy_latents, latents, sigma, self.prediction_type)
        if diffusion_square is not None:
            # LPL's is 0 unless samples pass: the share is one of means over all samples.
            metrics |= {"diffusion/gradient_square": diffusion_square / max(size, 1), "lpl/gradient_square": 0.0}
        if not gated:
            metrics["lpl/weighted_loss"] = 0.0
            if self.auto is not None and diffusion_square is not None:
                self.auto.measure(torch.zeros_like(diffusion_square), diffusion_square, 0, step)
            return PerceptualTerm(torch.zeros((), device=model_output.device), metrics, 0)

        chosen = passed[: self.lpl_max_samples]
        alpha, sigma = alpha[chosen].float(), sigma[chosen].float()
        snr = signal_to_noise(alpha, sigma)
        coefficient = snr_scale(snr, self.snr_gamma) if self.lpl_scale else torch.ones_like(snr)
        coefficient = coefficient * (gated / len(chosen))
        coefficient = coefficient / (size * self.p_gate if self.lpl_reduction == "expected" else gated)
        index = chosen.to(model_output.device, non_blocking=True)
        coefficient = coefficient.to(index.device, non_blocking=True)
        if sample_weight is not None:
            coefficient = coefficient * sample_weight.to(index.device, non_blocking=True)[index]
        mask = None if mask is None else mask[index]
        pred = x0_from_output(model_output[index], noisy_latents[index], alpha, sigma, self.prediction_type)
        out = self.loss_fn(
            pred, latents[index], mask, depth=depth, windows=None if windows is None else windows[chosen]
        )
        acts = self.auto is not None or bool(weight)
        gradient = gradient_of(out, pred, acts and (self._measuring or self._first.is_open("gradient")))
        loss = weight * (coefficient * out.per_sample).sum()
        metrics |= describe(out, snr) | {"lpl/weighted_loss": loss.detach()}
        if gradient is not None and acts:
            counts = count_zero_gradients(out.per_sample, gradient, coefficient, mask)
            metrics |= counts
            if self._first.due("gradient"):
                PerceptualTerm(loss, counts, len(chosen)).read()
        if gradient is not None and diffusion_square is not None:
            sensitivity = output_sensitivity(alpha, sigma, self.prediction_type)
            factor = coefficient * sensitivity.to(index.device, non_blocking=True)
            unit_square = (expand(factor, gradient) * gradient).float().square().sum() * size**2
            metrics["lpl/gradient_square"] = unit_square * weight**2 / size
            if self.auto is not None:
                self.auto.measure(unit_square, diffusion_square, gated, step)
        return PerceptualTerm(loss, metrics, len(chosen))

    def weight_at(self, step: int | None) -> Tensor | float:
        """The weight in an optimizer step: of lpl_weight or "auto", times the ramp."""
        return self.weight * self._ramp(step)

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Says that an optimizer step is done; "auto" then updates its weight. `reduce` sums over processes."""
        if self.auto is not None:
            self.auto.end_step(reduce)

    def _depth(self, step: int | None) -> int | None:
        reach = getattr(self.loss_fn, "reach", None)
        if reach is None or self._measuring:
            return None
        if step is None:
            raise ValueError("the loss stops at a random depth: pass step=, the optimizer step")
        return depth_of(keyed_uniform(self.seed, "lpl_depth", step), reach)

    def _ramp(self, step: int | None) -> float:
        if self.lpl_start == self.lpl_warmup_steps == 0:
            return 1.0
        if step is None:
            raise ValueError(
                f"{'lpl_warmup_steps' if self.lpl_warmup_steps else 'lpl_start'} needs step=, the optimizer step"
            )
        return min(1.0, max(0, step - self.lpl_start + 1) / (self.lpl_warmup_steps + 1))

    def _coefficients(
        self, timesteps: Tensor | None, sigmas: Tensor | None, size: int
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Timesteps (not for flow matching), alpha and sigma, (B,), on the CPU."""
        if self.schedule.is_flow:
            return None, *self.schedule.alpha_sigma(check_sigmas(sigmas, size))
        if sigmas is not None:
            raise ValueError("sigmas are for flow matching: this schedule has its own, so pass timesteps alone")
        timesteps = check_timesteps(timesteps, size, self.schedule.num_timesteps)
        return timesteps, *self.schedule.alpha_sigma(timesteps)

    def _expect_gated(self, size: int, gated: int) -> None:
        """Warns once where the gate stays shut that should have passed IDLE_SAMPLES samples by now."""
        before, self._seen, self._passed = self._seen, self._seen + size, self._passed + gated
        if not self._passed and before * self.p_gate < IDLE_SAMPLES <= self._seen * self.p_gate:
            logger.warning(
                "LPL has applied to none of %d samples, though its gate %s should pass %.3g %% of them: are these the "
                "%s that made noisy_latents, and is p_gate that of your draws?",
                self._seen, self.gate, 100 * self.p_gate, "sigmas" if self.gate.is_flow else "timesteps",
            )  # fmt: skip

    @property
    def _measuring(self) -> bool:
        return self.auto is not None and not self.auto.fixed


def gradient_share(lpl_square: float, diffusion_square: float) -> float:
    """r_lpl / (r_lpl + r_diffusion) from mean squared gradients; 0 where both are 0."""
    lpl, diffusion = lpl_square**0.5, diffusion_square**0.5
    return lpl / (lpl + diffusion) if lpl > 0 else 0.0
