"""The stages after fetch: the baseline's pretraining, the search, and what is reported."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from diffusers import AutoencoderKL

from benchmarks.quality.arms import Arm, Benchmark, Control, Options, Run, Setting, merged, search
from benchmarks.quality.kept import keep
from benchmarks.quality.measure import STEPS, floors, open_reference, ordered_prompts
from benchmarks.quality.results import Results, Row
from benchmarks.quality.workers import Workers
from lpl.errors import UserError

SHOWN = 16
"""Prompts that results.json names, for pictures."""


def is_past_steep_phase(distances: list[float], target: float, flat: float) -> bool:
    """Whether a curve of distances is at its target, and its last step took at most the share `flat` off it."""
    return len(distances) > 1 and distances[-1] <= target and distances[-1] >= (1 - flat) * distances[-2]


@dataclass
class Stages:
    """Where everything is.

    Attributes:
        benchmark: arms.yaml.
        folder: with data/ of the stage fetch; gets the runs.
        results: the rows.
        workers: run processes.
        model: the pipeline to begin with; lpl.demo's is put there if nothing is.
        own_model: whether that pipeline is the user's, whose decoder stays as it is.
    """

    benchmark: Benchmark
    folder: Path
    results: Results
    workers: Workers
    model: Path
    own_model: bool = False
    _preparing: threading.Lock = field(default_factory=threading.Lock)
    _prepared: bool = False

    def data(self, setting: Setting) -> Path:
        """The data's folder of a setting's resolution."""
        found = self.folder / "data" / str(setting.resolution)
        if not (found / "held-out" / "metadata.jsonl").is_file():
            raise UserError(f"{found}: no data there: run --stage fetch first")
        return found

    def baseline(self) -> None:
        """Pretrains the denoiser of every setting until it is past its steep phase, or at max_steps."""
        from lpl.demo.weights import export_model

        if not (self.model / "model_index.json").is_file():
            export_model(self.model)
        waiting = [setting for setting in self.benchmark.settings if not self._is_pretrained(setting)]
        # The encoder stays as it is, so denoisers are trained on its latents while the decoder is trained.
        while waiting:
            names = [setting.name for setting in waiting]
            ready = [setting for setting in waiting if setting.begins_with not in names]
            tasks = [self._prepare, *(partial(self._pretrain, setting) for setting in ready)]
            self.workers.map(lambda task: task(), tasks)
            waiting = [setting for setting in waiting if setting not in ready]

    def search(self) -> None:
        """Finds the best options of both arms on the seed of the search."""
        self._search("lpl", self._best("baseline"))

    def report(self) -> None:
        """All reported runs: the searched setting's arms and controls, then the other settings' two arms."""
        best = {"baseline": self._best("baseline"), "lpl": self._best("lpl")}
        self.results.note("best", best)
        primary, seeds = self.benchmark.primary, self.benchmark.seeds
        self.results.note("prompts", ordered_prompts(self.data(primary) / primary.data)[:SHOWN])
        # Seed by seed, so that an unfinished report has whole pairs. The timed controls need the times of the others.
        runs = [self._run(primary, arm, seed, best[arm]) for seed in seeds for arm in best]
        for timed in (False, True):
            for name, control in self.benchmark.controls.items():
                if timed == (control.as_long_as is not None):
                    runs += [self._control(name, control, seed, best[control.of]) for seed in seeds]
            self.workers.map(self._complete, runs)
            self._keep_unets(runs[:2])
        self.workers.map(self._guided, [self._run(primary, arm, seed, best[arm]) for seed in seeds for arm in best])
        others = [s for s in self.benchmark.settings if s != primary]
        self.workers.map(
            self._complete, [self._run(s, arm, seed, best[arm]) for s in others for seed in seeds for arm in best]
        )

    def _run(self, setting: Setting, arm: str, seed: int, options: Options, reported: bool = True) -> Run:
        samples = self.benchmark.samples if reported else self.benchmark.search_samples
        return Run(setting, arm, seed, reported, setting.steps or self.benchmark.steps, samples, options)

    def _control(self, name: str, control: Control, seed: int, options: Options) -> Run:
        steps, base_steps = self.benchmark.steps, None
        options = {key: value for key, value in options.items() if key not in control.without}
        if control.as_long_as is not None:
            base_steps = steps
            given = {"arm": name, "reported": True, "base_steps": base_steps, "options": options}
            earlier = [r["steps"] for r in self.results.rows if all(r.get(n) == v for n, v in given.items())]
            ratio = self.results.seconds_per_step(control.as_long_as) / self.results.seconds_per_step(control.of)
            steps = earlier[0] if earlier else max(1, round(steps * ratio))
        samples = self.benchmark.samples
        return Run(self.benchmark.primary, name, seed, True, steps, samples, options, control.command, base_steps)

    def _best(self, arm: str) -> Options:
        """The options that the search has found; it goes on where it is not complete."""
        if arm == "baseline":
            return self._search(arm, {})
        return self._search(arm, self._best("baseline"))

    def _search(self, name: str, start: Options) -> Options:
        arm: Arm = getattr(self.benchmark, name)
        seed = self.benchmark.search_seed

        def score(candidates: list[Options]) -> list[float]:
            runs = [self._run(self.benchmark.primary, name, seed, options, False) for options in candidates]
            return [row["frechet"] for row in self.workers.map(self._complete, runs)]

        return search(arm, start, score)

    def _complete(self, run: Run) -> Row:
        """The run's row, after training and measuring it where that is missing."""
        found = self.results.find(run)
        if found is not None:
            return found
        baseline = self._pretrained(run.setting.name)
        name = self._name(run)
        folder = self.folder / "runs" / name
        options = merged(
            self.benchmark.common,
            run.options,
            self._places(run.setting, baseline, folder),
            {"seed": run.seed, "max_train_steps": run.steps},
        )
        log = self.folder / "logs" / f"{name}.txt"
        self.workers.train(run.command, options, log)
        measured = self._measure(run.setting, folder, run.samples, run.seed, log)
        self.results.add(run, measured)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        found = self.results.find(run)
        assert found is not None
        print(f"{name}: frechet {found['frechet']:.4g}, {found['seconds'] / run.steps:.3g} s a step", flush=True)
        return found

    def _guided(self, run: Run) -> None:
        """Measures a finished run once more, with guidance."""
        guidance, samples = self.benchmark.guidance, self.benchmark.guided_samples
        folder, guided = self.folder / "runs" / self._name(run), replace(run, samples=samples)
        if self.results.find(guided, "guided") is None:
            log = self.folder / "logs" / f"{folder.name}.txt"
            measured = self._measure(run.setting, folder, samples, run.seed, log, guidance)
            self.results.add(guided, {"guidance": guidance} | measured, "guided")
            print(f"{folder.name}: frechet {measured['frechet']:.4g} with guidance {guidance}", flush=True)

    def _name(self, run: Run) -> str:
        """The name of a run's folder."""
        key = json.dumps(self.results.key(run), sort_keys=True)
        return f"{run.setting.name}_{run.arm}_{run.seed}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"

    def _places(self, setting: Setting, model: Path, output: Path) -> Options:
        return {
            "pretrained_model_name_or_path": str(model),
            "train_data_dir": str(self.data(setting) / setting.data),
            "resolution": setting.resolution,
            "latent_cache_dir": str(self.folder / "cache"),
            "output_dir": str(output),
        }

    def _measure(self, setting: Setting, run: Path, samples: int, seed: int, log: Path, guidance: float = 1.0) -> Row:
        cache = self.folder / "cache" / "evaluation"
        steps = setting.sampling_steps or STEPS
        return self.workers.measure(run, self.data(setting), cache, samples, seed, setting.data, guidance, steps, log)

    def _prepare(self) -> None:
        """Once, before anything is measured: the decoder, the references' statistics, and the floors."""
        with self._preparing:
            if self._prepared:
                return
            vae = AutoencoderKL.from_pretrained(self._trained_vae()).eval()
            cache = self.folder / "cache" / "evaluation"
            for setting in self.benchmark.settings:
                held_out = self.data(setting) / "held-out"
                reference = open_reference(held_out, setting.resolution, vae, cache)
                train = open_reference(self.data(setting) / setting.data, setting.resolution, vae, cache)
                self.results.keep_baseline(setting, {"floor": floors(reference, held_out, train)})
            self._prepared = True

    def _trained_vae(self) -> Path:
        """The folder of the VAE that all figures are of; its decoder is trained where that has not been done."""
        if self.own_model:
            return self.model / "vae"
        found = self.folder / "vae"
        if not (found / "config.json").is_file():
            finest = max((self.folder / "data").glob("*/all"), key=lambda part: int(part.parent.name))
            minutes = self.benchmark.pretraining.decoder_minutes
            arguments = [self.model / "vae", finest, found, self.folder / "decoder.pt", minutes]
            log = self.folder / "logs" / "decoder.txt"
            self.workers.call(["benchmarks.quality.decoder", *map(str, arguments)], log)
        return found

    def _pretrained(self, setting: str) -> Path:
        """The folder of a setting's baseline."""
        found = self.folder / "baselines" / setting
        if not (found / "finished.json").is_file():
            raise UserError(f"{found}: no baseline there: run --stage baseline first")
        return found

    def _is_pretrained(self, setting: Setting) -> bool:
        kept, how = self.results.baseline(setting), self.benchmark.pretraining.of(setting)
        return bool(kept.get("reached") or (kept["curve"] and kept["curve"][-1]["steps"] >= how.max_steps))

    def _pretrain(self, setting: Setting) -> None:
        """Trains on and on, with a measurement every so many steps."""
        how = self.benchmark.pretraining.of(setting)
        folder, log = self.folder / "baselines" / setting.name, self.folder / "logs" / f"baseline_{setting.name}.txt"
        start = self.model if setting.begins_with is None else self._pretrained(setting.begins_with)
        while not self._is_pretrained(setting):
            kept = self.results.baseline(setting)
            steps = kept["curve"][-1]["steps"] + how.every if kept["curve"] else how.first
            options = merged(
                self.benchmark.common,
                how.options,
                self._places(setting, start, folder),
                {"seed": how.seed, "max_train_steps": steps},
            )
            self.workers.train("lpl", options, log)
            self._prepare()
            shutil.copytree(self._trained_vae(), folder / "vae", dirs_exist_ok=True)
            found = {"steps": steps} | self._measure(setting, folder, self.benchmark.samples, how.seed, log)
            curve = [*kept["curve"], found]
            target = how.ratio * self.results.baseline(setting)["floor"]["frechet_train_to_held_out"]
            reached = is_past_steep_phase([row["frechet"] for row in curve], target, how.flat)
            values = {"curve": curve, "reached": reached, "options": {"seed": how.seed} | how.options}
            self.results.keep_baseline(setting, values | {"begins_with": setting.begins_with})
            print(
                f"baseline {setting.name}: step {steps}, frechet {found['frechet']:.4g}, target {target:.4g}",
                flush=True,
            )

    def _keep_unets(self, runs: list[Run]) -> None:
        """Keeps both arms' UNets of the first reported seed."""
        for run in runs:
            found = self.folder / "runs" / self._name(run)
            if found.is_dir():
                keep(found, run.arm, self.results.file.parent / "weights")
            else:
                print(f"{run.arm}, seed {run.seed}: {found} is not there, so its UNet is not kept")
