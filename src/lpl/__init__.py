"""Latent Perceptual Loss: train latent diffusion models with a loss that knows what the decoder makes visible."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lpl.diffusion.latent_space import LatentSpace
    from lpl.diffusion.prediction import edm
    from lpl.diffusion.schedule import Distribution, Schedule
    from lpl.perceptual.decoders import DecoderTaps, HookTaps
    from lpl.perceptual.gate import Gate, probability_of
    from lpl.perceptual.loop_check import CheckResult, check
    from lpl.perceptual.loss import LatentPerceptualLoss, LPLOutput
    from lpl.perceptual.objective import PerceptualObjective
    from lpl.perceptual.term import PerceptualTerm

_PUBLIC = {
    "DecoderTaps": "lpl.perceptual.decoders",
    "HookTaps": "lpl.perceptual.decoders",
    "LatentSpace": "lpl.diffusion.latent_space",
    "LatentPerceptualLoss": "lpl.perceptual.loss",
    "LPLOutput": "lpl.perceptual.loss",
    "PerceptualObjective": "lpl.perceptual.objective",
    "PerceptualTerm": "lpl.perceptual.term",
    "check": "lpl.perceptual.loop_check",
    "CheckResult": "lpl.perceptual.loop_check",
    "Gate": "lpl.perceptual.gate",
    "probability_of": "lpl.perceptual.gate",
    "Distribution": "lpl.diffusion.schedule",
    "Schedule": "lpl.diffusion.schedule",
    "edm": "lpl.diffusion.prediction",
}

__all__ = [
    "CheckResult",
    "DecoderTaps",
    "Distribution",
    "Gate",
    "HookTaps",
    "LPLOutput",
    "LatentPerceptualLoss",
    "LatentSpace",
    "PerceptualObjective",
    "PerceptualTerm",
    "Schedule",
    "__version__",
    "check",
    "edm",
    "probability_of",
]


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return __all__


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: `import lpl` alone loads no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lpl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
