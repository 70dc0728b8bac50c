"""What a run needs, added up: what stays on the device, and the peak of each phase of a step."""

from __future__ import annotations

from math import comb
from typing import NamedTuple

from lpl.analysis.rehearsal import Rehearsal
from lpl.analysis.states import state_name, state_size, workspace_size
from lpl.config import TrainConfig
from lpl.perceptual.gate import Gate
from lpl.training.step import timestep_weights


class Needs(NamedTuple):
    """Of one choice of options, in bytes and FLOPs."""

    base: int
    """Parameters of the model itself."""
    trained: int
    """Parameters that are trained."""
    stays: dict[str, int]
    """What is on the device all the time: weights, optimizer state and averages."""
    gradients: int
    kept: int
    """Activations that the denoiser keeps for its backward pass."""
    lpl: int
    """Peak of LPL, on top of what is there."""
    phases: dict[str, int]
    """The peak on the device in each phase of the run."""
    step_flops: int
    """Of a sample, without LPL."""
    lpl_flops: int
    """Of a sample that passes the gate."""
    p_gate: float
    """Probability that it does."""
    decoded: float
    """Share of the samples that go through LPL's decoder: p_gate, less what --lpl_max_samples leaves out."""
    taps: list[tuple[str, int, int, float]]
    """LPL's taps: name, channels, stride and weight."""

    @property
    def peak(self) -> int:
        """The most that is on the device at once."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def estimate(config: TrainConfig, rehearsal: Rehearsal, processes: int = 1) -> Needs:
    """Adds up what a run needs on each device.

    Weights, gradients and states are arithmetic; activations are counted. Left out: the device's context, workspace
    inside kernels, fragmentation.

    Args:
        config: with its resolution.
        rehearsal: of the model.
        processes: of the run; several keep the gradients a second time, in the buckets they exchange.
    """
    denoiser, parameters = rehearsal.denoiser(config), rehearsal.parameters(config)
    loss = rehearsal.loss(config) if config.lpl.use_lpl else None
    stays = fixed_costs(config, rehearsal, processes)
    if loss is not None and loss.copy:
        stays[f"LPL's decoder, {config.lpl.lpl_dtype}"] = loss.copy
    total, fused = sum(stays.values()), config.optim.fused_backward_pass
    gradients = parameters.itemsize * (parameters.largest if fused else parameters.trained)
    before = total + (gradients if config.run.gradient_accumulation_steps > 1 else 0)
    phases = {"caching": rehearsal.caching(config), "forward pass": before + denoiser.forward}
    if loss is not None:
        phases["LPL"] = before + denoiser.kept + loss.peak
    phases["backward pass"] = before + denoiser.backward
    if not fused:
        phases["optimizer step"] = total + gradients + optimizer_workspace(config, rehearsal)
    if _averages_there(config, rehearsal):
        # Its difference from the weights, of bfloat16 ones one after another; gradients are gone by then.
        phases["EMA update"] = total + (4 * parameters.trained if parameters.itemsize == 4 else 8 * parameters.largest)
    if config.logging.draws_images:
        phases["validation"] = total + _validation(config, rehearsal, stays[weights_name(rehearsal)])
    p_gate = 0.0 if loss is None else gate_probability(config, rehearsal)
    batch = config.run.train_batch_size
    return Needs(
        parameters.base,
        parameters.trained,
        stays,
        gradients,
        denoiser.kept,
        0 if loss is None else loss.peak,
        phases,
        denoiser.flops // batch,
        0 if loss is None else loss.flops,
        p_gate,
        decoded_share(p_gate, batch, config.lpl.lpl_max_samples, config.diffusion.timestep_sampling == "stratified"),
        [] if loss is None else loss.taps,
    )


def fixed_costs(config: TrainConfig, rehearsal: Rehearsal, processes: int) -> dict[str, int]:
    """Bytes that are on the device throughout, without LPL's; arithmetic alone."""
    parameters = rehearsal.parameters(config)
    state = state_size(config.optim, parameters.shapes, rehearsal.device)
    weights = weights_name(rehearsal)
    stays = {weights: parameters.size, state_name(config.optim): state}
    if _averages_there(config, rehearsal):
        stays["EMA"] = 4 * parameters.trained
    if processes > 1:
        stays["gradients in exchange"] = parameters.itemsize * parameters.trained
    return stays | ({"VAE, float32": rehearsal.vae()} if _keeps_vae(config, rehearsal) else {})


def weights_name(rehearsal: Rehearsal) -> str:
    """The row of the denoiser's weights."""
    return "UNet and text weights" if rehearsal.blueprint.trains_text else "UNet weights"


def _keeps_vae(config: TrainConfig, rehearsal: Rehearsal) -> bool:
    """Whether the VAE stays on the device, not only while caching and decoding."""
    return config.lpl.use_lpl or rehearsal.device == "cpu"


def _validation(config: TrainConfig, rehearsal: Rehearsal, weights: int) -> int:
    """Peak of drawing validation images on top of what stays: for decoding, the denoiser waits on the CPU."""
    sampling, decoding = rehearsal.validation(config)
    if not _keeps_vae(config, rehearsal):
        decoding += rehearsal.vae()
    return max(sampling, decoding - (0 if rehearsal.device == "cpu" else weights))


def optimizer_workspace(config: TrainConfig, rehearsal: Rehearsal) -> int:
    """What the optimizer writes out while it steps."""
    return workspace_size(config.optim, rehearsal.parameters(config).shapes, rehearsal.device)


def _averages_there(config: TrainConfig, rehearsal: Rehearsal) -> bool:
    """Whether an average is kept on the device."""
    return config.optim.use_ema and (config.optim.ema_device == "same" or rehearsal.device == "cpu")


def floor(config: TrainConfig, rehearsal: Rehearsal, processes: int = 1) -> int:
    """A bound from below on the peak, by arithmetic alone."""
    fixed = sum(fixed_costs(config, rehearsal, processes).values())
    if config.optim.fused_backward_pass:
        return fixed
    parameters = rehearsal.parameters(config)
    return fixed + parameters.itemsize * parameters.trained + optimizer_workspace(config, rehearsal)


def gate_probability(config: TrainConfig, rehearsal: Rehearsal) -> float:
    """How likely a sample passes LPL's gate."""
    schedule, options = rehearsal.blueprint.noise_scheduler, config.lpl
    gate = Gate(schedule, options.lpl_t_threshold, options.lpl_snr_threshold, options.lpl_sigma_threshold)
    return gate.probability(timestep_weights(schedule.config.num_train_timesteps, config.diffusion))


def decoded_share(p_gate: float, batch: int, limit: int | None, stratified: bool = False) -> float:
    """E[min(K, limit)] / batch for K of a batch's samples that pass the gate, each with probability p_gate.

    K is binomial, or, where timesteps are stratified, batch * p_gate rounded up or down.
    """
    if limit is None:
        return p_gate
    if stratified:
        fewest, more = int(batch * p_gate), batch * p_gate % 1
        return ((1 - more) * min(fewest, limit) + more * min(fewest + 1, limit)) / batch
    chances = (comb(batch, k) * p_gate**k * (1 - p_gate) ** (batch - k) for k in range(batch + 1))
    return sum(min(k, limit) * chance for k, chance in enumerate(chances)) / batch
