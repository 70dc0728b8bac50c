"""LPL as a term of a training loss: gate, scale, reduction, weight and gradient meter, for any loop.

    total = L_diffusion + lpl_weight * sum_i gate_i * scale_i * L_i / (B * p_gate)

Source: Berrada et al., ICLR 2025. Differs from the paper: it averages over all samples, zeros included, so its weight
is lpl_weight / p_gate. Differs from the diffusers project: that divides by the gated samples of each micro-batch
(lpl_reduction="gated"), which makes the weight depend on the batch size.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lpl.diffusion.draws import keyed_uniform
from lpl.diffusion.prediction import (
    DISCRETE_TYPES,
    FLOW_TYPES,
    alpha_sigma_table,
    expand,
    output_sensitivity,
    signal_to_noise,
    x0_from_output,
)
from lpl.perceptual.auto_weight import AutoWeight
from lpl.perceptual.gate import Gate, snr_scale
from lpl.perceptual.loss import LatentPerceptualLoss, LPLOutput
from lpl.perceptual.random_depth import depth_of


class PerceptualTerm(NamedTuple):
    """LPL of one micro-batch."""

    loss: Tensor
    """Scalar, weighted: add it to the diffusion loss. An exact 0 without graph where no sample passed the gate."""
    metrics: dict[str, Tensor | float]
    """Scalars on the device, detached: reading one synchronises, keeping it does not."""
    num_samples: int
    """Samples that went through the decoder."""


class PerceptualObjective:
    """Turns a model's output into the weighted LPL term.

    Pass timesteps and sigmas on the CPU where they were drawn there: the gate then costs no synchronisation.

    Args:
        loss_fn: the loss.
        noise_scheduler: a diffusers scheduler: one with alphas_cumprod, or a flow-matching one (then pass sigmas).
        lpl_weight: against the diffusion loss; "auto" sets it from measured gradients (AutoWeight): pass
            diffusion_loss with every call and call end_step() after every optimizer step.
        lpl_t_threshold, lpl_snr_threshold, lpl_sigma_threshold: the gate, one of them; t < 200 where none is given.
        lpl_scale: multiply by min(1, g / SNR), g = snr_gamma or 5.
        lpl_reduction: "expected" divides by B * p_gate, "gated" by the gated samples of the micro-batch.
        p_gate: probability of passing the gate: None for uniform timesteps, a number, or weights per timestep (T,).
        snr_gamma: g of lpl_scale.
        lpl_max_samples: decode at most this many gated samples a call (the first ones; rescaled, so unbiased where
            batches are shuffled).
        lpl_target_share: for "auto", LPL's share of the gradient at the model's output.
        prediction_type: one of diffusion.prediction.PREDICTION_TYPES; None: the scheduler's ("flow" without
            alphas_cumprod).
        seed: of the depths that a loss with random_depth stops at.
        lpl_start, lpl_warmup_steps: with n = lpl_warmup_steps above 0 the weight of optimizer step s (pass step with
            every call) is multiplied by min(1, (s - lpl_start + 1) / (n + 1)): n steps of a linear ramp. "auto"
            measures without the ramp, so its weight is that of the whole run, and what acts is the product of both.

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
        lpl_target_share: float = 0.2,
        prediction_type: str | None = None,
        seed: int = 0,
        lpl_start: int = 0,
        lpl_warmup_steps: int = 0,
    ) -> None:
        if lpl_warmup_steps < 0:
            raise ValueError(f"lpl_warmup_steps must be 0 or more, not {lpl_warmup_steps}")
        if lpl_reduction not in ("expected", "gated"):
            raise ValueError(f"lpl_reduction {lpl_reduction!r} is neither expected nor gated")
        if lpl_max_samples is not None and lpl_max_samples < 1:
            raise ValueError(f"lpl_max_samples must be at least 1, not {lpl_max_samples}")
        if snr_gamma is not None and snr_gamma <= 0:
            raise ValueError(f"snr_gamma must be positive, not {snr_gamma}")
        self.loss_fn = loss_fn
        self.gate = Gate(noise_scheduler, lpl_t_threshold, lpl_snr_threshold, lpl_sigma_threshold)
        self.p_gate = self.gate.probability(p_gate)
        self.lpl_scale, self.snr_gamma, self.lpl_reduction = lpl_scale, snr_gamma, lpl_reduction
        self.lpl_max_samples, self.seed = lpl_max_samples, seed
        self.lpl_start, self.lpl_warmup_steps = lpl_start, lpl_warmup_steps
        self.auto = AutoWeight(lpl_target_share) if lpl_weight == "auto" else None
        self._weight = 0.0 if lpl_weight == "auto" else float(lpl_weight)
        self._table = None if self.gate.is_flow else alpha_sigma_table(noise_scheduler)
        own = "flow" if self.gate.is_flow else noise_scheduler.config.prediction_type
        self.prediction_type = prediction_type or own
        if self.prediction_type not in (FLOW_TYPES if self.gate.is_flow else DISCRETE_TYPES):
            kind = "a flow-matching" if self.gate.is_flow else "a discrete"
            raise ValueError(f"prediction type {self.prediction_type!r} does not go with {kind} schedule")
        if (
            self._table is not None
            and self.prediction_type == "epsilon"
            and (self._table[0][self.gate.table] == 0).any()
        ):
            raise ValueError(
                "epsilon prediction says nothing where alpha is 0 (zero-terminal SNR): close the gate there"
            )

    @property
    def weight(self) -> Tensor | float:
        """The weight in force, after the ramp."""
        return self._weight if self.auto is None else self.auto.weight

    def __call__(
        self,
        model_output: Tensor,
        noisy_latents: Tensor,
        latents: Tensor,
        timesteps: Tensor,
        sigmas: Tensor | None = None,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        diffusion_loss: Tensor | None = None,
        step: int | None = None,
        windows: Tensor | None = None,
    ) -> PerceptualTerm:
        """LPL of one micro-batch.

        Args:
            model_output: (B, C, h, w), any float dtype; gradients flow into it alone.
            noisy_latents: (B, C, h, w), float32, model space, exactly as they were made.
            latents: (B, C, h, w), the clean ones, model space.
            timesteps: (B,), integer timesteps of the schedule; not used for flow matching.
            sigmas: (B,), float32, flow matching: the ones that made noisy_latents.
            sample_weight: (B,), multiplies each sample's LPL.
            mask: (B, 1, h, w) in [0, 1]: where LPL counts.
            diffusion_loss: the scalar that LPL is added to, for the gradient meter; its graph is kept.
            step: the optimizer step, the same on every process: with the seed it decides how deep a loss with
                random_depth goes. While "auto" measures, that is all the way. Needed for lpl_warmup_steps, too.
            windows: (B, 2) in [0, 1), for a loss with crop: where each sample's window lies.

        Raises:
            ValueError: half-precision noisy_latents, missing sigmas, "auto" without diffusion_loss, random_depth
                or lpl_warmup_steps without step, or crop without windows.
        """
        if noisy_latents.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"noisy_latents are {noisy_latents.dtype}: pass the float32 ones, not their cast")
        if self.auto is not None and diffusion_loss is None:
            raise ValueError("lpl_weight 'auto' measures gradients: pass diffusion_loss=")
        depth, weight = self._depth(step), self.weight * self._ramp(step)
        timesteps, sigmas = timesteps.cpu(), None if sigmas is None else sigmas.cpu()
        alpha, sigma = self._coefficients(timesteps, sigmas)
        passed = self.gate.passes(timesteps, alpha, sigma).nonzero().flatten()
        size, gated = len(model_output), len(passed)
        metrics: dict[str, Tensor | float] = {
            "lpl/num_samples": float(gated),
            "lpl/application_ratio": gated / size,
            "lpl/weight": weight,
        }
        diffusion_square = None
        if diffusion_loss is not None and diffusion_loss.requires_grad:
            (g,) = torch.autograd.grad(diffusion_loss, model_output, retain_graph=True)
            # Of each sample's own loss, whatever the size of the micro-batch that its mean is taken over.
            diffusion_square = g.float().square().sum() * size**2
            # LPL's is 0 unless samples pass: the share is one of means over all samples.
            metrics |= {"diffusion/gradient_square": diffusion_square / size, "lpl/gradient_square": 0.0}
        if not gated:
            metrics["lpl/weighted_loss"] = 0.0
            if self.auto is not None and diffusion_square is not None:
                self.auto.measure(torch.zeros_like(diffusion_square), diffusion_square, 0)
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
        pred = x0_from_output(model_output[index], noisy_latents[index], alpha, sigma, self.prediction_type)
        out = self.loss_fn(
            pred,
            latents[index],
            None if mask is None else mask[index],
            depth=depth,
            windows=None if windows is None else windows[chosen],
        )
        loss = weight * (coefficient * out.per_sample).sum()
        metrics |= _describe(out, snr) | {"lpl/weighted_loss": loss.detach()}
        if out.gradient is not None and diffusion_square is not None:
            sensitivity = output_sensitivity(alpha, sigma, self.prediction_type)
            factor = coefficient * sensitivity.to(index.device, non_blocking=True)
            unit_square = (expand(factor, out.gradient) * out.gradient).float().square().sum() * size**2
            metrics["lpl/gradient_square"] = unit_square * weight**2 / size
            if self.auto is not None:
                self.auto.measure(unit_square, diffusion_square, gated)
        return PerceptualTerm(loss, metrics, len(chosen))

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Says that an optimizer step is done; "auto" then updates its weight. `reduce` sums over processes."""
        if self.auto is not None:
            self.auto.end_step(reduce)

    def _depth(self, step: int | None) -> int | None:
        reach = self.loss_fn.reach
        if reach is None or (self.auto is not None and not self.auto.fixed):
            return None
        if step is None:
            raise ValueError("the loss stops at a random depth: pass step=, the optimizer step")
        return depth_of(keyed_uniform(self.seed, "lpl_depth", step), reach)

    def _ramp(self, step: int | None) -> float:
        if self.lpl_warmup_steps == 0:
            return 1.0
        if step is None:
            raise ValueError("lpl_warmup_steps needs step=, the optimizer step")
        return min(1.0, max(0, step - self.lpl_start + 1) / (self.lpl_warmup_steps + 1))

    def _coefficients(self, timesteps: Tensor, sigmas: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._table is not None:
            return self._table[0][timesteps], self._table[1][timesteps]
        if sigmas is None:
            raise ValueError("flow matching: pass sigmas, the float32 ones that made noisy_latents")
        return 1 - sigmas.double(), sigmas.double()


def gradient_share(lpl_square: float, diffusion_square: float) -> float:
    """r_lpl / (r_lpl + r_diffusion) from mean squared gradients; 0 where both are 0."""
    lpl, diffusion = lpl_square**0.5, diffusion_square**0.5
    return lpl / (lpl + diffusion) if lpl > 0 else 0.0


def _describe(out: LPLOutput, snr: Tensor) -> dict[str, Tensor | float]:
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
