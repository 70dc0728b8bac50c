"""What `lpl data` reports, as numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lpl.config import DataConfig
from lpl.config.environment import environment
from lpl.config.length import on_the_way
from lpl.data.buckets import Buckets, image_sizes
from lpl.data.crops import Crop, plan_crop
from lpl.data.survey import Draw, Part, Survey

WORST = 3
BLURRED = 0.1
"""Share of images that are scaled up, above which there is a warning."""
WASTED = 0.2
"""Mean share of the area that is cropped away, above which there is a warning."""
# CLIP splits at least here: at every word, digit run and sign. So it makes at least this many tokens.
_PIECES = re.compile(r"\w+|[^\w\s]+")


def numbers(survey: Survey) -> dict[str, Any]:
    """Everything that is reported, of strings, numbers, lists and dicts; "warnings" are sentences.

    Widths, heights and areas are in pixels, shares lie in 0..1. Draws of a folder are those of an epoch, on average.
    """
    config, order = survey.config, survey.order
    found: dict[str, Any] = {
        "environment": environment(),
        "resolution": config.data.crop_size,
        "seed": config.run.seed,
        "batch_size": survey.batch_size,
        "bad_files": sum(len(part.bad) for part in survey.parts),
        "fault": None if survey.fault is None else str(survey.fault),
    }
    if order is not None:
        found["epoch"] = {"draws": order.epoch_size, "steps": order.epoch_size / survey.batch_size}
        length = survey.length
        found["run"] = {
            "steps": length.steps,
            "epochs": length.steps * survey.batch_size / order.epoch_size,
            "draws_per_image": length.draws,
            "length": str(length),
            **dict(on_the_way(config, length.steps)),
        }
    if survey.left_out:
        found["left_out"] = survey.left_out
    crops = _crops(survey.samples.sizes, survey.views.buckets)
    parts = [_part(survey, part, crops[part.start : part.start + len(part.rows)]) for part in survey.parts]
    found["parts"] = parts
    found["buckets"] = _buckets(survey)
    found["duplicates"] = _duplicates(survey)
    found["warnings"] = list(_warnings(survey, found)) if order is not None else []
    return found


def most_cropped(survey: Survey, number: int) -> list[int]:
    """Numbers of the samples that lose most to cropping, worst first, without those that lose under 1 %."""
    lost = np.array([crop.cropped_away for crop in _crops(survey.samples.sizes, survey.views.buckets)])
    worst = np.argsort(-lost, kind="stable")[:number]
    return [int(index) for index in worst if lost[index] >= 0.01]


def draw_numbers(draws: Sequence[Draw]) -> list[dict[str, Any]]:
    """The draws of the contact sheet."""
    return [
        {
            "step": draw.step,
            "sample": draw.row.id,
            "count": draw.count,
            "caption": draw.caption,
            "mirrored": draw.crop.flip,
            "scaled_by": draw.crop.scale,
            "original_size": list(draw.crop.original_size),
            "crop_top_left": list(draw.crop.top_left),
            "target_size": list(draw.crop.target_size),
        }
        for draw in draws
    ]


def _crops(sizes: np.ndarray, buckets: Buckets) -> list[Crop]:
    """A crop of each image, in its centre: where it lies changes nothing that is reported."""
    if not len(sizes):
        return []
    unique, inverse = np.unique(sizes, axis=0, return_inverse=True)
    targets = [buckets.sizes[n] for n in buckets.assign(unique[:, 0], unique[:, 1])]
    planned = [plan_crop(int(w), int(h), target, True) for (w, h), target in zip(unique, targets, strict=True)]
    return [planned[n] for n in inverse.reshape(-1)]


def _part(survey: Survey, part: Part, crops: list[Crop]) -> dict[str, Any]:
    names = part.rows.column("name").to_pylist()
    reasons = Counter(bad.reason for bad in part.bad)
    first = {bad.reason: bad.name for bad in reversed(part.bad)}
    found: dict[str, Any] = {
        "source": part.source.name,
        "regularisation": part is not survey.parts[0],
        "seen": len(names) + len(part.bad),
        "images": len(names),
        "bad_files": [{"reason": r, "images": n, "first": first[r]} for r, n in reasons.most_common()],
    }
    if names:
        found["groups"] = _groups(survey, part)
        found["captions"] = _captions(survey, part.rows.column("captions").to_pylist(), names)
        found["scaled_up"] = _scaled_up(crops, names)
        found["cropped_away"] = _cropped_away(crops, names)
        if survey.config.data.masked_loss != "none":
            found["masks"] = sum(map(bool, part.rows.column("mask").to_pylist()))
    return found


def _groups(survey: Survey, part: Part) -> list[dict[str, Any]]:
    own = slice(part.start, part.start + len(part.rows))
    names, codes = survey.samples.groups()
    codes, repeats = codes[own], survey.repeats[own]
    found = []
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        group = {"group": names[code], "images": len(members), "repeats": float(repeats[members].max())}
        found.append(group | {"draws": float(repeats[members].sum())})
    return sorted(found, key=lambda group: group["group"])


def _captions(survey: Survey, captions: list[list[str]], names: list[str]) -> dict[str, Any]:
    several = sum(len(own) > 1 for own in captions)
    served = sum(own == [survey.config.data.instance_prompt] for own in captions)
    if survey.config.data.caption_choice == "first":
        captions = [own[:1] for own in captions]
    lengths = [max(map(len, own)) for own in captions]
    longest = int(np.argmax(lengths))
    most, separator = survey.config.model.max_token_length, survey.config.data.caption_separator
    every = [caption for own in captions for caption in own]
    return {
        "captions": len(every),
        **({"instance_prompt": served} if served else {}),
        "different": len(set(every)),
        "several": several,
        "empty": sum(any(not caption.strip() for caption in own) for own in captions),
        "longest": lengths[longest],
        "longest_of": names[longest],
        "too_long": sum(len(_PIECES.findall(caption)) > most for caption in every if len(caption) > most),
        "with_tags": sum(separator in caption for caption in every),
    }


def _scaled_up(crops: list[Crop], names: list[str]) -> dict[str, Any]:
    up = [n for n, crop in enumerate(crops) if crop.upscaled]
    worst = sorted(up, key=lambda n: -crops[n].scale)[:WORST]
    return {
        "images": len(up),
        "share": len(up) / len(crops),
        "worst": [{"name": names[n], "factor": crops[n].scale} for n in worst],
    }


def _cropped_away(crops: list[Crop], names: list[str]) -> dict[str, Any]:
    lost = [crop.cropped_away for crop in crops]
    worst = sorted(range(len(lost)), key=lambda n: -lost[n])[:WORST]
    return {"mean": float(np.mean(lost)), "worst": [{"name": names[n], "share": lost[n]} for n in worst if lost[n] > 0]}


def _buckets(survey: Survey) -> list[dict[str, Any]]:
    images = np.bincount(survey.buckets, minlength=len(survey.views.buckets.sizes))
    sizes = {} if survey.order is None else survey.order.epoch_sizes
    return [
        {
            "width": width,
            "height": height,
            "images": int(images[n]),
            "share": int(images[n]) / len(survey.samples),
            "draws": sizes.get(n, 0),
            "steps": sizes.get(n, 0) / survey.batch_size,
        }
        for n, (height, width) in enumerate(survey.views.buckets.sizes)
        if images[n]
    ]


def _duplicates(survey: Survey) -> dict[str, Any]:
    by_digest: dict[bytes, list[str]] = {}
    for part in survey.parts:
        columns = (part.rows.column(name).to_pylist() for name in ("digest", "name"))
        for digest, name in zip(*columns, strict=True):
            by_digest.setdefault(digest, []).append(name)
    sets = [names for names in by_digest.values() if len(names) > 1]
    return {"images": sum(len(names) - 1 for names in sets), "sets": sets}


def _warnings(survey: Survey, found: dict[str, Any]) -> Any:
    data, batch = survey.config.data, survey.batch_size
    for bucket in found["buckets"]:
        if 0 < bucket["draws"] < batch:
            draws, size = _count(bucket["draws"], "draw", "draws"), f"{bucket['width']} x {bucket['height']}"
            yield f"a batch of {batch} takes more than the {draws} that an epoch has at {size}: images repeat in it"
    if (too_long := survey.length.warning()) is not None:
        yield too_long
    if found["run"]["epochs"] < 1:
        yield (
            f"the run of {found['run']['steps']:,} steps makes {found['run']['epochs']:.2f} epochs: some images are "
            "never drawn"
        )
    for part in found["parts"]:
        if part["images"]:
            where = "regularisation: " if part["regularisation"] else ""
            yield from (where + warning for warning in _part_warnings(survey, part))
    regularisation = [group["draws"] for part in found["parts"][1:] for group in part.get("groups", [])]
    share = sum(regularisation) / found["epoch"]["draws"]
    if share > 0.5:
        yield f"{share:.0%} of all draws are of regularisation images: --repeats can balance them"
    if found["duplicates"]["images"]:
        yield f"{_count(found['duplicates']['images'], 'copy', 'copies')} of other images: those are drawn more often"
    if data.buckets and len(found["buckets"]) == 1 and len(survey.views.buckets.sizes) > 1:
        yield "--buckets: all images are of one bucket"


def _part_warnings(survey: Survey, part: dict[str, Any]) -> Any:
    data, captions, scaled, lost = survey.config.data, part["captions"], part["scaled_up"], part["cropped_away"]
    if scaled["share"] > BLURRED:
        yield (
            f"{scaled['share']:.0%} of the images are scaled up: they train blur; leave them out, or lower --resolution"
        )
    if lost["mean"] > WASTED and not data.buckets:
        yield f"{lost['mean']:.0%} of the images' area is cropped away{_with_buckets(survey, part)}"
    if part.get("masks") == 0:
        yield f"--masked_loss {data.masked_loss}: no image has a mask, so all of each is trained"
    if captions["different"] == 1 and part["images"] > 1 and not captions.get("instance_prompt"):
        yield "every image has the same caption"
    elif captions["empty"]:
        empty = _count(captions["empty"], "image has", "images have")
        yield f"{empty} an empty caption, and train the model without a prompt"
    if captions["too_long"]:
        yield (
            f"{_count(captions['too_long'], 'caption exceeds', 'captions or more exceed')} --max_token_length "
            f"{survey.config.model.max_token_length}: the model does not see how they end"
        )
    if data.shuffle_caption and not captions["with_tags"]:
        yield f"--shuffle_caption has no effect: no caption has a {data.caption_separator!r}"
    never = [group["group"] or "the root" for group in part["groups"] if group["draws"] == 0]
    if never:
        yield f"never drawn, as their repeats are 0: {', '.join(never[:WORST])}{' ...' if len(never) > WORST else ''}"


def _with_buckets(survey: Survey, part: dict[str, Any]) -> str:
    """How much less --buckets would crop away, where there are buckets of the default step."""
    data: DataConfig = replace(survey.config.data, buckets=True)
    if data.crop_size < data.bucket_step:
        return ""
    own = survey.parts[int(part["regularisation"])]
    sizes = survey.samples.sizes[own.start : own.start + len(own.rows)]
    mean = np.mean([crop.cropped_away for crop in _crops(sizes, image_sizes(data))])
    return f"; --buckets would make that {mean:.0%}" if mean < part["cropped_away"]["mean"] else ""


def _count(number: int, noun: str, plural: str) -> str:
    return f"{number:,} {noun if number == 1 else plural}"
