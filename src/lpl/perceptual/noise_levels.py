"""The noise levels of a call: alpha and sigma of its samples, from what a loop passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lpl.base.arguments import function
from lpl.diffusion.prediction import DISCRETE_TYPES, FLOW_TYPES, PREDICTION_TYPES, edm
from lpl.perceptual.gate import Gate
from lpl.perceptual.input_checks import check_sigmas, check_timesteps, per_sample


def prediction_types(gate: Gate) -> tuple[str, ...]:
    """The prediction types that a gate's process allows."""
    if gate.process is not None:
        return PREDICTION_TYPES
    return (*FLOW_TYPES, "sample") if gate.is_flow else DISCRETE_TYPES


def check_prediction_type(gate: Gate, prediction_type: Any) -> None:
    """Raises a ValueError where the gate's process does not allow it."""
    fits = prediction_types(gate)
    if gate.process is not None:
        process, hint = "a process of your own", ", or pass a function such as edm()"
    elif gate.is_flow:
        process, hint = "a flow-matching schedule", ""
    else:
        process, hint = "a discrete schedule", "; for flow matching pass noise_scheduler=None"
    if not callable(prediction_type) and prediction_type not in fits:
        raise ValueError(
            f"prediction type {prediction_type!r} does not go with {process}, which has {', '.join(fits)}{hint}"
        )
    if callable(prediction_type) and prediction_type is not edm:  # coefficients_of has more to say on edm
        function("prediction_type", prediction_type, "alpha, sigma")
    if prediction_type == "epsilon" and gate.process is None:
        levels = gate.schedule.at(range(gate.num_timesteps))
        if (gate.schedule.alpha_sigma(levels)[0][gate.table] == 0).any():
            raise ValueError(
                "epsilon prediction says nothing where alpha is 0 (zero-terminal SNR): close the gate there"
            )


def source_of(gate: Gate) -> str:
    """The arguments that noise levels come from."""
    if gate.process is not None:
        return "alphas and sigmas" if gate.process.function is None else "alpha_sigma"
    return "sigmas" if gate.is_flow else "timesteps"


def noise_levels(
    gate: Gate, size: int, timesteps: Tensor | None, sigmas: Tensor | None, alphas: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Timesteps (only of a discrete schedule, else None), alpha and sigma, (B,), on the CPU.

    Args:
        size: B.
        timesteps, sigmas, alphas: as passed to an objective.

    Raises:
        ValueError: one of them is missing, wrong, or not for the gate's process.
    """
    own = gate.process
    if alphas is not None and (own is None or own.function is not None):
        known = "a schedule" if own is None else "alpha_sigma"
        raise ValueError(f"alphas: the objective has {known} for them; pass {'timesteps' if own else source_of(gate)}")
    if own is not None and own.function is not None:
        if sigmas is not None:
            raise ValueError("sigmas: the objective has alpha_sigma for them; pass timesteps, the times that it takes")
        return None, *own.alpha_sigma(per_sample(timesteps, size, "timesteps"))
    if own is not None:
        if alphas is None or sigmas is None:
            raise ValueError(
                "pass alphas and sigmas of noisy_latents = alpha * latents + sigma * noise (alphas of 1 where noise is "
                "added to the latents as they are), or build the objective with noise_scheduler or alpha_sigma"
            )
        return None, *own.alpha_sigma((per_sample(alphas, size, "alphas"), per_sample(sigmas, size, "sigmas")))
    if gate.is_flow:
        return None, *gate.schedule.alpha_sigma(check_sigmas(sigmas, size))
    if sigmas is not None:
        raise ValueError("sigmas are for flow matching: this schedule has its own, so pass timesteps alone")
    timesteps = check_timesteps(timesteps, size, gate.num_timesteps)
    return timesteps, *gate.schedule.alpha_sigma(timesteps)
