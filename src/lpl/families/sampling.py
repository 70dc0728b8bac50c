"""Loads any text-to-image pipeline to draw samples from it; a sample does not depend on the batch it is drawn in."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lpl.base.errors import UserError, require
from lpl.base.json_files import read_object, whole
from lpl.config import ModelConfig
from lpl.families import Kind, kind_of, kind_of_class, load_for_export
from lpl.families.base import ORIGIN, acting
from lpl.families.files import FLAG, INDEX, check_weights, read_header
from lpl.families.files import vae_stride as stride_of
from lpl.families.loading_errors import named
from lpl.families.schedulers import build_scheduler, file_schedule

logger = logging.getLogger("lpl")

SchedulerName = Literal["model", "dpmsolver++"]
SpacingName = Literal["model", "leading", "linspace", "trailing"]
GUIDANCE = 5.0
CLASSIFIER_FREE = (
    "CogView4Pipeline", "HunyuanDiTPipeline", "KolorsPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline",
)  # fmt: skip
"""Pipelines of no known family that use guidance_scale g as none + g (text - none), with no guidance for g up to 1,
also without a negative prompt (as read in diffusers 0.42.1)."""
DECODED_PIXELS = 16 * 64 * 64
"""Pixels that are decoded together, or one image: more exceed a CPU's caches, and at 1024 pixels a GPU's memory."""


class PipelineSampler:
    """Samples of a diffusers pipeline, made by its own call.

    Args:
        spacing: diffusers' timestep_spacing, or "model": the pipeline's own.
        scheduler: "model": the pipeline's own; "dpmsolver++": DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) on
            the same noise schedule, which needs fewer steps.

    Raises:
        UserError: a scheduler that does not fit the model.
    """

    def __init__(self, pipeline: Any, scheduler: SchedulerName = "model", spacing: SpacingName = "model") -> None:
        self.pipeline = pipeline
        if scheduler != "model":
            from diffusers import DPMSolverMultistepScheduler

            kind = type(pipeline.scheduler).__name__
            require(
                "FlowMatch" not in kind and hasattr(pipeline.scheduler, "alphas_cumprod"),
                f"--scheduler {scheduler}: the model's scheduler is {kind}, whose schedule it does not know; drop it",
            )
            pipeline.scheduler = build_scheduler(
                DPMSolverMultistepScheduler, pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2
            )
        if spacing != "model":
            cls = type(pipeline.scheduler)
            require(
                "timestep_spacing" in pipeline.scheduler.config,
                f"--timestep_spacing {spacing}: the scheduler, {cls.__name__}, has no such choice; drop it",
            )
            pipeline.scheduler = build_scheduler(cls, pipeline.scheduler.config, timestep_spacing=spacing)
        pipeline.set_progress_bar_config(disable=True)

    @property
    def vae(self) -> Any:
        """The pipeline's VAE, or None."""
        return getattr(self.pipeline, "vae", None)

    def modules(self) -> list[Any]:
        """The networks, in the order of their names."""
        parts = sorted(self.pipeline.components.items())
        return [part for _, part in parts if isinstance(part, torch.nn.Module)]

    def configuration(self, prompts: Sequence[str]) -> dict[str, str]:
        """Hashes, by part, of all that decides the samples besides weights: class, config, a tokenizer's ids.

        Versions and paths in configs do not count.
        """
        settings = {name: _settings(part, prompts) for name, part in sorted(self.pipeline.components.items())}
        own = {key: value for key, value in self.pipeline.config.items() if key not in settings}
        settings["pipeline"] = [type(self.pipeline).__name__, acting(own, ORIGIN)]
        return {
            name: hashlib.blake2b(json.dumps(found, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
            for name, found in settings.items()
        }

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        num_inference_steps: int,
        guidance_scale: float | None,
        resolution: int,
    ) -> Tensor:
        """Images (B, 3, resolution, resolution), uint8 on the CPU.

        Args:
            generators: one per sample, on the CPU; all noise of the sample comes from it.
            guidance_scale: of classifier-free guidance; 1: none. None: the pipeline's default.

        Raises:
            UserError: images that are not finite.
        """
        guidance = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        images = self._draw(
            prompt=list(prompts),
            generator=list(generators),
            num_inference_steps=num_inference_steps,
            height=resolution,
            width=resolution,
            **guidance,
        ).float()
        if not bool(torch.isfinite(images).all()):
            raise UserError("samples are not finite: use --dtype float32 or bfloat16, or another VAE")
        return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def _draw(self, **options: Any) -> Tensor:
        """Images in [0, 1]."""
        found: Tensor = self.pipeline(output_type="pt", **options).images
        return found


def _settings(part: Any, prompts: Sequence[str]) -> list[Any]:
    """The settings of a pipeline's part that decide samples, for a hash."""
    from transformers import PreTrainedTokenizerBase

    kind = type(part).__name__
    if isinstance(part, PreTrainedTokenizerBase):
        ids = part([*prompts, ""], verbose=False).input_ids
        return [kind, part.model_max_length, part.pad_token_id, ids]
    config = getattr(part, "config", {})
    return [kind, acting(config.to_dict() if hasattr(config, "to_dict") else config, ORIGIN)]


class FamilySampler(PipelineSampler):
    """Samples of a known family; the VAE decodes in float32, whatever the other parts' precision."""

    def __init__(
        self,
        pipeline: Any,
        scheduler: SchedulerName = "model",
        spacing: SpacingName = "model",
        kind: Kind | None = None,
    ) -> None:
        super().__init__(pipeline, scheduler, spacing)
        known = kind or kind_of_class(type(pipeline).__name__)
        assert known is not None
        model = known.find("Model")
        self._to_raw, self._guided, self._options = model.to_raw, model.guided, model.call_options(pipeline)
        self._multiple = known.pixel_multiple({"vae": pipeline.vae.config})
        pipeline.vae_scale_factor = known.stride({"vae": pipeline.vae.config})
        pipeline.vae.float()

    def _draw(self, **options: Any) -> Tensor:
        height, width = options["height"], options["width"]
        if "guidance_scale" in options:
            options |= self._guided(options.pop("guidance_scale"), len(options["prompt"]))
        require(
            height % self._multiple == width % self._multiple == 0,
            f"--resolution {height}: the model takes multiples of {self._multiple} pixels",
        )
        latents = self.pipeline(output_type="latent", **options, **self._options).images
        raw = self._to_raw(self.vae, latents.float(), height, width)
        together = max(1, DECODED_PIXELS // (height * width))
        return torch.cat([self.vae.decode(part).sample / 2 + 0.5 for part in raw.split(together)])


class Sides(NamedTuple):
    """Pixels of a side of a model's images; None: its configs do not say, or there is no limit."""

    native: int | None
    """The side that it was made for."""
    longest: int | None = None


def check_sampling(config: ModelConfig, lora: Path | None) -> Sides:
    """Refuses, before anything heavy loads, a model that cannot be sampled; returns the sizes that it states.

    Raises:
        UserError: no such model or LoRA, or no text-to-image pipeline.
    """
    kind = _foreign(config)
    if kind is None:
        known = kind_of(config)
        configs = known.model_configs(config)
        if lora is not None:
            known.check_lora(config, lora)
        return Sides(known.native_resolution(configs), known.longest_side(configs))
    name, folder = config.pretrained_model_name_or_path, _folder(config)
    require(
        config.prediction_type is None and not config.rescale_betas_zero_snr,
        f"--lora {lora}: was trained on a Stable Diffusion model; {name} is a {kind}",
    )
    if str(name).endswith(".safetensors"):
        header = read_header(Path(str(name)))
        require(header is not None, f"{FLAG} {name}: not a safetensors file, or cut short")
        check_weights(header or {}, f"{FLAG} {name}")
    require(
        config.pretrained_vae_model_name_or_path is None,
        f"--pretrained_vae_model_name_or_path: only models of a known family take another VAE; {name} is a {kind}",
    )
    assert folder is not None
    configs = {}
    for part in ("unet", "transformer", "vae"):
        file = folder / part / "config.json"
        if file.is_file():
            configs[part] = read_object(file, FLAG)
    size = configs.get("unet", configs.get("transformer", {})).get("sample_size")
    stride = stride_of(configs.get("vae", {}))
    return Sides(size * stride if whole(1, 2**16).fits(size) and stride else None)


def check_guidance(config: ModelConfig, guidance_scale: float | None) -> float | None:
    """The guidance to sample a model with; None: none is passed, and the pipeline uses its own default, if any.

    None is for models that take no guidance, and for pipelines where the meaning of a scale is not known.

    Args:
        guidance_scale: as given; None: not given.

    Raises:
        UserError: a scale for such a model.
    """
    kind = _foreign(config)
    if kind is None or kind in CLASSIFIER_FREE:
        usual = GUIDANCE if kind is not None else kind_of(config).usual_guidance(config)
        require(
            usual is not None or guidance_scale is None,
            f"--guidance_scale {guidance_scale}: the model takes no guidance: drop it",
        )
        return usual if guidance_scale is None else guidance_scale
    require(
        guidance_scale is None,
        f"--guidance_scale {guidance_scale}: what that is to a {kind} is not known here (some pipelines ignore it, or "
        "mean none by 0, or have learned it); drop it, and the pipeline's own default acts",
    )
    return None


def check_sampler(config: ModelConfig, scheduler: SchedulerName, spacing: SpacingName) -> None:
    """Refuses, before anything heavy loads, options that a model of flow matching does not have.

    Raises:
        UserError: for a model of a known family trained by flow matching (with a UNet it has --scheduler); others are
            checked once they are loaded.
    """
    if _foreign(config) is not None:
        return
    kind = kind_of(config)
    given = {"--scheduler": scheduler if kind.is_transformer else "model", "--timestep_spacing": spacing}
    chosen = [f"{flag} {value}" for flag, value in given.items() if value != "model"]
    if chosen and (kind.is_transformer or kind.is_flow(kind.model_configs(config))):
        raise UserError(f"{chosen[0]}: it was trained by flow matching, which has none; drop it")


def vae_stride(config: ModelConfig) -> int | None:
    """Pixels per latent of a model's VAE, or of the VAE given beside it; None where no local config says.

    For a model without local configs it is its family's usual one.
    """
    name, folder = config.pretrained_vae_model_name_or_path, _folder(config)
    if name is None and folder is None:
        return kind_of(config).usual_stride
    file = Path(name) / "config.json" if name is not None else Path(str(folder)) / "vae" / "config.json"
    if not file.is_file():
        return None
    try:
        return stride_of(read_object(file))
    except UserError:
        return None  # loading reports it


def load_for_sampling(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    lora: Path | None = None,
    scale: float = 1.0,
    scheduler: SchedulerName = "model",
    spacing: SpacingName = "model",
) -> PipelineSampler:
    """Loads a model whole, with a LoRA merged into it; check_sampling has passed.

    Args:
        config: which model: a folder or single file of any pipeline that diffusers knows, or a known family's on the
            Hub.
        dtype: precision of the denoiser and the text encoders; the VAE of a known family stays float32.

    Raises:
        UserError: a model or LoRA that cannot be loaded whole.
    """
    if _foreign(config) is None:
        pipeline = load_for_export(config, dtype, lora, scale).pipeline
        pipeline.vae.float()
        return FamilySampler(pipeline.to(device), scheduler, spacing, kind_of(config))
    return PipelineSampler(_load_foreign(config, dtype, lora, scale).to(device), scheduler, spacing)


def _folder(config: ModelConfig) -> Path | None:
    """The local folder with the model's configs."""
    name = str(config.pretrained_model_name_or_path)
    path = Path(config.single_file_config) if config.single_file_config is not None else Path(name)
    return path if path.is_dir() else None


def _foreign(config: ModelConfig) -> str | None:
    """The class name of a pipeline of no known family; None for a known one, or where the other checks decide."""
    folder = _folder(config)
    if folder is None or not (folder / INDEX).is_file():
        return None
    try:
        kind = read_object(folder / INDEX).get("_class_name")
    except UserError:
        return None
    return None if not isinstance(kind, str) or kind_of_class(kind) is not None else kind


def _obey(pipeline: Any, said: Mapping[str, Any]) -> None:
    """Gives a pipeline the schedule that its single file states, if its scheduler has a prediction type."""
    if said and "prediction_type" in pipeline.scheduler.config:
        pipeline.scheduler = build_scheduler(type(pipeline.scheduler), pipeline.scheduler.config, **said)


def _load_foreign(config: ModelConfig, dtype: torch.dtype, lora: Path | None, scale: float) -> Any:
    import inspect

    import diffusers

    name, kind = str(config.pretrained_model_name_or_path), str(_foreign(config))
    cls: Any = getattr(diffusers, kind, None)
    require(cls is not None, f"{FLAG} {name}: model_index.json says {kind}, which this diffusers does not have")
    taken = inspect.signature(cls).parameters
    # A safety checker paints images black, which would distort metrics.
    extra = {part: None for part in ("safety_checker", "feature_extractor", "image_encoder") if part in taken}
    if "requires_safety_checker" in taken:
        extra["requires_safety_checker"] = False  # type: ignore[assignment]
    with named(FLAG, name):
        if name.endswith(".safetensors"):
            options = {"config": config.single_file_config, "local_files_only": True, "dtype": dtype}
            pipeline = cls.from_single_file(name, **options, **extra)
            _obey(pipeline, file_schedule(Path(name)))
        else:
            options = {"dtype": dtype, "variant": config.variant, "use_safetensors": True, "local_files_only": True}
            pipeline = cls.from_pretrained(name, **options, **extra)
    if lora is not None:
        require(hasattr(pipeline, "load_lora_weights"), f"--lora {lora}: diffusers loads no LoRA into a {kind}")
        with named("--lora", str(lora)):
            pipeline.load_lora_weights(str(lora.parent.resolve()), weight_name=lora.name, local_files_only=True)
            require(bool(pipeline.get_active_adapters()), f"--lora {lora}: nothing of it fits a {kind}")
            pipeline.fuse_lora(lora_scale=scale, safe_fusing=True)
            pipeline.unload_lora_weights()
    return pipeline
