"""The stages after fetch: VAE, denoiser and feature space, the search, and what is reported."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from benchmarks.quality import features as second_space
from benchmarks.quality.arms import Arm, Benchmark, Control, Options, Points, Run, merged, search
from benchmarks.quality.cost import step_cost
from benchmarks.quality.kept import FLOW_UNET, keep_arm, keep_pipeline, keep_vae, kept_pipeline, kept_vae, read_kept
from benchmarks.quality.measure import Judge, Request, next_points, training_seconds
from benchmarks.quality.pretrain import captions_of, trained_steps
from benchmarks.quality.results import Results, Row
from benchmarks.quality.workers import DivergedError, Workers
from lpl.base.errors import UserError
from lpl.config.run_folder import FINISHED

ARMS = ("baseline", "lpl")
FEW = "-few"
"""Behind the name of an arm with the options that were best at the second number of sampling steps."""


@dataclass
class Stages:
    """Where everything is.

    Attributes:
        benchmark: arms.yaml.
        folder: with data/ of the stage fetch; gets checkpoints, pipelines and runs.
        results: the rows; weights/ beside its file has what is kept.
        workers: run processes.
        short: steps of the VAE and of the feature space, for a toy run.
    """

    benchmark: Benchmark
    folder: Path
    results: Results
    workers: Workers
    short: tuple[int, ...] = ()
    _preparing: threading.Lock = field(default_factory=threading.Lock)
    _floored: set[int] = field(default_factory=set)

    @property
    def weights(self) -> Path:
        """Where networks are kept."""
        return self.results.file.parent / "weights"

    def vae(self) -> None:
        """Trains the VAE where it is not kept, and rounds it to what is kept: all figures are of that."""
        self._data()
        place = self.folder / "vae"
        if not (self.weights / "vae.safetensors").is_file():
            if not (place / "config.json").is_file():
                self._call("pretrain", "vae", self.folder, *self.short)
            keep_vae(AutoencoderKL.from_pretrained(place), self.weights)
        kept_vae(self.weights).save_pretrained(place)

    def features(self) -> None:
        """Trains the second feature space, where it is not kept."""
        self._data()
        if not (self.weights / second_space.FILE).is_file():
            self._call("features", self.folder, self.weights, *self.short)

    def denoiser(self) -> None:
        """Trains the denoiser, keeps it every so many steps and measures what was kept."""
        if not (self.folder / "vae" / "config.json").is_file():
            raise UserError(f"{self.folder / 'vae'}: no VAE there: run --stage vae first")
        how, waiting = self.benchmark.pretraining, [self.features]
        for steps in range(how.every, how.steps + 1, how.every):
            run = Run("pretrained", how.seed, False, steps, {})
            pipeline = self.folder / "pipelines" / str(steps)
            kept = read_kept(self.weights)
            if not pipeline.is_dir() and kept is not None and kept["steps"] == steps:
                kept_pipeline(self.weights).save_pretrained(pipeline)
            further = max(trained_steps(self.folder), 0 if kept is None else kept["steps"]) > steps
            if pipeline.is_dir() or further:  # a pipeline of so few steps can no longer be had
                self._both(waiting)
            else:
                self._both([partial(self._train_denoiser, steps, pipeline), *waiting])
            waiting = [partial(self._measure_pretrained, run, pipeline)] if pipeline.is_dir() else []
        self._both(waiting)

    def search(self) -> None:
        """Finds the best options of both arms on the seed of the search."""
        self._best("lpl")

    def report(self) -> None:
        """All reported runs: both arms with what was found, LPL's default, and the controls."""
        best = {name: self._best(name) for name in ARMS}
        at_few = {f"{name}{FEW}": self._best_at_few(name) for name in ARMS}
        best |= {name: options for name, options in at_few.items() if options != best[name.removesuffix(FEW)]}
        self.results.note("best", best)
        points, seeds, controls = self.benchmark.points["report"], self.benchmark.seeds, self.benchmark.controls
        made = {name: self._control(name, control, seeds[0], best[control.of]) for name, control in controls.items()}
        runs, few_runs = [], []
        # Seed by seed, so that an unfinished report has whole groups of arms.
        for seed in seeds:
            baseline, chosen = (self._run(name, seed, best[name]) for name in ARMS)
            runs += [baseline, *(replace(made[name], seed=seed) for name in made if controls[name].everywhere), chosen]
            few_runs += [self._run(name, seed, best[name]) for name in best if name not in ARMS]
        self._map([*runs, *few_runs], replace(points, sampling_steps=points.sampling_steps[:2]))
        self._keep_unets([run for run in runs if run.arm in ARMS and run.seed == seeds[0]])
        rest = [replace(made[name], seed=seed) for seed in seeds for name in made if not controls[name].everywhere]
        self._map(rest, self.benchmark.points["controls"])
        self._map([*runs, *few_runs], points)

    def _data(self) -> Path:
        found = self.folder / "data"
        if not (found / "data.json").is_file():
            raise UserError(f"{found}: no data there: run --stage fetch first")
        digest = hashlib.sha256()
        for name in ("train", "same", "held-out"):
            digest.update((found / name / "metadata.jsonl").read_bytes())
        self.results.fix("data", digest.hexdigest()[:16])
        return found

    def _call(self, module: str, *arguments: object) -> None:
        log = self.folder / "logs" / f"{module}_{arguments[0]}.txt" if module == "pretrain" else None
        self.workers.call(
            [f"benchmarks.quality.{module}", *map(str, arguments)], log or self.folder / "logs" / f"{module}.txt"
        )

    def _both(self, tasks: list[Callable[[], object]]) -> None:
        self.workers.map(lambda task: task(), tasks)

    def _map(self, runs: list[Run], points: Points) -> None:
        self.workers.map(lambda run: self._complete(run, points), runs)

    def _train_denoiser(self, steps: int, pipeline: Path) -> None:
        self._call("pretrain", "denoiser", self.folder, steps, self.weights)
        partial_ = pipeline.with_name(f"{steps}.partial")
        shutil.rmtree(partial_, ignore_errors=True)
        shutil.copytree(self.folder / "pipeline", partial_)
        keep_pipeline(partial_, self.weights, captions_of(self.folder / "data" / "train"), steps)
        partial_.rename(pipeline)

    def _measure_pretrained(self, run: Run, pipeline: Path) -> None:
        self.features()
        self._measure(run, pipeline, self.benchmark.points["pretraining"], None)

    def _run(self, arm: str, seed: int, options: Options, reported: bool = True) -> Run:
        return Run(arm, seed, reported, self.benchmark.steps, options)

    def _control(self, name: str, control: Control, seed: int, options: Options) -> Run:
        steps, base_steps = self.benchmark.steps, None
        given = merged({key: value for key, value in options.items() if key not in control.without}, control.plus)
        if control.costs is not None:
            other = merged(options, self.benchmark.controls[control.costs].plus)
            base, base_steps = self._base(), steps
            steps = round(steps * step_cost(other, base) / step_cost(given, base))
        return Run(name, seed, True, steps, given, base_steps)

    def _best(self, name: str) -> Options:
        """The options that the search has found; it goes on where it is not complete."""
        arm: Arm = getattr(self.benchmark, name)
        points, seed = self.benchmark.points["search"], self.benchmark.search_seed

        def score(candidates: list[Options]) -> list[float]:
            runs = [self._run(name, seed, options, False) for options in candidates]
            return self.workers.map(lambda run: self._score(run, points), runs)

        return search(arm, {} if name == "baseline" else self._best("baseline"), score)

    def _score(self, run: Run, points: Points) -> float:
        """The least distance at the first number of sampling steps; infinite where the run diverged, which is noted."""
        failed = self.results.content.get("diverged", [])
        if self.results.key(run) in failed:
            return math.inf
        try:
            rows = self._complete(run, points)
        except DivergedError as error:
            print(f"{run.arm} {run.seed} {self._differences(run)}: {error}", flush=True)
            self.results.note("diverged", [*failed, self.results.key(run)])
            return math.inf
        return min(float(row["frechet"]) for row in rows if row["sampling_steps"] == points.sampling_steps[0])

    def _best_at_few(self, name: str) -> Options:
        """The options of the search's run that was best at the second number of sampling steps."""
        points, benchmark = self.benchmark.points["search"], self.benchmark
        few = points.sampling_steps[-1]
        given = {"arm": name, "seed": benchmark.search_seed, "reported": False, "steps": benchmark.steps,
                 "samples": points.samples, "sampling_steps": few}  # fmt: skip
        rows = [row for row in self.results.rows if all(row[key] == value for key, value in given.items())]
        best: Options = min(rows, key=lambda row: row["frechet"])["options"]
        return best

    def _name(self, run: Run) -> str:
        """The name of a run's folder."""
        key = json.dumps(self.results.key(run), sort_keys=True)
        return f"{run.arm}_{run.seed}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def _base(self) -> Path:
        """The pipeline that every arm begins with, of the kept weights; and what all rows have in common is stated."""
        kept, steps = read_kept(self.weights), self.benchmark.pretraining.steps
        if kept is None or kept["steps"] != steps:
            found = "no denoiser" if kept is None else f"a denoiser of {kept['steps']} steps"
            raise UserError(f"{self.weights}: has {found}, not one of {steps}: run --stage denoiser first")
        files = [f for f in self.weights.glob("*.safetensors") if not f.name.startswith("arm_") and f.name != FLOW_UNET]
        self.results.fix("common", self.benchmark.common)
        return self._written(f"base_{self._fixed('weights', files)}", lambda: kept_pipeline(self.weights))

    def _fixed(self, name: str, files: list[Path]) -> str:
        """A hash of kept files, which results.json states under a name."""
        digest = hashlib.sha256()
        for file in sorted(files):
            digest.update(file.name.encode() + file.read_bytes())
        self.results.fix(name, digest.hexdigest()[:16])
        return digest.hexdigest()[:16]

    def _written(self, name: str, make: Callable[[], StableDiffusionXLPipeline]) -> Path:
        """The folder of this name with a pipeline, which is made where it is not there."""
        place = self.folder / name
        if not place.is_dir():
            partial_ = place.with_suffix(".partial")
            make().save_pretrained(partial_)
            partial_.rename(place)
        return place

    def _complete(self, run: Run, points: Points) -> list[Row]:
        """The run's rows at these points, after training and measuring it where some are missing."""
        found = self.results.find(run, points.samples)
        if not next_points(self._request(run, points), found):
            return found
        with self._preparing:
            base = self._base()
        folder = self._train(run, base)
        return self._measure(run, folder, points, training_seconds(folder))

    def _train(self, run: Run, base: Path) -> Path:
        """The folder of a run that began with a pipeline's folder, after training it where that is not done."""
        name = self._name(run)
        folder, log = self.folder / "runs" / name, self.folder / "logs" / f"{name}.txt"
        if not (folder / FINISHED).is_file():
            options = merged(self.benchmark.common, run.options, {
                "pretrained_model_name_or_path": str(base),
                "train_data_dir": str(self._data() / "train"),
                "resolution": 64,
                "latent_cache_dir": str(self.folder / "cache"),
                "output_dir": str(folder),
                "seed": run.seed,
                "max_train_steps": run.steps,
            })  # fmt: skip
            self.workers.train(run.command, options, log)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return folder

    @staticmethod
    def _rows_in(file: Path) -> list[Row]:
        rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []
        return rows

    def _request(self, run: Run, points: Points) -> Request:
        pairs = [(guidance, steps) for steps in points.sampling_steps for guidance in points.guidance]
        return Request(points.samples, run.seed, pairs, self.benchmark.guidance if points.to_best else [])

    def _measure(self, run: Run, pipeline: Path, points: Points, seconds: float | None) -> list[Row]:
        """Measures what is missing; what was done before an interruption becomes rows, too."""
        request = self._request(run, points)
        if not next_points(request, self.results.find(run, points.samples)):
            return self.results.find(run, points.samples)
        self._floors(points.samples)
        try:
            log = self.folder / "logs" / f"{self._name(run)}.txt"
            self.workers.measure(pipeline, self.folder, self.weights, request, log)
        finally:
            self.results.add(run, points.samples, self._rows_in(pipeline / request.file), seconds)
        rows = self.results.find(run, points.samples)
        for steps in points.sampling_steps:
            best = min((r for r in rows if r["sampling_steps"] == steps), key=lambda r: r["frechet"])
            said = f"{run.arm} {run.seed} of {run.steps} steps {self._differences(run)}: {steps} sampling steps, least "
            print(f"{said}{best['frechet']:.4g} at guidance {best['guidance']:g}", flush=True)
        return rows

    def _differences(self, run: Run) -> str:
        start = self.benchmark.baseline.start
        return ", ".join(f"{n} {v}" for n, v in run.options.items() if start.get(n) != v)

    def _floors(self, samples: int) -> None:
        """Once, before anything is measured with so many samples: the references' features, and the floors."""
        with self._preparing:
            if samples in self._floored:
                return
            key = Judge(self.folder, self.weights, kept_vae(self.weights)).key()
            self.results.fix("figures", key)
            floors = self.results.content["floors"]
            if all(floor["samples"] != samples for floor in floors):
                file = self.folder / "cache" / f"floors_{samples}.json"
                if not file.is_file() or json.loads(file.read_text(encoding="utf-8"))["key"] != key:
                    self.workers.floors(self.folder, self.weights, samples, self.folder / "logs" / "floors.txt")
                self.results.note("floors", [*floors, json.loads(file.read_text(encoding="utf-8"))["floors"]])
            self._floored.add(samples)

    def _keep_unets(self, runs: list[Run]) -> None:
        """Keeps both arms' UNets of the first reported seed."""
        base = self._base()
        for run in runs:
            found = self.folder / "runs" / self._name(run)
            if found.is_dir():
                keep_arm(found, base, run.arm, self.weights)
            else:
                print(f"{run.arm}, seed {run.seed}: {found} is not there, so its UNet is not kept")
