"""LPL as a term of a training loss: gate, scale, reduction, weight and gradient meter, for any loop.

    total = L_diffusion + lpl_weight * sum_i gate_i * scale_i * L_i / (B * p_gate)

Source: Berrada et al., ICLR 2025. Differs from the paper, which averages over all samples, zeros included: its weight
is lpl_weight / p_gate. Differs from the diffusers project, which divides by the gated samples of each micro-batch
(lpl_reduction="gated"): its weight depends on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lpl.base.arguments import check_state, integer
from lpl.diffusion.draws import keyed_generator, keyed_uniform
from lpl.diffusion.own_process import AlphaSigma, OwnProcess
from lpl.diffusion.prediction import (
    FLOW_TYPES,
    Convention,
    expand,
    output_sensitivity,
    signal_to_noise,
    x0_from_output,
)
from lpl.diffusion.schedule import Distribution
from lpl.perceptual.auto_weight import AutoWeight, count_zero_gradients, gradient_of
from lpl.perceptual.budget import Budget, Spread, compare_spread, tap_flops
from lpl.perceptual.defaults import TARGET_SHARE
from lpl.perceptual.gate import Gate, Sampler, snr_scale
from lpl.perceptual.gate_watch import GateWatch
from lpl.perceptual.input_checks import (
    FirstCalls,
    check_active,
    check_budget,
    check_draws,
    check_latents,
    check_mask,
    check_options,
    check_process,
    check_windows,
    diffusion_gradient,
    per_sample,
    unpacked,
)
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.perceptual.noise_levels import check_prediction_type, noise_levels, prediction_types, source_of
from lpl.perceptual.random_depth import depth_of
from lpl.perceptual.term import PerceptualTerm, describe


class PerceptualObjective:
    """Turns a model's output into the weighted LPL term.

    Pass timesteps and sigmas on the CPU where they were drawn there: the gate then costs no synchronisation.

    Arguments are checked: shapes, devices, graphs, timesteps and sigmas at every call; values on the device (whether
    sigma is the noise fraction of noisy_latents, finite weights, a gradient of exactly 0) in the first `checked_calls`
    calls. PerceptualTerm.read() also checks for a gradient of exactly 0.

    Args:
        loss_fn: the loss, or another callable of its signature that returns an LPLOutput.
        noise_scheduler: a diffusers scheduler: one with alphas_cumprod, or a flow-matching one (then pass sigmas); or a
            Schedule of diffusion/schedule.py. None, and no alpha_sigma: flow matching where prediction_type is flow,
            flow_to_data or sample, else a process whose alphas and sigmas are passed with every call.
        lpl_weight: weight relative to the diffusion loss; "auto" sets it from measured gradients (AutoWeight): pass
            diffusion_loss with every call and call end_step() after every optimizer step.
        lpl_t_threshold, lpl_snr_threshold, lpl_sigma_threshold: the gate; pass at most one. None: sigma / alpha <= 3.
        lpl_scale: multiply by min(1, g / SNR), g = snr_gamma or 5.
        lpl_reduction: "expected" divides by B * p_gate, "gated" by the gated samples of the micro-batch.
        p_gate: probability of passing the gate (and of being active): None for levels as a Schedule draws them, with a
            diffusers scheduler for uniform timesteps (for flow matching: uniform sigma, which a shift is not: see
            Gate); a Distribution, such as Distribution("logit_normal", shift=3); a function that draws n levels; a
            number; or weights per timestep (T,). If the weight is a number and the reduction "expected", a share of
            passed samples that does not fit p_gate gives one warning.
        snr_gamma: g of lpl_scale.
        lpl_max_samples: decode at most this many gated samples a call (the first ones; rescaled, so unbiased where
            batches are shuffled).
        lpl_target_share: for "auto", LPL's share of the gradient at the model's output.
        prediction_type: one of diffusion.prediction.PREDICTION_TYPES, or a function such as edm() (see that module);
            None: the scheduler's ("flow" without alphas_cumprod).
        alpha_sigma: instead of noise_scheduler, a function from times (B,), passed as timesteps, to alpha and sigma.
        seed: for the depths that a loss with random_depth stops at, and the draws of lpl_budget.
        lpl_start, lpl_warmup_steps: where one of them is above 0 the weight of optimizer step s (pass step with every
            call) is multiplied by min(1, (s - lpl_start + 1) / (n + 1)), n = lpl_warmup_steps, and is 0 before
            lpl_start: n steps of a linear ramp. "auto" measures without the ramp; the effective weight is the product
            of its weight and the ramp.
        lpl_budget: LPL's mean cost as a share of step_flops. Which gated samples are decoded, and how deep, is then
            random, and terms are divided by their probabilities, so that value and gradient are the full ones on
            average (see Budget). Pass step_flops, and call end_step() after every optimizer step.
        step_flops: FLOPs of a sample's training step without LPL; also an attribute, to be set before the first call.
        checked_calls: calls whose values on the device are checked, a synchronisation or a few each; 0: none.

    Raises:
        ValueError: options that contradict each other or the schedule.
    """

    def __init__(
        self,
        loss_fn: LatentPerceptualLoss,
        noise_scheduler: Any = None,
        lpl_weight: float | Literal["auto"] = 1.0,
        lpl_t_threshold: int | None = None,
        lpl_scale: bool = True,
        lpl_reduction: Literal["expected", "gated"] = "expected",
        p_gate: float | Tensor | Distribution | Sampler | None = None,
        *,
        lpl_snr_threshold: float | None = None,
        lpl_sigma_threshold: float | None = None,
        snr_gamma: float | None = None,
        lpl_max_samples: int | None = None,
        lpl_target_share: float = TARGET_SHARE,
        prediction_type: str | Convention | None = None,
        alpha_sigma: AlphaSigma | None = None,
        seed: int = 0,
        lpl_start: int = 0,
        lpl_warmup_steps: int = 0,
        lpl_budget: float | None = None,
        step_flops: float | None = None,
        checked_calls: int = 3,
    ) -> None:
        check_options(
            loss_fn, lpl_weight, lpl_scale, lpl_reduction, lpl_max_samples, lpl_target_share, snr_gamma, seed=seed,
            lpl_start=lpl_start, lpl_warmup_steps=lpl_warmup_steps, checked_calls=checked_calls,
        )  # fmt: skip
        check_process(noise_scheduler, alpha_sigma, prediction_type)
        own = noise_scheduler is None and (alpha_sigma is not None or prediction_type not in (*FLOW_TYPES, "sample"))
        self.loss_fn = loss_fn
        thresholds = (lpl_t_threshold, lpl_snr_threshold, lpl_sigma_threshold)
        process = OwnProcess(alpha_sigma, prediction_type) if own else alpha_sigma
        self.gate = Gate(noise_scheduler, *thresholds, alpha_sigma=process)
        self.lpl_scale, self.snr_gamma, self.lpl_reduction = lpl_scale, snr_gamma, lpl_reduction
        self.lpl_max_samples, self.seed = lpl_max_samples, seed
        self.lpl_start, self.lpl_warmup_steps = lpl_start, lpl_warmup_steps
        self.auto = AutoWeight(lpl_target_share) if lpl_weight == "auto" else None
        self._weight = 0.0 if lpl_weight == "auto" else float(lpl_weight)
        self.prediction_type = prediction_type or self.gate.schedule.prediction_type
        check_prediction_type(self.gate, self.prediction_type)
        self.p_gate = self.gate.probability(p_gate)
        if lpl_budget is not None:
            check_budget(lpl_budget, lpl_reduction, loss_fn)
        self.lpl_budget, self.step_flops = lpl_budget, step_flops
        self.budget: Budget | None = None  # from the first call on
        self._loaded_budget: dict[str, Any] | None = None
        self._first = FirstCalls(checked_calls)
        self._calls, held = 0, checked_calls > 0 and self.auto is None and lpl_reduction == "expected"
        self._watch = GateWatch(self.gate, self.p_gate, held)

    @property
    def weight(self) -> Tensor | float:
        """The weight without the ramp."""
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
        *,
        active: Tensor | None = None,
        alphas: Tensor | None = None,
        unpack: Callable[[Tensor], Tensor] | None = None,
        draws: Tensor | None = None,
    ) -> PerceptualTerm:
        """LPL of one micro-batch.

        Args:
            model_output: (B, C, *space) with 1, 2 or 3 axes of space as the loss takes them, any float dtype; gradients
                flow into it alone. B = 0 gives an exact 0.
            noisy_latents: (B, C, *space), float32, model space, exactly as they were made.
            latents: (B, C, *space), the clean ones, model space.
            timesteps: (B,), integer timesteps of the schedule; what alpha_sigma takes; not used for flow matching.
            sigmas: (B,), float32, flow matching alone: the noise fractions in [0, 1] that made noisy_latents. With
                alphas: the noise's factor.
            sample_weight: (B,), multiplies each sample's LPL.
            mask: (B, 1, *space), 0 or more: how much each location counts, in a mean of that weight.
            diffusion_loss: the scalar that LPL is added to, for the gradient meter; its graph is kept. Not used in
                torch.no_grad().
            step: the optimizer step, the same on every process: with the seed it decides how deep a loss with
                random_depth goes. While "auto" measures, that is all the way. Needed for lpl_warmup_steps, too.
            windows: (B, 2) in [0, 1), for a loss with crop: where each sample's window lies.
            active: (B,) booleans: samples that LPL may apply to, such as those of MeanFlow with r == t. Others are
                treated as not passing the gate; B counts them.
            alphas: (B,), the signal's factor; with sigmas, for a process without noise_scheduler and alpha_sigma.
            unpack: function from a packed model_output (B, N, D) to (B, C, *space); also applied to noisy_latents and
                latents where they are packed. diffusion_loss may be computed from either form.
            draws: (B,) in [0, 1), uniform and independent of the noise levels, for lpl_budget: they decide whether a
                sample is decoded, and how deep. None: drawn from seed and the number of calls before; with several
                processes pass draws, or give each process its own seed.

        Per-sample values may be (B, 1) or (B, 1, 1, 1), too.

        Raises:
            ValueError: arguments that do not fit the above or one another, timesteps or sigmas outside the scheduler's
                range, "auto" without diffusion_loss, random_depth, lpl_start or lpl_warmup_steps without step, or crop
                without windows; in the first calls, values on the device that cannot be right.
            RuntimeError: LPL's gradient is exactly 0 in the first calls, or "auto" without end_step().
        """
        packed = model_output
        model_output, noisy_latents, latents = unpacked(unpack, model_output, noisy_latents, latents)
        check_latents(model_output, noisy_latents, latents, channels_of(self.loss_fn))
        if self.auto is not None and diffusion_loss is None and torch.is_grad_enabled():
            raise ValueError("lpl_weight 'auto' measures gradients: pass diffusion_loss=")
        size = len(model_output)
        step = None if step is None else integer("step", step, 0)
        depth, weight = self._depth(step), self.weight_at(step)
        timesteps, alpha, sigma = noise_levels(self.gate, size, timesteps, sigmas, alphas)
        if sample_weight is not None:
            sample_weight = per_sample(sample_weight, size, "sample_weight")
            self._first.weights(sample_weight)
        if mask is not None:
            check_mask(mask, latents)
        if windows is not None:
            check_windows(windows, size)
        passes, looked_at = self.gate.passes(timesteps, alpha, sigma), sigma
        if active is not None:
            active = check_active(active, size)
            passes, looked_at = passes & active, sigma.where(active, torch.nan)
        self._first.noise(noisy_latents, latents, alpha, looked_at, source_of(self.gate))
        passed = passes.nonzero().flatten()
        gated = len(passed)
        self._watch(size, gated)
        if self.auto is None and torch.is_grad_enabled() and not self._ramp(step):  # before lpl_start: no decoding
            passed, gated = passed[:0], 0
        metrics: dict[str, Tensor | float] = {
            "lpl/num_samples": float(gated),
            "lpl/application_ratio": gated / max(size, 1),
            "lpl/weight": weight,
        }
        diffusion_square = None
        if diffusion_loss is not None and not size:  # an empty batch: "auto" still needs its sum
            diffusion_square = torch.zeros((), device=model_output.device)
        elif diffusion_loss is not None and (g := diffusion_gradient(diffusion_loss, packed)) is not None:
            # Gradients of each sample's own loss, undoing the mean over the micro-batch.
            diffusion_square = g.float().square().sum() * size**2
            tensors = (*unpacked(unpack, g), model_output, noisy_latents, latents)
            self._first.direction(tensors, alpha, looked_at, self.prediction_type, prediction_types(self.gate))
        if diffusion_square is not None:
            # LPL's is 0 unless samples pass: the share compares means over all samples.
            metrics |= {"diffusion/gradient_square": diffusion_square / max(size, 1), "lpl/gradient_square": 0.0}
        spread, decoded = None, passed
        if self.lpl_budget is not None:
            spread = self._spread(passed, alpha, sigma, latents, draws)
            assert self.budget is not None
            decoded = passed[spread.decoded]
            run = spread.first(len(decoded) if self.lpl_max_samples is None else self.lpl_max_samples)
            metrics |= {"lpl/cost": self.budget.cost_of(run) / max(size, 1), "lpl/loss": 0.0}
        if not len(decoded):
            metrics["lpl/weighted_loss"] = 0.0
            if self.auto is not None and diffusion_square is not None:
                self.auto.measure(torch.zeros_like(diffusion_square), diffusion_square, 0, step)
            if spread is not None and self.budget is not None and torch.is_grad_enabled():
                self.budget.measure(spread, model_output.new_zeros(0))
            return PerceptualTerm(torch.zeros((), device=model_output.device), metrics, 0)

        chosen = decoded[: self.lpl_max_samples]
        alpha, sigma = alpha[chosen].float(), sigma[chosen].float()
        snr = signal_to_noise(alpha, sigma)
        coefficient = self.scale(snr) * (len(decoded) / len(chosen))
        coefficient = coefficient / (size * self.p_gate if self.lpl_reduction == "expected" else gated)
        index = chosen.to(model_output.device, non_blocking=True)
        coefficient = coefficient.to(index.device, non_blocking=True)
        if sample_weight is not None:
            coefficient = coefficient * sample_weight.to(index.device, non_blocking=True)[index]
        mask = None if mask is None else mask[index]
        noisy_latents = noisy_latents.detach()  # some loops have it require gradients
        pred = x0_from_output(model_output[index], noisy_latents[index], alpha, sigma, self.prediction_type)
        windows = None if windows is None else windows[chosen]
        if spread is None or self.budget is None:
            out = self.loss_fn(pred, latents[index], mask, depth=depth, windows=windows)
        else:
            spread = spread.first(len(chosen))
            out = compare_spread(self.loss_fn, pred, latents[index], mask, windows, spread)
        acts = self.auto is not None or bool(weight)
        gradient = gradient_of(out, pred, acts and (self._measuring or self._first.is_open("gradient")))
        loss = weight * (coefficient * out.per_sample).sum()
        metrics |= describe(out, snr) | {"lpl/weighted_loss": loss.detach()}
        if spread is not None:  # the mean over gated samples, on average: values are divided by probabilities
            metrics["lpl/loss"] = out.per_sample.detach().sum() * (len(decoded) / len(chosen) / gated)
        if gradient is not None and acts:
            counts = count_zero_gradients(out.per_sample, gradient, coefficient, mask)
            metrics |= counts
            if self._first.due("gradient"):
                PerceptualTerm(loss, counts, len(chosen)).read()
        measures = self.budget is not None and not self.budget.fixed
        if gradient is not None and (diffusion_square is not None or measures):
            sensitivity = output_sensitivity(alpha, sigma, self.prediction_type)
            factor = coefficient * sensitivity.to(index.device, non_blocking=True)
            squares = (expand(factor, gradient) * gradient).float().square()
            if spread is not None and self.budget is not None:
                decoded_with = spread.reach[:, 0].to(squares, non_blocking=True)
                squares = squares.flatten(1).sum(1) * decoded_with  # terms divided by p are weighted with p
                self.budget.measure(spread, squares)
            unit_square = squares.sum() * size**2
            if diffusion_square is not None:
                metrics["lpl/gradient_square"] = unit_square * weight**2 / size
                if self.auto is not None:
                    self.auto.measure(unit_square, diffusion_square, len(decoded), step)
        return PerceptualTerm(loss, metrics, len(chosen))

    def weight_at(self, step: int | None) -> Tensor | float:
        """The weight in an optimizer step: that of lpl_weight or "auto", times the ramp."""
        return self.weight * self._ramp(step)

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Call it after each optimizer step, for "auto" and lpl_budget. `reduce` sums a tensor over processes."""
        for measured in (self.auto, self.budget):
            if measured is not None:
                measured.end_step(reduce)

    def discard_step(self) -> None:
        """Forgets what the optimizer step under way has measured; call it instead of end_step() for a skipped step."""
        for measured in (self.auto, self.budget):
            if measured is not None:
                measured.discard_step()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, after end_step(): of "auto", of lpl_budget, and the number of draws."""
        budget = self._loaded_budget if self.budget is None else self.budget.state_dict()
        return {"auto": self.auto and self.auto.state_dict(), "budget": budget, "calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what state_dict gave, of an objective with the same options.

        Raises:
            ValueError: the state is of an objective with other options, or of another kind.
        """
        check_state("an objective", state, {"auto": AutoWeight.STATE, "budget": Budget.STATE, "calls": int})
        for name, has in (("auto", self.auto is not None), ("budget", self.lpl_budget is not None)):
            if state[name] is not None and not has:
                option = "lpl_weight 'auto'" if name == "auto" else "lpl_budget"
                raise ValueError(f"the state is of an objective with {option}, which this one lacks: build it alike")
        if self.auto is not None and state["auto"] is not None:
            self.auto.load_state_dict(state["auto"])
        self._calls, self._loaded_budget = state["calls"], state["budget"]
        if self.budget is not None and self._loaded_budget is not None:
            self.budget.load_state_dict(self._loaded_budget)

    def count(self, shape: Sequence[int]) -> None:
        """Counts the FLOPs that lpl_budget needs for latents of this shape, (C, *space); else the first call does.

        Raises:
            ValueError: step_flops is not set, or not a positive number; or the shape is none.
        """
        if self.lpl_budget is not None and self.budget is None:
            if self.step_flops is None:
                raise ValueError(f"lpl_budget {self.lpl_budget} is a share of a training step: pass step_flops=")
            self.budget = Budget(self.lpl_budget, self.step_flops, tap_flops(self.loss_fn, shape), self.p_gate)
            if self._loaded_budget is not None:
                self.budget.load_state_dict(self._loaded_budget)

    def _spread(self, passed: Tensor, alpha: Tensor, sigma: Tensor, latents: Tensor, draws: Tensor | None) -> Spread:
        """Which gated samples are decoded, and how deep."""
        self.count(latents.shape[1:])
        assert self.budget is not None
        if draws is None:
            draws = torch.rand(len(alpha), generator=keyed_generator(self.seed, "lpl_budget", self._calls))
            self._calls += 1
        draws = check_draws(draws, len(alpha))
        return self.budget.spread(alpha[passed], sigma[passed], draws[passed], self._measuring)

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
            name = "lpl_warmup_steps" if self.lpl_warmup_steps else "lpl_start"
            raise ValueError(f"{name} needs step=, the optimizer step")
        return min(1.0, max(0, step - self.lpl_start + 1) / (self.lpl_warmup_steps + 1))

    def scale(self, snr: Tensor) -> Tensor:
        """The factor of each sample's LPL for its noise level; snr: (B,)."""
        return snr_scale(snr, self.snr_gamma) if self.lpl_scale else torch.ones_like(snr)

    @property
    def _measuring(self) -> bool:
        return self.auto is not None and not self.auto.fixed


def channels_of(loss_fn: Any) -> int | None:
    """Channels of the latents that a loss takes, where it states them."""
    return getattr(getattr(loss_fn, "decoder", None), "latent_channels", None)
