"""The shipped weights: bfloat16 safetensors of the four networks, and the pipeline built from them."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from torch import nn

from lpl.demo.architecture import build_pipeline
from lpl.demo.photographs import replacing

WEIGHTS_FOLDER = Path(__file__).parent / "weights"
COMPONENTS = ("vae", "unet", "text_encoder", "text_encoder_2")


def _find(name: str) -> Path:
    path = WEIGHTS_FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise RuntimeError(f"{path} is missing: make it with python -m tools.demo_weights, or install lpl again")
    return path


def load_component(name: str, module: nn.Module) -> None:
    """Fill one of `COMPONENTS`, as `lpl.demo.architecture` builds it, with its shipped weights, as float32.

    Raises:
        RuntimeError: if the file is missing or does not fit the network.
    """
    with safe_open(_find(name), framework="pt") as file:
        module.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118 (no mapping)


def shipped_scaling_factor() -> float:
    """1 / standard deviation of the shipped autoencoder's latents."""
    with safe_open(_find("vae"), framework="pt") as file:
        return float(file.metadata()["scaling_factor"])


def load_pipeline() -> StableDiffusionXLPipeline:
    """The demo's pipeline with its shipped weights, float32, in eval mode.

    Raises:
        RuntimeError: if a file of weights is missing or does not fit.
    """
    pipeline = build_pipeline(shipped_scaling_factor())
    for name in COMPONENTS:
        module = getattr(pipeline, name)
        load_component(name, module)
        module.eval()
    return pipeline


def export_model(folder: str | Path) -> Path:
    """Write the pipeline in diffusers' format, for `from_pretrained` and `lpl train`; returns the folder.

    Raises:
        UserError: it holds something else under these names.
    """
    with replacing(folder, "--export_model") as staged:
        load_pipeline().save_pretrained(staged, safe_serialization=True)
    return Path(folder)
