"""The plan of `lpl eval` from its options; bad ones are refused, where possible before anything heavy loads."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lpl.base.errors import UserError, require
from lpl.base.json_files import read_object
from lpl.base.output_folder import Names, OutputFolder, check_apart, kind_of
from lpl.base.text import read_prompts
from lpl.config import ModelConfig
from lpl.config.model_commands import DEFAULT_SAMPLES, EvalConfig, ExportConfig
from lpl.config.points import FOLDER, Point, as_tuple
from lpl.config.run_folder import EVAL_FILE, IMAGES, SETTINGS
from lpl.evaluation.evaluate import FEWEST
from lpl.evaluation.features import check_efficientnet, find_inception
from lpl.evaluation.generate import Sampling, are_settings, check_settings, image_name, settings_of
from lpl.evaluation.images import CAPTIONS, list_pictures, pictures_digest, read_captions, shortest_side
from lpl.families.export import Request, resolve

logger = logging.getLogger("lpl")

COMMAND = "lpl eval"
MOST_TOGETHER, PIXELS_TOGETHER = 64, 4 * 2**20


@dataclass(frozen=True)
class Plan:
    """What is to be drawn and measured: at all points, or at one."""

    options: EvalConfig
    request: Request | None
    """The model; None: only existing images."""
    files: list[Path]
    """Images to measure, drawn or not yet."""
    prompts: list[str] | None
    """The prompts of all images that are measured, in their order; None: not known."""
    resolution: int
    inception: Path | None
    """Weights of the FID's network; None: not available."""
    distinct_prompts: tuple[str, ...]
    """The prompts of the samples, before they are repeated; empty if none are drawn."""
    points: tuple[Point, ...]
    """The points at which samples are drawn; empty if none are."""
    folder: Path
    """Where samples and their settings go: --output_dir, or that of the point where there are several."""

    @property
    def sampling(self) -> Sampling:
        """How samples of the first point are drawn."""
        o, point = self.options, self.points[0]
        together = o.sample_batch_size or min(MOST_TOGETHER, max(1, PIXELS_TOGETHER // self.resolution**2))
        return Sampling(self.resolution, point.num_inference_steps, point.guidance_scale, o.seed, together)

    def each(self) -> list[Plan]:
        """A plan for each point; this one where there are not several."""
        if len(self.points) <= 1:
            return [self]
        plans = []
        for point in self.points:
            folder = self.folder / point.folder
            files = [folder / IMAGES / image_name(index) for index in range(len(self.files))]
            plans.append(replace(self, points=(point,), folder=folder, files=files))
        return plans

    def settings(self, **further: Any) -> dict[str, Any]:
        """What decides the samples of the first point."""
        o = self.options
        told = {"scheduler": o.scheduler, "dtype": o.dtype, "lora_scale": o.lora_scale, "prompts": self.prompts_digest}
        if o.timestep_spacing != "model":  # so that samples from before the option are recognised
            told["timestep_spacing"] = o.timestep_spacing
        return settings_of(self.sampling, **told, **further)

    @property
    def prompts_digest(self) -> str | None:
        """The digest of distinct_prompts."""
        return prompts_digest(self.distinct_prompts)


def check_eval(options: EvalConfig, model: ModelConfig | None = None) -> Plan:
    """Refuses what can be refused before anything heavy loads.

    Args:
        options: of `lpl eval`.
        model: the model with all its options, if it does not follow from those of `lpl eval`: one that training begins
            with, of which there are no samples yet.

    Raises:
        UserError: bad input.
    """
    from lpl.families.sampling import check_guidance, check_sampler, check_sampling, vae_stride

    if options.metrics:
        check_efficientnet()
    inception = find_inception(options.inception_weights)
    for flag in ("dinov2", "clip"):
        _check_network(flag, getattr(options, flag))
    folder = Path(str(options.reference_dir))
    references = list_pictures(folder, "--reference_dir")
    request = None
    if options.pretrained_model_name_or_path is not None:
        request = _request(options) if model is None else Request(model, None, "")
    native, longest, scales = None, None, as_tuple(options.guidance_scale)
    if request is not None:
        asked = request
        native, longest = with_flag(request, lambda: check_sampling(asked.model, asked.lora))
        if options.images is None:
            with_flag(request, lambda: check_sampler(asked.model, options.scheduler, options.timestep_spacing))
            scales = with_flag(request, lambda: tuple(check_guidance(asked.model, scale) for scale in scales))
    prompts: list[str] | None
    distinct: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()
    home = Path(options.output_dir)
    if options.images is not None:
        source = Path(options.images)
        files = list_pictures(source, "--images")
        _check_apart(source, folder, references, f"--images {source}")
        wanted = options.num_samples or len(files)
        require(wanted <= len(files), f"--num_samples {wanted}: --images {source} holds {len(files)}")
        files = files[:wanted]
        prompts = read_captions(source, files, "--images")
        native = shortest_side(files[0], "--images")
    else:
        points = tuple(Point(g, steps) for steps in as_tuple(options.num_inference_steps) for g in scales)
        _check_apart(
            home / (FOLDER if len(points) > 1 else IMAGES), folder, references, f"--output_dir {options.output_dir}"
        )
        distinct = tuple(_prompts(options, folder, references))
        count = options.num_samples or DEFAULT_SAMPLES
        files = [home / IMAGES / image_name(index) for index in range(count)]
        prompts = [distinct[index % len(distinct)] for index in range(count)]
    vae = options.floor or options.against == "reconstructions"
    can = request is not None or options.pretrained_vae_model_name_or_path is not None
    alone = ModelConfig(pretrained_vae_model_name_or_path=options.pretrained_vae_model_name_or_path)
    stride = vae_stride(alone if request is None else request.model) if vae and can else None
    resolution = _resolution(options, native, longest, stride)
    _check_counts(options, len(files), len(references))
    require(
        can or options.against == "images",
        "--against reconstructions needs a VAE: give the model, or --pretrained_vae_model_name_or_path",
    )
    require(vae or options.images is None or not can, "the model or VAE given with --images has no use with --no_floor")
    plan = Plan(options, request, files, prompts, resolution, inception, distinct, points, home)
    check_output(plan, drawn=model is None)
    return plan


def input_digests(options: EvalConfig) -> dict[str, str | None]:
    """The digests of reference and prompts, as these files are now, that eval.json of drawn samples would have.

    Raises:
        UserError: files that cannot be read.
    """
    folder = Path(str(options.reference_dir))
    references = list_pictures(folder, "--reference_dir")
    prompts = tuple(_prompts(options, folder, references))
    return {
        "reference_digest": pictures_digest(references, "--reference_dir"),
        "prompts_digest": prompts_digest(prompts),
    }


def prompts_digest(prompts: tuple[str, ...]) -> str | None:
    """A hash of the prompts of drawn samples; None if none are drawn."""
    return hashlib.blake2b(json.dumps(prompts).encode(), digest_size=16).hexdigest() if prompts else None


def _check_network(flag: str, name: str | None) -> None:
    is_id = name is not None and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    require(name is None or is_id or (Path(name) / "config.json").is_file(), f"--{flag} {name}: no config.json there")


def _request(options: EvalConfig) -> Request:
    return resolve(
        ExportConfig(
            str(options.pretrained_model_name_or_path),
            output="-",
            base=options.base,
            lora=options.lora,
            lora_scale=options.lora_scale,
            pretrained_vae_model_name_or_path=options.pretrained_vae_model_name_or_path,
            variant=options.variant,
            single_file_config=options.single_file_config,
        )
    )


def with_flag(request: Request, act: Callable[[], Any]) -> Any:
    """Calls act; errors about the model name the option that gave it."""
    try:
        return act()
    except UserError as error:
        if not request.flag:
            raise
        raise UserError(str(error).replace("--pretrained_model_name_or_path", request.flag)) from error


def _prompts(options: EvalConfig, folder: Path, references: list[Path]) -> list[str]:
    if options.prompts is not None:
        read = read_prompts(Path(options.prompts))
        more = sum(bool(prompt.negative) or prompt.seed is not None for prompt in read)
        if more:
            logger.warning(
                "--prompts %s: negative_prompt and seed of %d rows are for validation images: lpl eval has --seed",
                *(options.prompts, more),
            )
        return [prompt.text for prompt in read]
    found = read_captions(folder, references, "--reference_dir")
    if found is None:
        raise UserError(f"--prompts is missing: --reference_dir {folder} has no {CAPTIONS} with a text for every image")
    return found


def _check_apart(images: Path, reference: Path, references: list[Path], what: str) -> None:
    """Refuses folders within each other: images would be mixed up. One folder of --images for both: distances of 0."""
    here, there = images.resolve(), reference.resolve()
    drawn = what.startswith("--output_dir")
    nested = here.is_relative_to(there) or there.is_relative_to(here)
    if here != there:
        nested |= any(parent.resolve().is_relative_to(here) for parent in {file.parent for file in references})
    require(
        not nested or (here == there and not drawn),
        f"{what}: {'its samples' if drawn else 'its images'} and those of --reference_dir {reference} lie one within "
        "the other, so that they would be taken for each other; name folders apart",
    )


def _resolution(options: EvalConfig, native: int | None, longest: int | None, stride: int | None) -> int:
    """The pixels of a side: as given, else `native`, the model's or the first image's, less part of a latent.

    `longest` is the most that the model draws; `stride` the VAE's pixels per latent; None: none is used, or it is not
    known yet.
    """
    asked, drawn, step = options.resolution, options.images is None, stride or 1
    if asked is None and native is None:
        raise UserError("--resolution is missing: the model's configs do not say what it was made for")
    if asked is None and native is not None:
        require(native >= step, f"--resolution is missing: {native} pixels are fewer than the VAE's {step} a latent")
        asked = native - native % step
    assert asked is not None
    require(not drawn or asked % 8 == 0, f"--resolution {asked}: models draw multiples of 8 pixels")
    require(
        not drawn or longest is None or asked <= longest,
        f"--resolution {asked}: the model knows no more than {longest} pixels a side",
    )
    require(
        asked % step == 0,
        f"--resolution {asked}: the VAE takes multiples of {stride} pixels; give such a one, or --no_floor",
    )
    return asked


def _check_counts(options: EvalConfig, samples: int, references: int) -> None:
    least = min(samples, references)
    require(
        options.kernel_subsets == 0 or options.kernel_subset_size <= least,
        f"--kernel_subset_size {options.kernel_subset_size}: there are {samples} samples and {references} images in "
        "--reference_dir; give less than that",
    )
    if any((options.inception_weights, options.dinov2, options.clip)):
        return
    require(
        any(least >= FEWEST[metric] for metric in options.metrics),
        f"--num_samples: {samples} samples and {references} images in --reference_dir, of which every metric asked for "
        f"needs at least {min((FEWEST[metric] for metric in options.metrics), default=0)}",
    )


def check_output(plan: Plan, drawn: bool = True) -> None:
    """Refuses a folder with files that this command did not write, or with samples or metrics of something else.

    Args:
        plan: of check_eval.
        drawn: compare samples that are there with those of the plan.

    Raises:
        UserError: it has such files.
    """
    options, folder = plan.options, Path(plan.options.output_dir)
    names = _names(options)
    inputs = ("pretrained_model_name_or_path", "images", "reference_dir", "prompts", "lora", "base")
    check_apart(folder, names.kept, {flag: getattr(options, flag) for flag in inputs}, same=False)
    require(not folder.exists() or folder.is_dir(), f"--output_dir {folder}: a file is in the way")
    OutputFolder(folder, COMMAND).check(names)
    if options.images is None and drawn:
        for one in plan.each():
            check_settings(one.folder, one.settings())
    try:
        old = read_object(folder / EVAL_FILE).get("options")
    except UserError:
        return  # nothing that could be read is lost
    if not isinstance(old, dict) or not isinstance(old := old.get("images"), str | None):
        return
    before, now = (None if path is None else Path(path).resolve() for path in (old, options.images))
    told = "samples that were drawn" if old is None else f"the images in {old}"
    require(
        before == now, f"--output_dir {folder}: its {EVAL_FILE} is of {told}, which would be overwritten; name another"
    )


def claim_output(options: EvalConfig) -> None:
    """Records in the folder which names are this command's from now on; raises UserError if it cannot be written."""
    OutputFolder(options.output_dir, COMMAND).claim(_names(options))


def _names(options: EvalConfig) -> Names:
    found = {EVAL_FILE: lambda path: kind_of(path) == "eval"}
    several = max(len(as_tuple(options.guidance_scale)), len(as_tuple(options.num_inference_steps))) > 1
    if options.images is None and several:
        found[f"{FOLDER}/"] = lambda path: any(are_settings(file) for file in path.glob(f"*/{SETTINGS}"))
    elif options.images is None:
        found |= {SETTINGS: are_settings, f"{IMAGES}/": lambda path: are_settings(path.parent / SETTINGS)}
    return Names(found)
