"""A finished run or pipeline, measured at points of guidance and sampling steps.

    python -m benchmarks.quality.measure RUN FOLDER WEIGHTS REQUEST    # appends to RUN/measured_SAMPLES_SEED.json
    python -m benchmarks.quality.measure FOLDER WEIGHTS SAMPLES        # floors: FOLDER/cache/floors_SAMPLES.json

FOLDER has data/ and gets cache/, WEIGHTS has the second feature space, REQUEST is a Request as JSON. Each point is
written when it is done, so that a kill loses one; points that are there are not made again. Samples are of the captions
of held-out views in an order that spreads pictures over the list; sample number i has the same noise at all points and
in all runs of a seed. DPM-Solver++ (2M) with trailing timesteps, float32.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality.features import FILE, FeatureNetwork
from benchmarks.quality.pictures import SIDE
from lpl.base.errors import UserError
from lpl.base.files import write_atomically
from lpl.diffusion.draws import keyed_uniform
from lpl.evaluation.features import EfficientNetLite0, Extractor
from lpl.evaluation.images import pictures_digest, read_picture
from lpl.evaluation.metrics import BANDS, Moments, frechet_distance, log_error, power_spectrum, precision_recall
from lpl.evaluation.reference import reconstruct

Row = dict[str, Any]
BATCH, FEATURE_BATCH = 64, 16
SAMPLER = "DPM-Solver++ (2M), trailing timesteps"
FIGURES = (
    "frechet", "frechet_same", "frechet_second", "precision", "recall",
    "low_band_log_error", "middle_band_log_error", "high_band_log_error",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        samples: how many.
        seed: of their noise.
        points: (guidance, sampling steps).
        grid: of guidance: where the least distance of a number of steps is at an end of what was measured, the next
            scale of the grid is measured as well, until it is not; empty: points alone.
    """

    samples: int
    seed: int
    points: list[tuple[float, int]]
    grid: list[float] = field(default_factory=list)

    @property
    def file(self) -> str:
        """Its file's name in the run's folder."""
        return f"measured_{self.samples}_{self.seed}.json"


def next_points(request: Request, rows: list[Row]) -> list[tuple[float, int]]:
    """The points that are still to be measured, given the rows that are there."""
    done = {(row["guidance"], row["sampling_steps"]): row["frechet"] for row in rows}
    missing = [(guidance, steps) for guidance, steps in request.points if (guidance, steps) not in done]
    if missing or not request.grid:
        return missing
    found = []
    for steps in dict.fromkeys(steps for _, steps in request.points):
        scales = sorted(guidance for guidance, n in done if n == steps)
        best = min(scales, key=lambda guidance: done[guidance, steps])
        below = [guidance for guidance in request.grid if guidance < best]
        above = [guidance for guidance in request.grid if guidance > best]
        found += [(g, steps) for g in (*below[-1:], *above[:1]) if (g, steps) not in done]
    return found


class PictureSet(NamedTuple):
    """What is kept of images."""

    features: Tensor
    """(N, 1280), EfficientNet-Lite0's."""
    second: Tensor
    """(N, 256), of features.py."""
    power: Tensor
    """(N, 32), float64."""

    def part(self, chosen: Any) -> PictureSet:
        """Some of the images."""
        return PictureSet(*(values[chosen] for values in self))


def look_at(images: Iterable[Tensor], first: Extractor, second: Extractor) -> PictureSet:
    """Features in both spaces and spectra of images: batches (B, 3, 64, 64), uint8."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in images:
        for part in batch.split(FEATURE_BATCH):
            found.append((first(part), second(part), power_spectrum(part)))
    return PictureSet(*(torch.cat(values) for values in zip(*found, strict=True)))


class Target:
    """What samples are compared with; statistics are computed once."""

    def __init__(self, made: PictureSet) -> None:
        self.made = made
        self.moments, self.second = Moments(made.features), Moments(made.second)
        self.power = made.power.mean(0)


def figures(samples: PictureSet, held_out: Target, same: Target) -> Row:
    """All figures of samples.

    Precision and recall (k = 3) are against as many of the held-out reconstructions as there are samples.
    """
    moments, second = Moments(samples.features), Moments(samples.second)
    precision, recall = precision_recall(samples.features, held_out.made.features[: len(samples.features)])
    power = samples.power.mean(0)
    bands = {f"{band}_band_log_error": float(log_error(power, held_out.power, band)) for band in BANDS}
    return {
        "frechet": max(0.0, float(frechet_distance(moments, held_out.moments))),
        "frechet_same": max(0.0, float(frechet_distance(moments, same.moments))),
        "frechet_second": max(0.0, float(frechet_distance(second, held_out.second))),
        "precision": precision.value,
        "recall": recall.value,
    } | bands


def spread_rows(folder: Path) -> list[Row]:
    """The rows of a folder of views, in an order that spreads a picture's over the list."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: keyed_uniform("quality prompts", i))]


class Judge:
    """Feature spaces, and the reconstructions of real pictures in them.

    Args:
        folder: with data/; gets cache/.
        weights: with the second feature space.
        vae: whose reconstructions are meant.
    """

    def __init__(self, folder: Path, weights: Path, vae: Any) -> None:
        self.data, self.cache, self.vae = folder / "data", folder / "cache" / "figures", vae
        if not (weights / FILE).is_file():
            raise UserError(f"{weights / FILE}: no second feature space there: run --stage features first")
        self.first, self.second = EfficientNetLite0(SIDE), FeatureNetwork(weights / FILE)

    def key(self) -> str:
        """A hash of all that decides figures but the samples."""
        from lpl.families.base import weights_hash

        texts = [(self.data / name / "metadata.jsonl").read_text(encoding="utf-8") for name in ("held-out", "same")]
        parts = [self.first.key, self.second.key, weights_hash(self.vae), SAMPLER, *texts]
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]

    def look_at(self, images: Iterable[Tensor]) -> PictureSet:
        """See look_at."""
        return look_at(images, self.first, self.second)

    def real(self, name: str, count: int | None = None) -> PictureSet:
        """Reconstructions of a folder's first views (all without a count), in spread order; kept in the cache."""
        from lpl.families.base import weights_hash

        files = [self.data / name / row["file_name"] for row in spread_rows(self.data / name)[:count]]
        parts = [self.first.key, self.second.key, weights_hash(self.vae), pictures_digest(files, "data")]
        file = self.cache / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:32]}.safetensors"
        if not file.is_file():
            made = self.look_at(self._reconstructed(files))
            self.cache.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{time.monotonic_ns()}.partial")  # two processes may make the same
            save_file(made._asdict(), partial)
            partial.replace(file)
        return PictureSet(**load_file(file))

    def _reconstructed(self, files: list[Path]) -> Iterator[Tensor]:
        for at in range(0, len(files), BATCH):
            images = torch.stack([read_picture(file, SIDE, "data") for file in files[at : at + BATCH]])
            yield reconstruct(images, self.vae)

    def psnr(self, count: int = 1024) -> float:
        """Mean PSNR in dB of reconstructions of so many held-out views."""
        files = [self.data / "held-out" / row["file_name"] for row in spread_rows(self.data / "held-out")[:count]]
        found = []
        for at, made in zip(range(0, len(files), BATCH), self._reconstructed(files), strict=True):
            images = torch.stack([read_picture(file, SIDE, "data") for file in files[at : at + BATCH]])
            error = ((made.float() - images.float()) / 255).square().mean((1, 2, 3))
            found.append(-10 * error.clamp(min=1e-10).log10())
        return float(torch.cat(found).mean())

    def floors(self, samples: int) -> Row:
        """Figures of real pictures in the place of samples: reconstructions of so many training views.

        What a model has that has learned the training pictures perfectly. Beside it the distance between two halves of
        the held-out views, by picture and by view; the halves by view share all pictures.
        """
        made, rows = self.real("held-out"), spread_rows(self.data / "held-out")
        names = sorted({row["picture"] for row in rows}, key=lambda name: keyed_uniform("quality halves", name))
        place = {name: number for number, name in enumerate(names)}
        by_picture = torch.tensor([place[row["picture"]] % 2 == 0 for row in rows])
        by_view = torch.arange(len(rows)) % 2 == 0
        halves = {
            f"frechet_halves_by_{what}": float(
                frechet_distance(Moments(made.features[first]), Moments(made.features[~first]))
            )
            for what, first in (("picture", by_picture), ("view", by_view))
        }
        train = self.real("train", samples)
        return (
            {"samples": samples, "views": len(train.features), "held_out_views": len(rows)}
            | figures(train, Target(made), Target(self.real("same")))
            | halves
        )


def open_sampler(pipeline: Path) -> Any:
    """Draws samples of a pipeline's folder, see open_sampler_of."""
    from diffusers import StableDiffusionXLPipeline

    return open_sampler_of(StableDiffusionXLPipeline.from_pretrained(pipeline, local_files_only=True))


def open_sampler_of(pipeline: Any) -> Any:
    """Draws samples of a pipeline, float32, as SAMPLER says."""
    from diffusers import DPMSolverMultistepScheduler

    from lpl.families.sampling import FamilySampler

    sampler = FamilySampler(pipeline, "dpmsolver++")
    # "leading", the model's own, would begin four steps at t = 801, from noise that belongs to t = 999.
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    return sampler


def draw(sampler: Any, captions: list[str], samples: int, seed: int, guidance: float, steps: int) -> Tensor:
    """Samples (N, 3, 64, 64), uint8."""
    from lpl.evaluation.generate import Sampling, generate

    return generate(sampler, captions, samples, Sampling(SIDE, steps, guidance, seed, BATCH))


def read_measured(file: Path, key: str) -> list[Row]:
    """The rows of a file; none where there is no file.

    Raises:
        UserError: they were measured with other data, features or VAE.
    """
    if not file.is_file():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["key"] != key:
        raise UserError(f"{file}: was measured with other data, features or VAE: remove it to measure anew")
    rows: list[Row] = found["rows"]
    return rows


def measure_run(run: Path, folder: Path, weights: Path, request: Request) -> list[Row]:
    """Measures what is missing of a request.

    Args:
        run: folder of a pipeline.
        folder, weights: see Judge.
        request: what.
    """
    sampler = open_sampler(run)
    judge = Judge(folder, weights, sampler.vae)
    key, file = judge.key(), run / request.file
    rows = read_measured(file, key)
    held_out = same = None
    captions = [row["text"] for row in spread_rows(judge.data / "held-out")]
    while points := next_points(request, rows):
        if held_out is None or same is None:
            held_out, same = Target(judge.real("held-out")), Target(judge.real("same"))
        guidance, steps = points[0]
        began = time.monotonic()
        images = draw(sampler, captions, request.samples, request.seed, guidance, steps)
        drawn = time.monotonic()
        found = figures(judge.look_at(images.split(BATCH)), held_out, same)
        took = {"sampling_seconds": round(drawn - began, 1), "figures_seconds": round(time.monotonic() - drawn, 1)}
        rows.append({"guidance": guidance, "sampling_steps": steps} | found | took)
        text = json.dumps({"key": key, "rows": rows}, indent=1, allow_nan=False)
        write_atomically(file, (text + "\n").encode())
        print(f"guidance {guidance:g}, {steps} steps: {found['frechet']:.4g}", flush=True)
    return rows


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


def as_json(request: Request) -> str:
    """For the command line."""
    return json.dumps(asdict(request))


def main() -> int:
    """Measures what the command line names; the exit code."""
    torch.set_num_threads(1)
    logging.getLogger("lpl").setLevel(logging.WARNING)
    if len(sys.argv) == 4:
        from benchmarks.quality.kept import kept_vae

        folder, weights, samples = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
        judge = Judge(folder, weights, kept_vae(weights))
        found = {"key": judge.key(), "floors": judge.floors(samples)}
        write_atomically(folder / "cache" / f"floors_{samples}.json", (json.dumps(found) + "\n").encode())
        return 0
    run, folder, weights = map(Path, sys.argv[1:4])
    given = json.loads(sys.argv[4])
    request = Request(**given | {"points": [(float(g), int(n)) for g, n in given["points"]]})
    try:
        measure_run(run, folder, weights, request)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
