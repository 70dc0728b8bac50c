"""Figures of a point's samples, kept beside them, so that a continued command measures what is missing alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpl import __version__
from lpl.base.errors import UserError
from lpl.base.files import write_atomically
from lpl.base.json_files import read_object
from lpl.config.model_commands import EvalConfig
from lpl.evaluation.evaluate import Subsets, evaluate_images, measure_images
from lpl.evaluation.features import EFFICIENTNET, INCEPTION_FILE, DINOv2, EfficientNetLite0, Extractor, Inception
from lpl.evaluation.images import (
    BATCH,
    batches,
    count_smaller,
    interval,
    list_pictures,
    pictures_digest,
    read_captions,
    read_picture,
    resample_counts,
)
from lpl.evaluation.metrics import frequencies
from lpl.evaluation.reference import Reference, reconstruct

FILE = "figures.json"
NOT_ACTING = ("guidance_scale", "num_inference_steps", "output_dir", "sample_batch_size", "reference_cache_dir")
"""Options that figures of given images do not follow from."""


def figures_key(
    options: EvalConfig, files: list[Path], prompts: Sequence[str] | None, judges: Sequence[Judge], vae: Any
) -> str:
    """A hash of all that decides figures: options, samples, prompts, networks, reference and VAE."""
    from lpl.families.base import weights_hash

    acting = {name: value for name, value in asdict(options).items() if name not in NOT_ACTING}
    parts: list[Any] = [__version__, acting, pictures_digest(files, f"--output_dir {options.output_dir}"), prompts]
    for judge in judges:
        parts += [judge.extractor.key, judge.reference.size, judge.reference.digest]
    folder = Path(str(options.reference_dir))
    parts.append(None if vae is None else weights_hash(vae))
    real = list_pictures(folder, "--reference_dir") if options.clip else []
    parts.append(read_captions(folder, real, "--reference_dir"))
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def read_figures(folder: Path, key: str) -> Measured | None:
    """What is kept in a point's folder under a key; None: nothing, or of something else."""
    try:
        found = read_object(folder / FILE)
        return Measured(**found["figures"]) if found.get("key") == key else None
    except (UserError, KeyError, TypeError):
        return None  # measured again: nothing is lost


def keep_figures(folder: Path, key: str, found: Measured) -> None:
    """Keeps figures in a point's folder.

    Raises:
        UserError: it cannot be written to.
    """
    text = json.dumps({"key": key, "figures": found._asdict()}, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        write_atomically(folder / FILE, (text + "\n").encode())
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from error


class Measured(NamedTuple):
    """What eval.json holds of it."""

    metrics: dict[str, dict[str, Any]]
    spectrum: dict[str, Any] | None
    num_reference: int
    reference_digest: str
    """A hash of the reference's files."""
    features: str
    refused: list[str]


class Judge(NamedTuple):
    """A network, and the reference in its features."""

    extractor: Extractor
    metrics: tuple[str, ...]
    reference: Reference


def open_judges(
    options: EvalConfig, resolution: int, inception: Path | None, vae: Any, device: torch.device
) -> list[Judge]:
    """The networks at hand with the reference's statistics, which are computed where they are not kept.

    Arguments and errors are those of measure_all.
    """
    networks = _networks(options, resolution, inception, device)
    return [Judge(e, chosen, _reference(options, resolution, e, vae)) for e, chosen in networks]


def measure_all(
    options: EvalConfig,
    files: list[Path],
    prompts: list[str] | None,
    resolution: int,
    inception: Path | None,
    vae: Any,
    device: torch.device,
    judges: Sequence[Judge],
) -> Measured:
    """Measures images against the reference.

    Args:
        options: of `lpl eval`.
        files: the images.
        prompts: of each image, or None.
        resolution: pixels at which they are compared.
        inception: the FID's network's weights, or None.
        vae: for the floor, or None.
        device: where networks run.
        judges: of open_judges.

    Raises:
        UserError: files or networks that cannot be read.
    """
    metrics: dict[str, dict[str, Any]] = {}
    refused: list[str] = []
    spectrum, real = None, list_pictures(Path(str(options.reference_dir)), "--reference_dir")
    digest, flag = None, "--images" if options.images is not None else f"--output_dir {options.output_dir}"
    for _, chosen, reference in judges:
        digest = reference.digest
        samples = measure_images(files, reference, show=True, flag=flag)
        metrics |= evaluate_images(
            samples,
            reference,
            chosen,
            against=options.against,
            resamples=options.num_bootstrap,
            seed=options.seed,
            subsets=Subsets(options.kernel_subsets, options.kernel_subset_size),
            with_floor=options.floor,
            show=True,
        )
        if spectrum is None:
            target = reference.target(options.against)
            floor = reference.floor(options.against) if options.floor else None
            spectrum = {
                "frequency": frequencies(resolution).tolist(),
                "samples": samples.power.mean(0).tolist(),
                "reference": target.power.mean(0).tolist(),
                "floor": None if floor is None else floor[0].power.mean(0).tolist(),
            }
    for what, pictures in (("reference images", real), ("samples", files)):
        if small := count_smaller(pictures, resolution):
            refused.append(
                f"{small} of {len(pictures)} {what} had to be enlarged to {resolution} pixels: a blur of its own"
            )
    refused += [f"{name}: {m['note']}" for name, m in metrics.items() if m["value"] is None]
    if options.clip is not None:
        if prompts is None:
            refused.append("clip_score: the prompts of --images are not known (no metadata.jsonl in it names them all)")
        else:
            metrics["clip_score"] = _clip_score(options, files, prompts, resolution, vae, device, flag)
    refused += _left_out(options, inception, vae)
    digest = digest or pictures_digest(real, "--reference_dir")
    return Measured(metrics, spectrum, len(real), digest, EFFICIENTNET, refused)


def read_references(
    options: EvalConfig, resolution: int, inception: Path | None, vae: Any, device: torch.device
) -> None:
    """Computes the reference's statistics, which are kept, so that what cannot be read is found before it is needed.

    Arguments and errors are those of measure_all.
    """
    for extractor, _ in _networks(options, resolution, inception, device):  # one at a time: the model is loaded, too
        _reference(options, resolution, extractor, vae)


def _reference(options: EvalConfig, resolution: int, extractor: Extractor, vae: Any) -> Reference:
    folder, cache = str(options.reference_dir), options.reference_cache_dir
    return Reference.from_folder(folder, resolution, extractor, vae, cache_dir=cache, show=True)


def _networks(
    options: EvalConfig, resolution: int, inception: Path | None, device: torch.device
) -> Iterator[tuple[Extractor, tuple[str, ...]]]:
    """Each with the metrics that are taken in its features."""
    if options.metrics:
        yield EfficientNetLite0(resolution, device), options.metrics
    if inception is not None:
        yield Inception(inception, device), ("frechet", "kernel")
    if options.dinov2 is not None:
        yield DINOv2(options.dinov2, device), ("frechet",)


def _left_out(options: EvalConfig, inception: Path | None, vae: Any) -> list[str]:
    lines = []
    if inception is None:
        lines.append(f"fid, kid: no {INCEPTION_FILE} in torch's cache, or no torch-fidelity; give --inception_weights")
    if options.dinov2 is None:
        lines.append("fd_dinov2: no network given (--dinov2)")
    if options.clip is None:
        lines.append("clip_score: no network given (--clip)")
    if options.floor and vae is None:
        lines.append("floor: no VAE to measure it with (give the model or --pretrained_vae_model_name_or_path)")
    return lines


def _clip_score(
    options: EvalConfig,
    files: list[Path],
    prompts: list[str],
    resolution: int,
    vae: Any,
    device: torch.device,
    flag: str,
) -> dict[str, Any]:
    from lpl.evaluation.features import ClipScore

    def read(paths: list[Path], flag: str) -> Iterator[Tensor]:
        return batches((read_picture(file, resolution, flag) for file in paths), BATCH)

    score = ClipScore(str(options.clip), device)
    found = score(read(files, flag), prompts)
    value, ends, floor = float(found.mean()), None, None
    if options.num_bootstrap:
        counts = resample_counts(len(found), options.num_bootstrap, options.seed)
        ends = interval(value, counts @ found / len(found), 0.0, 100.0)
    folder = Path(str(options.reference_dir))
    real = list_pictures(folder, "--reference_dir")
    captions = read_captions(folder, real, "--reference_dir")
    if options.floor and vae is not None and captions is not None:
        floor = float(score((reconstruct(b, vae) for b in read(real, "--reference_dir")), captions).mean())
    note = f"rough: only {len(found)} images" if len(found) < 100 else None
    return {"value": value, "interval": ends, "floor": floor, "lower_is_better": False, "note": note}
