"""One run or pipeline measured: samples drawn from its result, compared with held-out images and their reconstructions.

    python -m benchmarks.quality.measure RUN DATA CACHE SAMPLES SEED PROMPTS [GUIDANCE [STEPS]]    # RUN/measured.json

Samples are of the training captions, in an order that spreads repeats over the photographs: held-out captions name
what the text encoders have never seen. DPM-Solver++, 12 steps unless given, float32.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from lpl.config import ModelConfig
from lpl.data.files import write_atomically
from lpl.data.prompts import read_prompts
from lpl.diffusion.draws import keyed_uniform
from lpl.evaluation.distances import frechet_distance
from lpl.evaluation.evaluate import evaluate_images, measure_images
from lpl.evaluation.features import EfficientNetLite0
from lpl.evaluation.generate import Sampling, generate
from lpl.evaluation.pictures import list_pictures
from lpl.evaluation.reference import Reference
from lpl.evaluation.statistics import ImageSet
from lpl.families.sampling import load_for_sampling

MEASURED = "measured.json"
FRECHET, KERNEL = "frechet_efficientnet-lite0", "kernel_efficientnet-lite0"
STEPS, BATCH = 12, 64
SAMPLER = {"sampler": "DPM-Solver++", "sampling_steps": STEPS}


def open_reference(held_out: Path, resolution: int, vae: Any, cache: Path) -> Reference:
    """Statistics of the held-out images and of their reconstructions, from the cache where they are there."""
    return Reference.from_folder(held_out, resolution, EfficientNetLite0(resolution), vae, cache_dir=cache)


def floors(reference: Reference, held_out: Path, train: Reference) -> dict[str, float]:
    """Fréchet distances between sets of real reconstructions, and from the held-out ones to their images.

    From training to held-out: two sets without a photograph in common, so what a model that has learned the training
    images perfectly would have. Between halves of the held-out ones by photograph: the same of sets a third as large.
    Between halves by crop: of sets that share photographs, which no model reaches that has never seen them.
    """
    text = (held_out / "metadata.jsonl").read_text(encoding="utf-8")
    of = {row["file_name"]: row["photograph"] for row in map(json.loads, text.splitlines())}
    pictures = [of[file.name] for file in list_pictures(held_out, "held-out")]
    names = sorted(set(pictures), key=lambda name: keyed_uniform("quality halves", name))
    first = torch.tensor([names.index(name) % 2 == 0 for name in pictures])
    made = reference.target("reconstructions")
    halves = [ImageSet(made.features[chosen], made.power[chosen]) for chosen in (first, ~first)]
    by_crop = reference.floor("reconstructions")
    assert by_crop is not None
    return {
        "frechet_train_to_held_out": _frechet(train.target("reconstructions"), made),
        "frechet_halves_by_photograph": _frechet(*halves),
        "frechet_halves_by_crop": _frechet(*by_crop),
        "frechet_reconstructions_to_images": _frechet(made, reference.real),
        "num_reference": len(made),
    }


def _frechet(x: ImageSet, y: ImageSet) -> float:
    return max(0.0, float(frechet_distance(x.moments, y.moments)))


def ordered_prompts(folder: Path) -> list[str]:
    """The captions of a folder of crops, in an order that spreads a photograph's over the list."""
    captions = [prompt.text for prompt in read_prompts(folder / "metadata.jsonl")]
    return [captions[i] for i in sorted(range(len(captions)), key=lambda i: keyed_uniform("quality prompts", i))]


def measure_run(
    run: Path, data: Path, cache: Path, samples: int, seed: int, prompts: str, guidance: float, steps: int
) -> dict[str, Any]:
    """The figures of a row.

    Args:
        run: folder of a finished run.
        data: of one resolution, with held-out and the folder that names the prompts.
        cache: of the reference's statistics.
        samples: how many.
        seed: of their noise; the same for paired runs.
        prompts: the folder of the captions, "all" or "quarter".
        guidance: scale; 1: none.
        steps: of the sampler.
    """
    resolution = int(data.name)
    sampler = load_for_sampling(
        ModelConfig(str(run)), torch.float32, torch.device("cpu"), None, 1.0, scheduler="dpmsolver++"
    )
    captions = ordered_prompts(data / prompts)
    images = generate(sampler, captions, samples, Sampling(resolution, steps, guidance, seed, BATCH))
    reference = open_reference(data / "held-out", resolution, sampler.vae, cache)
    measured = measure_images(images, reference)
    metrics = ("frechet", "kernel", "spectrum")
    made = evaluate_images(measured, reference, metrics, against="reconstructions")
    train = open_reference(data / prompts, resolution, sampler.vae, cache)
    real = evaluate_images(measured, reference, ("frechet", "spectrum"), against="images")
    return {
        "frechet": made[FRECHET]["value"],
        "frechet_images": real[FRECHET]["value"],
        "frechet_train": _frechet(measured, train.target("reconstructions")),
        "kernel": made[KERNEL]["value"],
        "high_band_log_error": made["spectrum_log_error_high"]["value"],
        "high_band_log_error_images": real["spectrum_log_error_high"]["value"],
        "middle_band_log_error": made["spectrum_log_error_middle"]["value"],
        "low_band_log_error": made["spectrum_log_error_low"]["value"],
    }


def training_seconds(run: Path) -> float:
    """Seconds that a run spent in optimizer steps: checkpoints, caching, starts and interruptions not counted."""
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs" / "lpl"), size_guidance={"scalars": 0})
    events.Reload()
    batch = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["train_batch_size"]
    seconds, before = 0.0, 0
    # After an interruption steps are logged again: of each step the last.
    for step, rate in sorted({e.step: e.value for e in events.Scalars("samples_per_second")}.items()):
        seconds += (step - before) * batch / rate
        before = step
    return seconds


def main() -> None:
    """Measures what the command line names."""
    run, data, cache, samples, seed, prompts, *others = sys.argv[1:]
    guidance = float(others[0]) if others else 1.0
    steps = int(others[1]) if len(others) > 1 else STEPS
    torch.set_num_threads(1)
    logging.getLogger("lpl").setLevel(logging.WARNING)
    found = measure_run(Path(run), Path(data), Path(cache), int(samples), int(seed), prompts, guidance, steps)
    if (Path(run) / "logs").is_dir():  # a pipeline that is no run has none
        found["seconds"] = training_seconds(Path(run))
    write_atomically(Path(run) / MEASURED, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
