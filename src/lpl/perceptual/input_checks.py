"""Checks of what an objective is built and called with; each ValueError says what was given and what to do.

What the host knows (shapes, dtypes, devices, graphs, timesteps and sigmas) is checked at every call. Values on the
device are read only in the first calls (FirstCalls): each reading waits for the device.
"""

import logging
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpl.base.arguments import flags, function, integer, is_number, positive
from lpl.diffusion.prediction import Convention, expand
from lpl.perceptual.decoders import is_own
from lpl.perceptual.direction import direction_fault

logger = logging.getLogger(__name__)

CLEAR_SIGMA = (0.05, 0.3)
"""Noise fractions at which the noise implied by noisy and clean latents tells right from wrong. Below them rounding
matters; within them reversed time implies a standard deviation over 2, at least (1 - sigma) / sigma, for any
latents."""
NOISE_STD = (0.1, 2.0)
"""A standard deviation of implied noise outside this range is an error. Usual noise has about 1, or less where it is
added only inside a mask."""
MIN_PLACES = 16
"""Fewest values of a channel for a meaningful standard deviation."""
REVERSED = {"sigmas": "pass sigmas=1 - t where t = 1 is data", "timesteps": "timestep 0 is the least noise"}
"""How to undo reversed time, by the argument that the noise level comes from."""
ROUNDING = 1e-4
"""How far rounding may take sigmas beyond [0, 1]."""


def given(value: Any) -> str:
    """What was passed, in words: dtype, shape and device of a tensor, else the type."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"


def check_options(
    loss_fn: Any, lpl_weight: Any, lpl_scale: Any, lpl_reduction: Any, lpl_max_samples: Any, lpl_target_share: Any,
    snr_gamma: Any, **counts: Any,
) -> None:  # fmt: skip
    """Checks an objective's options."""
    if not callable(loss_fn) or hasattr(loss_fn, "decode"):
        raise ValueError(f"loss_fn is {given(loss_fn)}: pass LatentPerceptualLoss(vae)")
    one = is_number(lpl_weight) or (isinstance(lpl_weight, Tensor) and lpl_weight.numel() == 1)
    if lpl_weight != "auto" and not one:
        raise ValueError(f"lpl_weight {lpl_weight!r} is neither a number nor 'auto'")
    if lpl_weight != "auto" and not 0 <= float(lpl_weight) < math.inf:
        raise ValueError(f"lpl_weight must be 0 or more and finite, not {lpl_weight}")
    if lpl_reduction not in ("expected", "gated"):
        raise ValueError(f"lpl_reduction {lpl_reduction!r} is neither expected nor gated")
    if lpl_max_samples is not None:
        integer("lpl_max_samples", lpl_max_samples, 1)
    if not is_number(lpl_target_share) or not 0 < lpl_target_share < 1:
        raise ValueError(f"lpl_target_share must lie between 0 and 1, not {lpl_target_share!r}")
    if snr_gamma is not None:
        positive("snr_gamma", snr_gamma)
    flags(lpl_scale=lpl_scale)
    for name, count in counts.items():
        integer(name, count, None if name == "seed" else 0)


def check_process(noise_scheduler: Any, alpha_sigma: Any, prediction_type: Any) -> None:
    """Checks that process and prediction type are known."""
    if noise_scheduler is None and prediction_type is None:
        raise ValueError(
            "noise_scheduler and prediction_type are both None: say what the model predicts, such as 'flow' (noise - "
            "latents), 'flow_to_data' (latents - noise) or 'epsilon' (noise)"
        )
    if alpha_sigma is not None:
        function("alpha_sigma", alpha_sigma, "time")


def check_budget(lpl_budget: Any, lpl_reduction: str, loss_fn: Any) -> None:
    """Checks lpl_budget, and the options that it excludes."""
    if not isinstance(lpl_budget, Real) or not 0 < float(lpl_budget) < math.inf:
        raise ValueError(f"lpl_budget must be a positive number, a share of a step's cost, not {lpl_budget!r}")
    if lpl_reduction == "gated":
        raise ValueError("lpl_budget needs lpl_reduction 'expected': a mean over the decoded samples is biased")
    if getattr(loss_fn, "norm_type", None) == "batch":
        raise ValueError(
            "lpl_budget does not go with norm_type 'batch', whose scale depends on which samples are decoded"
        )
    if getattr(loss_fn, "reach", None) is not None:
        raise ValueError("lpl_budget draws its own depths: drop random_depth")
    if not hasattr(loss_fn, "on_meta"):
        raise ValueError(f"lpl_budget needs a LatentPerceptualLoss, not {given(loss_fn)}")
    if is_own(loss_fn.decoder):
        raise ValueError("lpl_budget needs a decoder's cost, and your own is not counted: use lpl_max_samples=")


def check_latents(model_output: Tensor, noisy_latents: Tensor, latents: Tensor, channels: int | None = None) -> None:
    """Three floating-point tensors of one shape (B, C, *space) on one device, noisy_latents in full precision.

    Args:
        channels: those of the latents that the loss takes, where known.
    """
    every = {"model_output": model_output, "noisy_latents": noisy_latents, "latents": latents}
    for name, value in every.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{name}: {given(value)}; pass a floating-point tensor (B, C, *space)")
    if noisy_latents.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"noisy_latents are {noisy_latents.dtype}: pass the float32 ones, not their cast")
    for name, value in every.items():
        packed = value.dim() == 3 and channels is not None and value.shape[1] != channels
        if value.dim() < max(3, latents.dim()) or packed:
            raise ValueError(
                f"{name}: {given(value)}; latents are (B, C, *space): unpack packed ones with "
                f"{unpacking(value, latents)}"
            )
    if not model_output.shape == noisy_latents.shape == latents.shape:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in every.items())
        variance = model_output.shape[1] == 2 * latents.shape[1]
        hint = "; for a model that also predicts a variance pass model_output.chunk(2, dim=1)[0]" if variance else ""
        raise ValueError(f"shapes differ: {shapes}{hint}")
    if not model_output.device == noisy_latents.device == latents.device:
        devices = ", ".join(f"{name} on {value.device}" for name, value in every.items())
        raise ValueError(f"devices differ: {devices}; move them to model_output's")
    if torch.is_grad_enabled() and not model_output.requires_grad:
        raise ValueError(
            "model_output carries no gradient, so LPL would train nothing: pass the model's own output, not a detached "
            "one (to evaluate, call inside torch.no_grad())"
        )


def unpacking(tokens: Tensor, latents: Tensor) -> str:
    """The argument that makes latents (B, C, h, w) of tokens (B, N, D), as text: patches of p x p cells in rows."""
    example = "unpack=, a function from (B, N, D) to them"
    if tokens.dim() != 3 or latents.dim() != 4:
        return example
    (count, width), (channels, h, w) = tokens.shape[1:], latents.shape[1:]
    for p in range(1, min(h, w) + 1):
        if h % p == w % p == 0 and (count, width) == (h * w // p**2, channels * p**2):
            return (
                f"unpack=lambda x: x.unflatten(1, ({h // p}, {w // p})).unflatten(3, ({channels}, {p}, {p}))"
                ".permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3) (where a token is channels x rows x columns)"
            )
    return example


def unpacked(unpack: Callable[[Tensor], Tensor] | None, packed: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Latents (B, C, *space) from packed ones, and from others with as many axes; unpack None: not packed."""
    tensors = (packed, *others)
    if unpack is None:
        return tensors
    function("unpack", unpack, "packed")
    return tuple(unpack(x) if x.dim() == packed.dim() else x for x in tensors)


def per_sample(value: Any, batch: int, name: str) -> Tensor:
    """One value per sample as (B,); (B, 1), (B, 1, 1, 1) and the like mean the same and are flattened."""
    if isinstance(value, Tensor) and value.dim() and len(value) == batch == value.numel() and not value.is_complex():
        return value.reshape(batch)
    raise ValueError(f"{name}: {given(value)}; pass one value a sample, a tensor of shape ({batch},)")


def check_timesteps(timesteps: Any, batch: int, count: int) -> Tensor:
    """Timesteps of a discrete schedule, (B,) int64, on the CPU."""
    hint = f"pass the integer timesteps of the schedule, 0..{count - 1}, that made noisy_latents"
    timesteps = per_sample(timesteps, batch, "timesteps").detach().cpu()
    if timesteps.is_floating_point() or timesteps.is_complex() or timesteps.dtype == torch.bool:
        raise ValueError(f"timesteps: {given(timesteps)}; {hint}")
    timesteps = timesteps.long()
    if batch and not 0 <= int(timesteps.min()) <= int(timesteps.max()) < count:
        raise ValueError(f"timesteps range from {int(timesteps.min())} to {int(timesteps.max())}: {hint}")
    return timesteps


def check_sigmas(sigmas: Any, batch: int) -> Tensor:
    """Noise fractions of x = (1 - sigma) * x0 + sigma * eps, (B,) float64, on the CPU."""
    hint = "sigma is the noise fraction of noisy_latents = (1 - sigma) * latents + sigma * noise, in [0, 1]"
    if sigmas is None:
        raise ValueError(f"flow matching: pass sigmas, the float32 ones that made noisy_latents; {hint}")
    sigmas = per_sample(sigmas, batch, "sigmas").detach().cpu()
    if not sigmas.is_floating_point():
        raise ValueError(f"sigmas: {given(sigmas)}; {hint}")
    sigmas = sigmas.double()
    if not bool(((sigmas >= -ROUNDING) & (sigmas <= 1 + ROUNDING)).all()):
        raise ValueError(
            f"sigmas range from {float(sigmas.min()):.4g} to {float(sigmas.max()):.4g}: {hint} (timesteps of 0 to 1000 "
            "are divided by 1000)"
        )
    return sigmas


def check_active(active: Any, batch: int) -> Tensor:
    """Which samples LPL may apply to, (B,) bool, on the CPU."""
    active = per_sample(active, batch, "active").detach().cpu()
    if active.dtype != torch.bool:
        raise ValueError(f"active: {given(active)}; pass booleans, such as r == t")
    return active


def check_draws(draws: Any, batch: int) -> Tensor:
    """Numbers in [0, 1) that decide what is decoded, (B,), on the CPU."""
    draws = per_sample(draws, batch, "draws").detach().cpu()
    if not draws.is_floating_point() or not bool(((draws >= 0) & (draws < 1)).all()):
        raise ValueError(f"draws: {given(draws)}; pass uniform numbers in [0, 1), as torch.rand draws them")
    return draws


def check_mask(mask: Any, latents: Tensor) -> None:
    """A mask (B, 1, *space) for latents (B, C, *space), on their device; the loss checks its values."""
    wanted = (len(latents), 1, *latents.shape[2:])
    fits = isinstance(mask, Tensor) and mask.shape == wanted and mask.device == latents.device
    if not fits or mask.is_complex():
        raise ValueError(f"mask: {given(mask)}; pass {wanted} on {latents.device}, how much each location counts")


def check_mask_values(mask: Tensor) -> None:
    """Finite values of 0 or more, also over 1, since they are the weights of a mean. Synchronises."""
    if not mask.numel():
        return
    low, high = torch.stack(mask.aminmax()).tolist()
    if not 0 <= low <= high < float("inf"):
        raise ValueError(f"mask has values from {low:.4g} to {high:.4g}: pass weights that are finite and 0 or more")


def check_windows(windows: Any, batch: int) -> None:
    """Places (B, 2) in [0, 1), a tensor on the CPU or an array."""
    on_cpu = isinstance(windows, np.ndarray) or (isinstance(windows, Tensor) and windows.device.type == "cpu")
    if (
        not on_cpu
        or windows.shape != (batch, 2)
        or not all(is_number(u) and 0 <= u < 1 for pair in windows.tolist() for u in pair)
    ):
        raise ValueError(f"windows: {given(windows)}; pass ({batch}, 2) numbers in [0, 1) on the CPU")


def diffusion_gradient(diffusion_loss: Any, model_output: Tensor) -> Tensor | None:
    """d diffusion_loss / d model_output, see scaled_gradient; None where gradients are off and the loss has no graph.

    Raises:
        ValueError: diffusion_loss is no scalar, or does not depend on model_output.
    """
    if not isinstance(diffusion_loss, Tensor) or diffusion_loss.numel() != 1:
        raise ValueError(f"diffusion_loss: {given(diffusion_loss)}; pass the scalar that LPL is added to")
    if not diffusion_loss.requires_grad:
        if torch.is_grad_enabled():
            raise ValueError("diffusion_loss is detached: pass the scalar with its graph, before .detach() or .item()")
        return None
    gradient = scaled_gradient(diffusion_loss, model_output)
    if gradient is None:
        raise ValueError(
            "diffusion_loss does not depend on model_output: compute it from the same tensor that is passed as "
            "model_output (the unpacked one, after any cast), and not inside a function of torch.compile that holds "
            "the model"
        )
    return gradient


FLOAT16_SCALE = 2.0**10


def scaled_gradient(loss: Tensor, model_output: Tensor) -> Tensor | None:
    """d loss / d model_output, the graph kept; None where it does not depend on it.

    For a float16 output the result is float32: a mean over many values has gradients below float16's smallest numbers,
    so the loss is scaled by a power of two, as a gradient scaler does.
    """
    is_half = model_output.dtype == torch.float16
    scaled = FLOAT16_SCALE * loss if is_half else loss
    (gradient,) = torch.autograd.grad(scaled, model_output, retain_graph=True, allow_unused=True)
    return gradient.float() / FLOAT16_SCALE if is_half and gradient is not None else gradient


class FirstCalls:
    """Reads values on the device in the first `calls` calls that have something to check, and in none after them.

    Args:
        calls: how many, for each check.
    """

    def __init__(self, calls: int) -> None:
        self._left = dict.fromkeys(("noise", "weight", "direction", "gradient"), calls)

    def is_open(self, check: str) -> bool:
        """Whether a check is still to be made."""
        return self._left[check] > 0

    def due(self, check: str) -> bool:
        """Whether a check is to be made in this call; counts it."""
        is_open = self.is_open(check)
        self._left[check] -= is_open
        return is_open

    def weights(self, sample_weight: Tensor) -> None:
        """Raises a ValueError where weights of samples are not finite."""
        if self.due("weight") and not bool(sample_weight.isfinite().all()):
            raise ValueError(f"sample_weight is not finite: {sample_weight.tolist()}")

    @torch.no_grad()
    def noise(self, noisy_latents: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor, source: str) -> None:
        """Whether eps = (x - alpha * x0) / sigma looks like noise, by its standard deviation within channels.

        Checks only samples whose sigma lies in CLEAR_SIGMA, known on the CPU, and maps that are large enough. The mean
        of a channel (noise offset) does not count.

        Args:
            noisy_latents, latents: (B, C, ...).
            alpha, sigma: (B,), on the CPU; NaN: not looked at.
            source: the argument that they come from.

        Raises:
            ValueError: it does not: time is reversed, or the latents are other ones, or of another space.
        """
        low, high = CLEAR_SIGMA
        rows = ((sigma >= low) & (sigma <= high)).nonzero().flatten()
        if not len(rows) or latents[0, 0].numel() < MIN_PLACES or not self.due("noise"):
            return
        x, x0 = noisy_latents[rows.to(latents.device)], latents[rows.to(latents.device)].to(noisy_latents.dtype)
        alpha, sigma = alpha[rows].to(x.dtype), sigma[rows].to(x.dtype)
        spread = ((x - expand(alpha, x) * x0) / expand(sigma, x)).flatten(2).var(2).mean(1).sqrt()
        spreads, changes = torch.stack([spread, (x - x0).flatten(1).abs().amax(1)]).tolist()
        if not max(changes):
            raise ValueError("noisy_latents equal latents: pass the noisy ones that the model saw, and the clean ones")
        least, most = NOISE_STD
        # A single sample may have little noise (padding, a mask); none may have too much.
        worst = max(range(len(spreads)), key=lambda i: spreads[i] if math.isfinite(spreads[i]) else math.inf)
        if not least <= spreads[worst] <= most:
            hint = REVERSED.get(source, "sigma rises with the noise, alpha falls or stays 1")
            raise ValueError(
                f"the noise that {source} imply, (noisy_latents - alpha * latents) / sigma, has a standard deviation "
                f"of {spreads[worst]:.3g} where sigma is {float(sigma[worst]):.3g}, not about 1: is time reversed "
                f"({hint}), or are noisy_latents and latents swapped, of another space, or not finite?"
            )

    def direction(
        self,
        tensors: Sequence[Tensor],
        alpha: Tensor,
        sigma: Tensor,
        prediction_type: str | Convention,
        known: Sequence[str],
    ) -> None:
        """Warns, once, where the diffusion loss trains another target than prediction_type's, or moves away from it.

        Only a warning, since a loss may be meant to repel.

        Args:
            tensors: the diffusion loss's gradient, model_output, noisy_latents and latents, (B, C, ...) each.
            alpha, sigma: (B,), on the CPU; NaN: not looked at.
            prediction_type, known: as direction_fault takes them.
        """
        rows = (sigma >= CLEAR_SIGMA[0]).nonzero().flatten()
        if not len(rows) or not self.due("direction"):
            return
        looked_at = [x[rows.to(x.device)] for x in tensors]
        if fault := direction_fault(looked_at, alpha[rows], sigma[rows], prediction_type, known):
            self._left["direction"] = 0
            logger.warning("%s", fault)
