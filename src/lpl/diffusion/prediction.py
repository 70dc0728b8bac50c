"""What a denoiser's output means: the clean latent it implies, its target, and the signal-to-noise ratio.

A noisy latent is x = alpha * x0 + sigma * eps (flow matching: alpha = 1 - s, sigma = s). With o the output:

    epsilon        o = eps                     x0 = (x - sigma * o) / alpha     |dx0/do| = sigma / alpha
    v_prediction   o = alpha * eps - sigma * x0    x0 = alpha * x - sigma * o   |dx0/do| = sigma
    sample         o = x0                      x0 = o                           |dx0/do| = 1
    flow           o = eps - x0                x0 = x - sigma * o               |dx0/do| = sigma
    flow_to_data   o = x0 - eps                x0 = x + sigma * o               |dx0/do| = sigma
    edm()          o = F of edm()              x0 = c_skip * x + c_out * o      |dx0/do| = c_out

v_prediction needs a process with alpha^2 + sigma^2 = 1, flow and flow_to_data one with alpha + sigma = 1, the others
any. Any other x0 that is linear in x and o is given by a function from alpha and sigma to c_skip and c_out
(Convention). If time runs the other way, with t = 1 as data, then sigma = 1 - t.

Sources: Ho et al. 2020 (epsilon), Salimans & Ho 2022 (v), Lipman et al. 2023 and Liu et al. 2023 (flow), Karras et al.
2022 (EDM). Everything is computed in float32 from the float32 noisy latent; never by scheduler.step, which clamps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpl.base.arguments import positive

DISCRETE_TYPES = ("epsilon", "v_prediction", "sample")
FLOW_TYPES = ("flow", "flow_to_data")
PREDICTION_TYPES = DISCRETE_TYPES + FLOW_TYPES

Convention = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""c_skip and c_out, (B,) each, of alpha and sigma, (B,): x0 = c_skip * x + c_out * o."""


def expand(value: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, ...) with as many dimensions, and on the same device, as `like`."""
    return value.to(like.device, non_blocking=True).view(-1, *[1] * (like.dim() - 1))


def edm(sigma_data: float = 0.5) -> Convention:
    """The preconditioned network F of EDM. With s = sigma / alpha (EDM's own sigma, where alpha is 1):

        x0 = c_skip * x + c_out * F    c_skip = d^2 / (s^2 + d^2) / alpha    c_out = s * d / sqrt(s^2 + d^2)

    Source: Karras et al. 2022 (arXiv 2206.00364), table 1; for alpha other than 1, not in the paper, its rule is
    applied to x / alpha.

    Args:
        sigma_data: d, the standard deviation of the latents that the network was built for.

    Raises:
        ValueError: sigma_data is no positive number.
    """
    positive("sigma_data", sigma_data)

    def coefficients(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        level = sigma / alpha
        total = level.square() + sigma_data**2
        return sigma_data**2 / total / alpha, level * sigma_data / total.sqrt()

    return coefficients


def alpha_sigma_table(noise_scheduler: Any) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t of a discrete variance-preserving schedule, each (T,), float64, on the CPU.

    alpha_t = sqrt(alphas_cumprod_t), sigma_t = sqrt(1 - alphas_cumprod_t).

    Raises:
        ValueError: a scheduler without alphas_cumprod (a flow schedule passes its sigmas instead).
    """
    cumprod = getattr(noise_scheduler, "alphas_cumprod", None)
    if cumprod is None:
        raise ValueError(f"{type(noise_scheduler).__name__} has no alphas_cumprod: pass sigmas (flow matching)")
    cumprod = torch.as_tensor(cumprod).detach().cpu().double()
    return cumprod.sqrt(), (1 - cumprod).clamp_min(0).sqrt()


def signal_to_noise(alpha: Tensor, sigma: Tensor) -> Tensor:
    """SNR = (alpha / sigma)^2, elementwise; inf where sigma is 0."""
    return (alpha / sigma).square()


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x = alpha * x0 + sigma * eps for latents and noise (B, ...) and coefficients (B,)."""
    return expand(alpha, latents) * latents + expand(sigma, latents) * noise


def coefficients_of(convention: Convention, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of a caller's own convention, (B,) each.

    Raises:
        ValueError: it is not a function of alpha and sigma that gives two tensors (B,).
    """
    wanted = "a prediction_type of your own takes alpha and sigma, (B,) each, and returns c_skip and c_out, (B,) each"
    if convention is edm:
        raise ValueError(f"{wanted}: pass edm(sigma_data), with the parentheses, not edm itself")
    found: Any = convention(alpha, sigma)
    pair = isinstance(found, tuple) and len(found) == 2 and all(isinstance(c, Tensor) for c in found)
    if not pair or any(c.numel() != len(alpha) for c in found):
        parts = found if isinstance(found, tuple) else [found]
        shapes = [f"{tuple(c.shape)}" if isinstance(c, Tensor) else f"a {type(c).__name__}" for c in parts]
        raise ValueError(f"{wanted}; for {len(alpha)} samples it returned {' and '.join(shapes)}")
    return found[0].reshape(len(alpha)), found[1].reshape(len(alpha))


def x0_from_output(
    model_output: Tensor, noisy_latents: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str | Convention
) -> Tensor:
    """The clean latent that a model output implies, by the table above.

    Args:
        model_output: (B, C, ...), any float dtype; cast to noisy_latents' dtype.
        noisy_latents: (B, C, ...), float32 or float64, model space.
        alpha, sigma: (B,), the coefficients that made noisy_latents.
        prediction_type: one of PREDICTION_TYPES, or a Convention.

    Returns:
        (B, C, ...), model space, in noisy_latents' dtype, differentiable in model_output.

    Raises:
        ValueError: half-precision noisy_latents, or an unknown prediction type.
    """
    if noisy_latents.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noisy_latents are {noisy_latents.dtype}: x0 needs the float32 ones, not their cast")
    o = model_output.to(noisy_latents.dtype)
    a, s = (expand(c.to(noisy_latents.dtype), noisy_latents) for c in (alpha, sigma))
    if prediction_type == "epsilon":
        return (noisy_latents - s * o) / a
    if prediction_type == "v_prediction":
        return a * noisy_latents - s * o
    if prediction_type == "sample":
        return o
    if prediction_type == "flow":
        return noisy_latents - s * o
    if prediction_type == "flow_to_data":
        return noisy_latents + s * o
    if callable(prediction_type):
        skip, out = (
            expand(c.to(noisy_latents.dtype), noisy_latents) for c in coefficients_of(prediction_type, alpha, sigma)
        )
        return skip * noisy_latents + out * o
    raise ValueError(f"unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")


def output_sensitivity(alpha: Tensor, sigma: Tensor, prediction_type: str | Convention) -> Tensor:
    """|dx0/do| of the table above, (B,)."""
    if callable(prediction_type):
        return coefficients_of(prediction_type, alpha, sigma)[1].abs()
    if prediction_type == "epsilon":
        return sigma / alpha
    return torch.ones_like(sigma) if prediction_type == "sample" else sigma


def target_of(
    latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str | Convention
) -> Tensor:
    """What the model should output for clean latents (B, C, ...) and the noise (B, C, ...) added to them.

    Raises:
        ValueError: an unknown prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return expand(alpha, noise) * noise - expand(sigma, latents) * latents
    if prediction_type == "sample":
        return latents
    if prediction_type == "flow":
        return noise - latents
    if prediction_type == "flow_to_data":
        return latents - noise
    if callable(prediction_type):
        skip, out = (expand(c.to(latents.dtype), latents) for c in coefficients_of(prediction_type, alpha, sigma))
        return (latents - skip * add_noise(latents, noise, alpha, sigma)) / out
    raise ValueError(f"unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")
