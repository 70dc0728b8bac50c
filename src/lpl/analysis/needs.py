"""What a run needs, added up: what stays on the device, and the peak of each phase of a step."""

from __future__ import annotations

from math import comb
from typing import NamedTuple

from lpl.config import TrainConfig
from lpl.perceptual.gate import Gate
from lpl.training.launch import splits
from lpl.training.rehearsal import HALF, Rehearsal
from lpl.training.states import state_name, state_size, workspace_size
from lpl.training.step import run_schedule


class Needs(NamedTuple):
    """What a run with one choice of options needs, in bytes and FLOPs."""

    base: int
    """Parameters of the model itself."""
    trained: int
    """Parameters that are trained."""
    stays: dict[str, int]
    """What is on the device all the time: weights, optimizer state and averages."""
    waiting: int
    """Weights in the computer's memory that are copied to the device while their block runs."""
    gradients: int
    kept: int
    """Activations that the denoiser keeps for its backward pass."""
    lpl: int
    """Peak of LPL, in addition to what is already on the device."""
    phases: dict[str, int]
    """The peak on the device in each phase of the run."""
    step_flops: int
    """For one sample, without LPL."""
    lpl_flops: int
    """For one sample that passes the gate."""
    p_gate: float
    """Probability that a sample passes the gate."""
    budget: float | None
    """The most that LPL costs on average, as a share of step_flops; None: no limit."""
    decoded: float
    """Share of the samples that go through LPL's decoder: p_gate, minus what --lpl_max_samples leaves out."""
    taps: list[tuple[str, int, int, float]]
    """LPL's taps: name, channels, stride and weight."""

    @property
    def mean_lpl_flops(self) -> float:
        """LPL's FLOPs for a sample, on average."""
        whole = self.decoded * self.lpl_flops
        return whole if self.budget is None else min(whole, self.budget * self.step_flops)

    @property
    def peak(self) -> int:
        """The most that is on the device at once."""
        return max(self.phases.values())

    @property
    def phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase])


def estimate(config: TrainConfig, rehearsal: Rehearsal, processes: int = 1) -> Needs:
    """Adds up what a run, with its resolution, needs on each device.

    Weights, gradients and states are arithmetic; activations are counted. Several processes hold the gradients twice,
    for the exchange in buckets. Left out: the device's context, workspace inside kernels, fragmentation.
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
        # Its difference from the weights; for bfloat16 weights one tensor at a time. Gradients are freed by then.
        phases["EMA update"] = total + (4 * parameters.trained if parameters.itemsize == 4 else 8 * parameters.largest)
    if config.logging.draws_images:
        # For decoding, the denoiser waits on the CPU.
        sampling, decoding = rehearsal.validation(config)
        decoding += 0 if _keeps_vae(config, rehearsal) else rehearsal.vae()
        phases["validation"] = total + max(sampling, decoding - (0 if rehearsal.device == "cpu" else parameters.size))
    batch, p_gate = config.run.train_batch_size, 0.0
    if loss is not None:
        shape, lpl = rehearsal.latents(config, 1), config.lpl
        schedule = run_schedule(rehearsal.blueprint.schedule, config.diffusion, shape[2] * shape[3])
        gate = Gate(schedule, lpl.lpl_t_threshold, lpl.lpl_snr_threshold, lpl.lpl_sigma_threshold)
        p_gate = gate.probability(None)
    return Needs(
        parameters.base,
        parameters.trained,
        stays,
        parameters.waiting,
        gradients,
        denoiser.kept,
        0 if loss is None else loss.peak,
        phases,
        denoiser.flops // batch,
        0 if loss is None else loss.flops,
        p_gate,
        config.lpl.lpl_budget if loss is not None else None,
        decoded_share(p_gate, batch, config.lpl.lpl_max_samples, config.diffusion.timestep_sampling == "stratified"),
        [] if loss is None else loss.taps,
    )


def fixed_costs(config: TrainConfig, rehearsal: Rehearsal, processes: int) -> dict[str, int]:
    """Bytes that are on the device all the time, without LPL's; only arithmetic."""
    parameters = rehearsal.parameters(config)
    state = state_size(config.optim, parameters.shapes, rehearsal.device)
    weights = f"{rehearsal.blueprint.denoiser_word} {'and text ' * bool(rehearsal.blueprint.trained_encoders)}weights"
    stays = {weights: parameters.size, state_name(config.optim): state}
    if _averages_there(config, rehearsal):
        stays["EMA"] = 4 * parameters.trained
    if processes > 1:
        stays["gradients in exchange"] = parameters.itemsize * parameters.trained
    return stays | ({"VAE, float32": rehearsal.vae()} if _keeps_vae(config, rehearsal) else {})


def _keeps_vae(config: TrainConfig, rehearsal: Rehearsal) -> bool:
    """Whether the VAE stays on the device, not only while caching and decoding."""
    return config.lpl.use_lpl or rehearsal.device == "cpu"


def optimizer_workspace(config: TrainConfig, rehearsal: Rehearsal) -> int:
    """What the optimizer writes out while it steps."""
    return workspace_size(config.optim, rehearsal.parameters(config).shapes, rehearsal.device)


def _averages_there(config: TrainConfig, rehearsal: Rehearsal) -> bool:
    """Whether an average is kept on the device."""
    return config.optim.use_ema and (config.optim.ema_device == "same" or rehearsal.device == "cpu")


def floor(config: TrainConfig, rehearsal: Rehearsal, processes: int = 1) -> int:
    """A lower bound of the peak, by arithmetic only."""
    fixed = sum(fixed_costs(config, rehearsal, processes).values())
    if config.optim.fused_backward_pass:
        return fixed
    parameters = rehearsal.parameters(config)
    return fixed + parameters.itemsize * parameters.trained + optimizer_workspace(config, rehearsal)


def decoded_share(p_gate: float, batch: int, limit: int | None, stratified: bool = False) -> float:
    """E[min(K, limit)] / batch; K: how many of a batch's samples pass the gate, each with probability p_gate.

    K is binomial, or, where timesteps are stratified, batch * p_gate rounded up or down.
    """
    if limit is None:
        return p_gate
    if stratified:
        fewest, more = int(batch * p_gate), batch * p_gate % 1
        return ((1 - more) * min(fewest, limit) + more * min(fewest + 1, limit)) / batch
    chances = (comb(batch, k) * p_gate**k * (1 - p_gate) ** (batch - k) for k in range(batch + 1))
    return sum(min(k, limit) * chance for k, chance in enumerate(chances)) / batch


def launched_estimate(config: TrainConfig, rehearsal: Rehearsal, processes: int) -> Needs:
    """What a run needs on each device as launched (see training.launch), with whole models or split ones."""
    return split_estimate(config, rehearsal, processes) if splits() else estimate(config, rehearsal, processes)


def launched_floor(config: TrainConfig, rehearsal: Rehearsal, processes: int) -> int:
    """A lower bound of launched_estimate's peak, by arithmetic only."""
    if splits():
        return sum(fixed_costs(config, rehearsal, 1).values()) // processes
    return floor(config, rehearsal, processes)


def split_estimate(config: TrainConfig, rehearsal: Rehearsal, processes: int) -> Needs:
    """As needs.estimate, with weights, gradients, optimizer state and average split over processes.

    Every process gathers the weights of the current block and of the next one, and keeps those that belong to no block;
    in the backward pass a block's whole gradients are there, and again in float32 to be summed. Activations and LPL are
    not split. Gathering is counted at its largest in every phase: an upper bound.
    """
    # Gradients freed at once, like a block's once they are summed, and weights that need no copy for autocast.
    dtype = "bfloat16" if config.run.mixed_precision in HALF and config.model.rank is None else "float32"
    changed = config.changed(fused_backward_pass=True, max_grad_norm=0.0, weights_dtype=dtype)
    alone, parameters = estimate(changed, rehearsal), rehearsal.parameters(config)
    blocks, rest = gathered_sizes(rehearsal, config)
    gathered = sum(sorted(blocks)[-2:]) + rest
    gradients = -(-4 * parameters.trained // processes)
    own = {name: size for name, size in alone.stays.items() if name.startswith(("VAE", "LPL"))}
    stays = {name: -(-size // processes) for name, size in fixed_costs(config, rehearsal, 1).items()} | own
    fixed, before = sum(stays.values()), sum(alone.stays.values())
    held = gradients if config.run.gradient_accumulation_steps > 1 else 0
    phases = {"caching": alone.phases["caching"]}
    for phase in ("forward pass", "LPL", "validation"):
        if phase in alone.phases:
            phases[phase] = fixed + alone.phases[phase] - before + gathered + (held if phase != "validation" else 0)
    summed = 0 if config.model.rank is not None else 2 * max(blocks)
    phases["backward pass"] = fixed + alone.phases["backward pass"] - before + gathered + gradients + summed
    phases["optimizer step"] = fixed + gradients + -(-optimizer_workspace(config, rehearsal) // processes)
    if "EMA update" in alone.phases:
        phases["EMA update"] = fixed + gradients
    return alone._replace(stays=stays | {"gathered blocks": gathered}, gradients=gradients, phases=phases)


def gathered_sizes(rehearsal: Rehearsal, config: TrainConfig) -> tuple[list[int], int]:
    """Bytes of each block's weights as gathered, and of those that belong to no block."""
    model = rehearsal.model(config)
    itemsize = 2 if config.run.mixed_precision in HALF else 4
    blocks = {f"{name}.": 0 for name, m in model.named_modules() if type(m).__name__ in model._no_split_modules}
    rest = 0
    for name, parameter in model.named_parameters():
        innermost = max((block for block in blocks if name.startswith(block)), key=len, default=None)
        if innermost is None:
            rest += itemsize * parameter.numel()
        else:
            blocks[innermost] += itemsize * parameter.numel()
    return list(blocks.values()), rest


def readable(size: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
