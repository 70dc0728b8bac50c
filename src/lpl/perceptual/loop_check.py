"""lpl.check: whether LPL acts in a training loop, measured on batches as the loop makes them, before it trains.

With g the gradient of one sample's loss at the model's output, including the objective's scale by SNR but not its gate
and weight,

    ratio = sqrt(mean |g_lpl|^2) / sqrt(mean |g_diffusion|^2)
    cosine = mean of <g_lpl, g_diffusion> / (|g_lpl| |g_diffusion|)

by noise level, sigma / alpha, and by layer, for one layer's term alone. The uninformed distance is LPL between a sample
and the mean latent of its batch, one value per channel: that of an estimate that knows nothing of the sample.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lpl.base.arguments import integer
from lpl.diffusion.prediction import signal_to_noise, x0_from_output
from lpl.perceptual.auto_weight import gradient_of, zero_gradient
from lpl.perceptual.defaults import WALK_TOLERANCE
from lpl.perceptual.direction import direction_fault
from lpl.perceptual.effect import compared
from lpl.perceptual.input_checks import (
    CLEAR_SIGMA,
    FirstCalls,
    check_active,
    check_latents,
    diffusion_gradient,
    given,
    per_sample,
    scaled_gradient,
    unpacked,
)
from lpl.perceptual.loop_findings import Measured, numbers_of, table_of
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.perceptual.noise_levels import noise_levels, prediction_types, source_of
from lpl.perceptual.objective import PerceptualObjective, channels_of
from lpl.perceptual.precision import compare, walk_difference

PRECISION_SAMPLES = 2


class CheckResult(NamedTuple):
    """The result of lpl.check."""

    numbers: dict[str, Any]
    """Plain numbers, texts, lists and dicts."""
    table: str
    """The same for the terminal."""

    def __str__(self) -> str:
        return self.table


def check(
    loss: Any, objective: PerceptualObjective, batches: Iterable[Mapping[str, Any]], *, vae: Any = None, seed: int = 0
) -> CheckResult:
    """Measures LPL on a loop's own batches; neither the model, the objective nor the loss is changed.

    Args:
        loss: the loss that the objective was built with.
        objective: as the loop has it.
        batches: the arguments of the objective's calls by name, with the model's graph and with diffusion_loss. One
            batch is held at a time. Use 32 samples or more, of all noise levels; a gate is suggested from levels of 5
            samples or more, which takes about 200 samples.
        vae: the VAE whose decoder the loss uses; its decode is then run in every precision, and compared with the
            loss's walk through it.
        seed: seed of the bootstrap.

    Returns:
        By noise level and by layer: LPL's distance, and length and direction of its gradient against the diffusion
        loss's. Also the share of samples that passed the gate, p_gate, a suggested gate and weight, and warnings.

    Raises:
        ValueError: what the objective's calls refuse, reversed time, a diffusion loss that does not train the target
            that prediction_type gives, a decoder in training mode, batches without samples or diffusion_loss.
        RuntimeError: features that are detached, a gradient of exactly 0, values that are not finite in float32, or a
            walk whose image differs from decode's.
    """
    if not isinstance(objective, PerceptualObjective):
        raise ValueError(f"objective is {given(objective)}: pass the PerceptualObjective of the loop")
    if vae is not None and not (isinstance(vae, nn.Module) and callable(getattr(vae, "decode", None))):
        raise ValueError(f"vae is {given(vae)}: pass the module whose decode() makes images, or leave it out")
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches is {given(batches)}: pass a list, or a generator, of dicts of the calls' arguments")
    integer("seed", seed)
    if loss is not objective.loss_fn:
        raise ValueError("loss is not what the objective was built with: pass objective.loss_fn")
    found, first = Measured(objective), None
    checks = FirstCalls(1 << 30)
    measured = loss.uncropped() if isinstance(loss, LatentPerceptualLoss) else loss
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(f"batches: {given(batch)}; yield the arguments of the objective's calls by name, as dicts")
        _check_names(batch)
        latents = _measure_batch(found, measured, objective, dict(batch), checks)
        first = latents[:PRECISION_SAMPLES].detach() if first is None and len(latents) else first
    if first is None:
        raise ValueError("batches: there is no sample in them; yield batches as the loop makes them")
    if not found.has("lpl") or not bool((found.joined("alpha") > 0).any()):
        raise ValueError("batches: no sample is active and has a signal (alpha above 0): yield all noise levels")
    lpl, square = found.joined("lpl"), found.joined("lpl_square")
    if not bool((lpl.isfinite() & square.isfinite()).all()):
        raise RuntimeError("LPL or its gradient is not finite: look at the decoder's precision and weights")
    counted = float((lpl > 0).sum())
    without = float(((lpl > 0) & (square == 0)).sum())
    if fault := zero_gradient({"lpl/samples_with_loss": counted, "lpl/samples_without_gradient": without}):
        raise RuntimeError(fault)
    decoder = _decoder(loss, vae, first) if vae is not None else {}
    numbers = numbers_of(found, decoder, seed)
    return CheckResult(numbers, table_of(numbers))


def _check_names(call: Mapping[str, Any]) -> None:
    known = inspect.signature(PerceptualObjective.__call__).parameters
    missing = [name for name in ("model_output", "noisy_latents", "latents") if name not in call]
    unknown = [repr(name) for name in call if name not in known or name == "self"]
    if missing or unknown:
        what = f"{', '.join(missing)} missing" if missing else f"there is no argument {', '.join(unknown)}"
        raise ValueError(f"batches: {what}; yield the arguments of the objective's calls by name")


def _measure_batch(
    found: Measured, loss: Any, objective: PerceptualObjective, call: dict[str, Any], checks: FirstCalls
) -> Tensor:
    """Adds a batch's samples; returns its latents."""
    packed, unpack, kind = call["model_output"], call.get("unpack"), objective.prediction_type
    output, noisy, latents = unpacked(unpack, packed, call["noisy_latents"], call["latents"])
    check_latents(output, noisy, latents, channels_of(loss))
    size = len(output)
    if not size:
        return latents
    if call.get("diffusion_loss") is None:
        raise ValueError("batches: pass diffusion_loss, the scalar that LPL is added to")
    levels = (call.get("timesteps"), call.get("sigmas"), call.get("alphas"))
    timesteps, alpha, sigma = noise_levels(objective.gate, size, *levels)
    active = torch.ones(size, dtype=torch.bool) if call.get("active") is None else check_active(call["active"], size)
    passes = objective.gate.passes(timesteps, alpha, sigma) & active
    looked_at = sigma.where(active, torch.nan)
    checks.noise(noisy, latents, alpha, looked_at, source_of(objective.gate))
    wanted = diffusion_gradient(call["diffusion_loss"], packed)
    if wanted is None:
        raise ValueError("diffusion_loss has no graph: make the batches outside of torch.no_grad()")
    _check_direction(objective, (unpacked(unpack, wanted)[0], output, noisy, latents), alpha, looked_at)
    # pure noise holds nothing about x0
    rows = (active & ((alpha > 0) | (kind != "epsilon"))).nonzero().flatten()
    if not len(rows):
        return latents
    index = rows.to(output.device)
    alpha, sigma, passes = alpha[rows].float(), sigma[rows].float(), passes[rows]
    mask = None if call.get("mask") is None else call["mask"][index]
    x0, target = x0_from_output(output[index], noisy[index], alpha, sigma, kind), latents[index]
    with torch.no_grad():
        space = tuple(range(2, latents.dim()))
        blank = loss(target.float().mean((0, *space), keepdim=True).expand_as(target), target, mask).per_sample
    scale = objective.scale(signal_to_noise(alpha, sigma)).to(index.device)
    weight = (
        torch.ones(size)
        if call.get("sample_weight") is None
        else per_sample(call["sample_weight"], size, "sample_weight")
    )
    own = weight.to(index.device)[index]
    diffusion = size * wanted[index]
    layers, outliers, total, values = [], [], torch.zeros_like(diffusion), torch.zeros(())
    for part in _parts(loss):
        out = part(x0, target, mask)
        gradient_of(out, x0, needed=False)  # raises where it has no graph
        gradient = scaled_gradient((scale * out.per_sample).sum(), packed)
        assert gradient is not None  # gradient_of has checked that there is one
        gradient = gradient[index]
        layers.append(compared(gradient, diffusion))
        total, values = total + gradient, values.to(index.device) + out.per_sample.detach()
        outliers = list(out.outlier_fraction.values())
        found.taps = list(out.per_layer)
    found.add(
        alpha=alpha, sigma=sigma, passes=passes, lpl=values, uninformed=blank, own=own,
        factor=torch.full_like(alpha, 1 / objective.p_gate if objective.lpl_reduction == "expected" else
                               size / max(1, int(passes.sum()))),
    )  # fmt: skip
    found.add_gradients(compared(total, diffusion), layers if len(layers) > 1 else [])
    if outliers:
        found.add(outliers=torch.stack(outliers))
    return latents


def _check_direction(objective: PerceptualObjective, tensors: Sequence[Tensor], alpha: Tensor, sigma: Tensor) -> None:
    """Raises a ValueError where the diffusion loss trains another target than the objective's prediction_type."""
    clear = (sigma >= CLEAR_SIGMA[0]).nonzero().flatten()
    looked_at, kind = [x[clear.to(x.device)] for x in tensors], objective.prediction_type
    known = prediction_types(objective.gate)
    if len(clear) and (fault := direction_fault(looked_at, alpha[clear], sigma[clear], kind, known)):
        raise ValueError(fault)


def _parts(loss: Any) -> list[Any]:
    """The loss split into losses of one layer each, which add up to it; a loss of an unknown kind is not split."""
    if not isinstance(loss, LatentPerceptualLoss):
        return [loss]
    parts = []
    for number in range(len(loss.taps)):
        part = copy.copy(loss)
        part.weights = [weight if i == number else 0.0 for i, weight in enumerate(loss.weights)]
        parts.append(part)
    return parts


@torch.no_grad()
def _decoder(loss: Any, vae: Any, latents: Tensor) -> dict[str, Any]:
    """What the checks of a VAE's decoder find, on some latents."""
    raw = latents.float() if getattr(loss, "latent_space", None) is None else loss.latent_space.to_raw(latents.float())

    def decode(module: Any, dtype: torch.dtype) -> list[Tensor]:
        decoded = module.decode(raw.to(dtype))
        return [getattr(decoded, "sample", decoded)]

    numbers: dict[str, Any] = {"precision": compare(vae, decode), "walk_equals_decode": None, "walk_note": None}
    if not numbers["precision"]["float32"]["finite"]:
        raise RuntimeError("the decoder is not finite in float32: its weights are damaged, take another one")
    try:
        numbers["walk_equals_decode"] = walk_difference(vae, raw.to(next(vae.parameters()).dtype))
    except ValueError as error:
        numbers["walk_note"] = f"the walk was not held against decode: {error}"
    else:
        if not numbers["walk_equals_decode"] <= WALK_TOLERANCE:
            raise RuntimeError(
                f"LPL's walk through the decoder differs from decode by {numbers['walk_equals_decode']:.3g}: LPL would "
                "compare features of another image; take another decoder, and report this one"
            )
    return numbers
