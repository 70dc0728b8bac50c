"""Options of the commands that take a model: `lpl export` and `lpl eval`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from lpl.base.errors import require
from lpl.config.checks import MOST_PIXELS, Needs, Options, option
from lpl.config.points import as_tuple

MERGED = Needs("a merged model: --to kohya writes the LoRA as it is", lambda config: config.to != "kohya")


@dataclass(frozen=True)
class ExportConfig(Options):
    """Write a model or the result of a run in the form another program reads.

    --to safetensors: one file as ComfyUI and A1111 read it, a LoRA merged into it; of a model trained by flow matching
    only the transformer, for ComfyUI's models/diffusion_models. --to diffusers: a folder, a LoRA merged into it. --to
    kohya: a run's LoRA, or that of --lora, as kohya's programs, ComfyUI and A1111 read it.
    """

    source: str = option(MISSING, path=True)
    """A run's folder or, if it trains a LoRA, a checkpoint-N in it; a diffusers folder, a Hub id or one .safetensors
    file."""
    to: Literal["safetensors", "diffusers", "kohya"] = "safetensors"
    """The form to write."""
    output: str | None = option(None, path=True)
    """The file to write; for diffusers the folder."""
    overwrite: bool = False
    """Replace --output if it is there."""
    base: str | None = option(None, path=True)
    """For a run that trained a LoRA: the model it belongs to; unset: the one in the run's config.yaml."""
    lora: str | None = option(None, path=True)
    """A LoRA file, of diffusers' or kohya's naming, or the folder of a run that trained one."""
    lora_scale: float = option(1.0, needs=MERGED)
    """Strength of the LoRA in the merge."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = option(None, needs=MERGED)
    """Precision of the result; unset: as in the files of the model (float32 for a model on the Hub)."""
    pretrained_vae_model_name_or_path: str | None = option(None, path=True, needs=MERGED)
    """Another VAE than the model's own: a diffusers folder or a Hub id."""
    variant: str | None = None
    """Variant of the model's weight files, such as fp16."""
    single_file_config: str | None = option(None, path=True)
    """For a .safetensors file: a diffusers folder with its configs and tokenizers; where the file holds a transformer
    alone, the folder or Hub id that its text encoders and VAE are loaded from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.output is not None, "--output is missing: name the file (for --to diffusers the folder) to write")
        self.require_acting()


MetricName = Literal["frechet", "kernel", "precision_recall", "density_coverage", "spectrum"]
DRAWN = Needs("drawn samples; --images draws none: drop one", lambda config: config.images is None)
LOADED = "pretrained_model_name_or_path"
A_LORA = Needs("a LoRA", lambda config: config.lora is not None or config.pretrained_model_name_or_path is not None)
DEFAULT_SAMPLES = 1000
FEWEST_RESAMPLES = 100
"""With fewer, only one or two resamples (2.5 %) lie beyond each end of an interval."""


@dataclass(frozen=True)
class EvalConfig(Options):
    """Draw samples of a model, or take existing images, and measure them against real images.

    Writes images, eval.json and a table. The same command continues what was interrupted; `accelerate launch -m lpl
    eval ...` shares the drawing among processes.
    """

    pretrained_model_name_or_path: str | None = option(None, path=True)
    """The model: a run's folder, a diffusers folder of any family, or one .safetensors file; an SDXL also by Hub id."""
    images: str | None = option(None, path=True)
    """Measure the images in this folder instead of drawing any."""
    reference_dir: str | None = option(None, path=True)
    """Folder of real images, preferably not the training images."""
    prompts: str | None = option(None, path=True, needs=DRAWN)
    """A .txt file with a prompt a line, or a metadata.jsonl with "text"; unset: the captions of --reference_dir. Sample
    i uses prompt i; after the last prompt the first follows."""
    num_samples: int | None = option(None, least=1, most=10**6)
    """How many samples; unset: 1000, or all of --images."""
    seed: int = option(0, most=2**63 - 1)
    """Seed of the samples (each has noise of its own, whatever the batch) and of the resamples for the intervals."""
    output_dir: str = option("lpl-eval", path=True)
    """Where images and eval.json go."""
    resolution: int | None = option(None, least=8, most=MOST_PIXELS)
    """Pixels of the square images that are compared; unset: the model's, or the shorter side of the first of
    --images, rounded down to whole latents of the VAE."""
    num_inference_steps: int | tuple[int, ...] = option(25, least=1, most=10_000, needs=DRAWN)
    """Sampling steps. Several: samples of the same noise at each, with every guidance_scale; all pairs are measured."""
    guidance_scale: float | tuple[float, ...] | None = option(None, least=0, needs=DRAWN)
    """Scale of classifier-free guidance; 1: none, which is twice as fast. Several: as for num_inference_steps, and the
    best is found. Unset: 5; a pipeline of a family whose guidance is not known here does not take this option: its own
    default acts."""
    scheduler: Literal["model", "dpmsolver++"] = option("model", needs=DRAWN)
    """Sampler: the model's own, or DPM-Solver++(2M), for which 12 steps often do."""
    timestep_spacing: Literal["model", "leading", "linspace", "trailing"] = option("model", needs=DRAWN)
    """Which of the schedule's timesteps a sampler takes: as the model's scheduler says, or as diffusers' option of this
    name. With few steps use trailing: leading begins at a timestep of less noise than the first latents have."""
    sample_batch_size: int | None = option(None, least=1, most=2**12, needs=DRAWN)
    """Samples that are drawn together; unset: as many as make 4 megapixels (4 of 1024 x 1024), at most 64."""
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", needs=DRAWN)
    """Precision of the model while it draws."""
    pretrained_vae_model_name_or_path: str | None = option(None, path=True)
    """Another VAE than the model's; with --images and no model, the VAE whose floor is measured."""
    lora: str | None = option(None, path=True, needs=DRAWN)
    """A LoRA file, of diffusers' or kohya's naming, or the folder of a run that trained one."""
    lora_scale: float = option(1.0, needs=A_LORA)
    """Strength of the LoRA."""
    base: str | None = option(None, path=True, needs=DRAWN)
    """For the folder of a run that trained a LoRA: the model it belongs to; unset: the one in the run's config.yaml."""
    variant: str | None = option(None, needs=LOADED)
    """Variant of the model's weight files, such as fp16."""
    single_file_config: str | None = option(None, path=True, needs=LOADED)
    """For a .safetensors file: a diffusers folder with its configs and tokenizers; where the file holds a transformer
    alone, the folder or Hub id that its text encoders and VAE are loaded from."""
    metrics: tuple[MetricName, ...] = ("frechet", "kernel", "precision_recall", "density_coverage", "spectrum")
    """What to measure, in features of an ImageNet EfficientNet-Lite0."""
    against: Literal["images", "reconstructions"] = "images"
    """Compare with the real images, or with the VAE's reconstructions of them, which leaves the VAE's own blur out."""
    floor: bool = True
    """Measure beside every figure what the VAE alone costs: real images, encoded and decoded."""
    num_bootstrap: int = option(200, least=0, most=10**6)
    """Resamples of the samples for the 95 % intervals, at least 100; 0: no intervals."""
    kernel_subsets: int = option(0, least=0, most=10**6)
    """Kernel distance as the mean over this many random subsets; 0: over all pairs, once."""
    kernel_subset_size: int = option(1000, least=2, needs="kernel_subsets")
    """Images in each of these subsets."""
    inception_weights: str | None = option(None, path=True)
    """Also FID and KID: file of the weights of the FID's Inception network, as torch-fidelity has them; unset: the file
    that torch-fidelity keeps, if there is one."""
    dinov2: str | None = option(None, path=True)
    """Also FD-DINOv2: a folder or Hub id, such as facebook/dinov2-large."""
    clip: str | None = option(None, path=True)
    """Also the CLIP score of images and prompts: a folder or Hub id, such as openai/clip-vit-large-patch14."""
    reference_cache_dir: str | None = option(None, path=True)
    """Where statistics of references are kept, by content; unset: the user's cache."""

    def __post_init__(self) -> None:
        super().__post_init__()
        model = self.pretrained_model_name_or_path
        require(self.reference_dir is not None, "--reference_dir is missing: give a folder of real images")
        require(
            model is not None or self.images is not None,
            "--pretrained_model_name_or_path is missing: give a model, or --images with images that are there",
        )
        self.require_acting()
        require(
            self.num_bootstrap == 0 or self.num_bootstrap >= FEWEST_RESAMPLES,
            f"--num_bootstrap {self.num_bootstrap}: the ends of a 95 % interval need {FEWEST_RESAMPLES} resamples or "
            "more; 0 leaves intervals out",
        )
        check_points(self.guidance_scale, self.num_inference_steps)
        require(
            self.kernel_subsets == 0 or "kernel" in self.metrics or self.inception_weights is not None,
            "--kernel_subsets acts on the kernel distance, which --metrics leaves out",
        )
        require(
            bool(self.metrics) or any((self.inception_weights, self.dinov2, self.clip)),
            "--metrics is empty and no other network is given, so nothing is measured",
        )


def check_points(guidance_scale: float | tuple[float, ...] | None, num_inference_steps: int | tuple[int, ...]) -> None:
    """Raises UserError for a list of scales or of numbers of steps that is empty, or has one twice."""
    for name, values in (("guidance_scale", guidance_scale), ("num_inference_steps", num_inference_steps)):
        several = as_tuple(values)
        require(bool(several), f"--{name} is given empty: give a value, or leave it out")
        twice = next((value for value in several if several.count(value) > 1), None)
        require(twice is None, f"--{name}: {twice} is given twice")
