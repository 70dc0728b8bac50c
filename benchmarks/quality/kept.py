"""What of the benchmark's networks is kept in half precision beside this file, and pipelines made of it.

    python -m benchmarks.quality.kept FOLDER [ARM]    # the pretrained pipeline, or with an arm's UNet

weights/ has the pretrained pipeline (vae, unet, both text encoders; pipeline.json: the captions that its tokenizers
were made of, and its steps), the UNet trained on by flow matching (flow_unet), the second feature space (features.py),
and of arms the difference of their UNet from the pretrained one, 6 bits a weight. Every arm, on every machine, begins
with these rounded weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lpl.base.errors import UserError
from lpl.base.files import write_atomically
from lpl.demo.architecture import build_scheduler, build_text_encoders, build_tokenizers, build_unet, build_vae

FOLDER = Path(__file__).parent / "weights"
PIPELINE = "pipeline.json"
LEVELS = 31
"""Of an arm's differences, either side of zero: 6 bits, which git packs."""
PARTS = ("unet", "text_encoder", "text_encoder_2")
FLOW_UNET = "flow_unet.safetensors"


def save_half(weights: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes weights in half precision.

    Raises:
        UserError: one is too large for it.
    """
    halves = {name: value.detach().to(torch.float16).contiguous() for name, value in weights.items()}
    for name, value in halves.items():
        if not bool(value.isfinite().all()):
            raise UserError(f"{file}: {name} is not finite in half precision")
    _write(halves, file, metadata)


def _write(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"} | (metadata or {}))
    partial.replace(file)


def _fill(module: nn.Module, file: Path) -> None:
    module.load_state_dict({name: value.float() for name, value in load_file(file).items()})


def keep_vae(vae: AutoencoderKL, folder: Path) -> None:
    """Writes vae.safetensors."""
    save_half(vae.state_dict(), folder / "vae.safetensors", {"scaling_factor": repr(vae.config.scaling_factor)})


def kept_vae(folder: Path = FOLDER) -> AutoencoderKL:
    """The VAE, float32."""
    file = folder / "vae.safetensors"
    with safe_open(file, framework="pt") as opened:
        vae = build_vae(float(opened.metadata()["scaling_factor"]))
    _fill(vae, file)
    return vae.eval()


def keep_pipeline(pipeline: Path, folder: Path, captions: tuple[str, ...], steps: int) -> None:
    """Writes the networks of a pretrained pipeline but its VAE, and pipeline.json, last.

    Args:
        pipeline: its folder.
        folder: where to.
        captions: that it was trained on.
        steps: of its pretraining.
    """
    for part in PARTS:
        (file,) = (pipeline / part).glob("*.safetensors")
        save_half(load_file(file), folder / f"{part}.safetensors")
    unet = json.loads((pipeline / "unet" / "config.json").read_text(encoding="utf-8"))
    kept = {"steps": steps, "unet_widths": unet["block_out_channels"], "captions": list(captions)}
    write_atomically(folder / PIPELINE, (json.dumps(kept, indent=0, ensure_ascii=False) + "\n").encode())


def read_kept(folder: Path = FOLDER) -> dict[str, Any] | None:
    """pipeline.json; None where no pipeline is kept."""
    file = folder / PIPELINE
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def kept_pipeline(folder: Path = FOLDER, arm: str | None = None) -> StableDiffusionXLPipeline:
    """The pretrained pipeline, float32, or with the UNet of an arm.

    Raises:
        UserError: it is not kept.
    """
    kept = read_kept(folder)
    if kept is None:
        raise UserError(f"{folder}: no {PIPELINE} there: run --stage denoiser first")
    captions = tuple(kept["captions"])
    unet = build_unet(tuple(kept["unet_widths"]))
    encoders = build_text_encoders(captions)
    for name, module in zip(PARTS, (unet, *encoders), strict=True):
        _fill(module, folder / f"{name}.safetensors")
    if arm is not None:
        file = folder / f"arm_{arm}.safetensors"
        if not file.is_file():
            raise UserError(f"{file}: the UNet of this arm is not kept")
        base = unet.state_dict()
        unet.load_state_dict({name: base[name] + change for name, change in unpacked(load_file(file)).items()})
    tokenizer, tokenizer_2 = build_tokenizers(captions)
    return StableDiffusionXLPipeline(
        vae=kept_vae(folder),
        text_encoder=encoders[0].eval(),
        text_encoder_2=encoders[1].eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def keep_flow(pipeline: Path, folder: Path, steps: int) -> None:
    """Writes the UNet of a pipeline's folder that was trained by flow matching for so many steps."""
    (file,) = (pipeline / "unet").glob("*.safetensors")
    save_half(load_file(file), folder / FLOW_UNET, {"steps": str(steps)})


def kept_flow_steps(folder: Path = FOLDER) -> int | None:
    """Steps of the kept UNet of flow matching; None where there is none."""
    if not (folder / FLOW_UNET).is_file():
        return None
    with safe_open(folder / FLOW_UNET, framework="pt") as opened:
        return int(opened.metadata()["steps"])


def as_flow(pipeline: StableDiffusionXLPipeline, folder: Path | None = None) -> StableDiffusionXLPipeline:
    """The pipeline with an unshifted scheduler of flow matching, and with the UNet that a folder keeps, if given."""
    if folder is not None:
        _fill(pipeline.unet, folder / FLOW_UNET)
    pipeline.register_modules(
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=1.0, prediction_type="flow_prediction", timestep_spacing="trailing"
        )
    )
    return pipeline


def packed(change: dict[str, Tensor]) -> dict[str, Tensor]:
    """Differences of weights as small integers with a scale for each row (of the first dimension)."""
    found = {}
    for name, value in change.items():
        rows = value.float().reshape(len(value), -1)
        scale = rows.abs().amax(1) / LEVELS
        found[name] = (rows / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8).reshape(value.shape)
        found[f"{name}:scale"] = scale
    return found


def unpacked(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The differences again, float32."""
    found = {}
    for name, value in kept.items():
        if not name.endswith(":scale"):
            scale = kept[f"{name}:scale"].reshape(-1, *[1] * (value.dim() - 1))
            found[name] = value.float() * scale
    return found


def keep_arm(run: Path, base: Path, arm: str, folder: Path) -> None:
    """Writes the difference of a run's UNet from the one it began with.

    Args:
        run, base: folders of both pipelines.
        arm: names the file.
        folder: where to.
    """
    trained, begun = (load_file(part / "unet" / "diffusion_pytorch_model.safetensors") for part in (run, base))
    change = {name: trained[name].float() - begun[name].float() for name in begun}
    _write(packed(change), folder / f"arm_{arm}.safetensors")


def take_published(published: Path, folder: Path) -> None:
    """Copies kept weights into a folder that has none."""
    for file in sorted(published.glob("*")):
        if file.suffix in (".safetensors", ".json") and not (folder / file.name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    kept_pipeline(FOLDER, *sys.argv[2:3]).save_pretrained(sys.argv[1])
