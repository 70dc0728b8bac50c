"""All metrics of one command, in the features of each available network; kept beside samples, so that it can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lpl import __version__
from lpl.base.errors import UserError
from lpl.base.json_files import read_object, write_json
from lpl.config.run_folder import FIGURES
from lpl.evaluation.evaluate import Subsets, evaluate_images, measure_images
from lpl.evaluation.features import EFFICIENTNET, INCEPTION_FILE, DINOv2, EfficientNetLite0, Extractor, Inception
from lpl.evaluation.images import (
    count_smaller,
    interval,
    list_pictures,
    pictures_digest,
    read_captions,
    read_pictures,
    resample_counts,
)
from lpl.evaluation.metrics import frequencies
from lpl.evaluation.planning import Plan
from lpl.evaluation.reference import Reference, reconstruct

NOT_ACTING = ("guidance_scale", "num_inference_steps", "output_dir", "sample_batch_size", "reference_cache_dir")
"""Options on which metrics of given images do not depend."""
REFERENCE = "--reference_dir"


class PointMetrics(NamedTuple):
    """What eval.json holds of a point."""

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


def open_judges(plan: Plan, vae: Any, device: torch.device) -> Iterator[Judge]:
    """The available networks with the reference's statistics, which are computed unless they are kept already.

    Args:
        plan: of `lpl eval`.
        vae: for the floor, or None.
        device: where networks run.

    Raises:
        UserError: files or networks that cannot be read.
    """
    options, folder, cache = plan.options, str(plan.options.reference_dir), plan.options.reference_cache_dir

    def judge(extractor: Extractor, metrics: tuple[str, ...]) -> Judge:
        reference = Reference.from_folder(folder, plan.resolution, extractor, vae, cache_dir=cache, show=True)
        return Judge(extractor, metrics, reference)

    if options.metrics:
        yield judge(EfficientNetLite0(plan.resolution, device), options.metrics)
    if plan.inception is not None:
        yield judge(Inception(plan.inception, device), ("frechet", "kernel"))
    if options.dinov2 is not None:
        yield judge(DINOv2(options.dinov2, device), ("frechet",))


def measure_point(plan: Plan, vae: Any, device: torch.device, judges: Sequence[Judge]) -> PointMetrics:
    """The metrics of a point; with several points, metrics that were kept are not measured again.

    Raises:
        UserError: files or networks that cannot be read, or a folder that cannot be written to.
    """
    if plan.folder == Path(plan.options.output_dir):
        return measure_all(plan, vae, device, judges)
    key, file = _key(plan, judges, vae), plan.folder / FIGURES
    try:
        kept = read_object(file)
        if kept.get("key") == key:
            return PointMetrics(**kept["figures"])
    except (UserError, KeyError, TypeError):
        pass  # measured again: nothing is lost
    found = measure_all(plan, vae, device, judges)
    write_json(file, {"key": key, "figures": found._asdict()}, f"--output_dir {plan.folder}")
    return found


def _key(plan: Plan, judges: Sequence[Judge], vae: Any) -> str:
    """A hash of all that decides metrics: options, samples, prompts, networks, reference and VAE."""
    from lpl.families.base import weights_hash

    options, folder = plan.options, Path(str(plan.options.reference_dir))
    acting = {name: value for name, value in asdict(options).items() if name not in NOT_ACTING}
    digest = pictures_digest(plan.files, f"--output_dir {options.output_dir}")
    parts: list[Any] = [__version__, acting, digest, plan.prompts]
    for judge in judges:
        parts += [judge.extractor.key, judge.reference.size, judge.reference.digest]
    parts.append(None if vae is None else weights_hash(vae))
    parts.append(read_captions(folder, list_pictures(folder, REFERENCE) if options.clip else [], REFERENCE))
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def measure_all(plan: Plan, vae: Any, device: torch.device, judges: Sequence[Judge]) -> PointMetrics:
    """Measures the images of a point against the reference.

    Arguments and errors are those of open_judges, which gives the judges.
    """
    options, files = plan.options, plan.files
    metrics: dict[str, dict[str, Any]] = {}
    refused: list[str] = []
    spectrum, real = None, list_pictures(Path(str(options.reference_dir)), REFERENCE)
    flag = "--images" if options.images is not None else f"--output_dir {options.output_dir}"
    for _, chosen, reference in judges:
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
                "frequency": frequencies(plan.resolution).tolist(),
                "samples": samples.power.mean(0).tolist(),
                "reference": target.power.mean(0).tolist(),
                "floor": None if floor is None else floor[0].power.mean(0).tolist(),
            }
    for what, pictures in (("reference images", real), ("samples", files)):
        if small := count_smaller(pictures, plan.resolution):
            told = f"{small} of {len(pictures)} {what} had to be enlarged to {plan.resolution} pixels: this adds blur"
            refused.append(told)
    refused += [f"{name}: {m['note']}" for name, m in metrics.items() if m["value"] is None]
    if options.clip is not None:
        if plan.prompts is None:
            refused.append("clip_score: the prompts of --images are not known (no metadata.jsonl in it names them all)")
        else:
            metrics["clip_score"] = _clip_score(plan, plan.prompts, real, vae, device, flag)
    refused += _left_out(plan, vae)
    digest = judges[-1].reference.digest if judges else pictures_digest(real, REFERENCE)
    return PointMetrics(metrics, spectrum, len(real), digest, EFFICIENTNET, refused)


def _left_out(plan: Plan, vae: Any) -> list[str]:
    options = plan.options
    lines = {
        f"fid, kid: no {INCEPTION_FILE} in torch's cache, or no torch-fidelity; give --inception_weights": (
            plan.inception is None
        ),
        "fd_dinov2: no network given (--dinov2)": options.dinov2 is None,
        "clip_score: no network given (--clip)": options.clip is None,
        "floor: no VAE to measure it with (give the model or --pretrained_vae_model_name_or_path)": (
            options.floor and vae is None
        ),
    }
    return [line for line, left_out in lines.items() if left_out]


def _clip_score(
    plan: Plan, prompts: list[str], real: list[Path], vae: Any, device: torch.device, flag: str
) -> dict[str, Any]:
    from lpl.evaluation.features import ClipScore

    options, size = plan.options, plan.resolution
    score = ClipScore(str(options.clip), device)
    found = score(read_pictures(plan.files, size, flag), prompts)
    value, ends, floor = float(found.mean()), None, None
    if options.num_bootstrap:
        counts = resample_counts(len(found), options.num_bootstrap, options.seed)
        ends = interval(value, counts @ found / len(found), 0.0, 100.0)
    captions = read_captions(Path(str(options.reference_dir)), real, REFERENCE)
    if options.floor and vae is not None and captions is not None:
        decoded = (reconstruct(batch, vae) for batch in read_pictures(real, size, REFERENCE))
        floor = float(score(decoded, captions).mean())
    note = f"rough: only {len(found)} images" if len(found) < 100 else None
    return {"value": value, "interval": ends, "floor": floor, "lower_is_better": False, "note": note}
