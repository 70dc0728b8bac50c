"""The stages after fetch: the baseline's pretraining, the search, and what is reported."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.arms import Arm, Benchmark, Control, Options, Run, Setting, merged, search
from benchmarks.quality.measure import floors, open_reference
from benchmarks.quality.results import Results, Row
from benchmarks.quality.workers import Workers
from lpl.errors import UserError

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


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
    """

    benchmark: Benchmark
    folder: Path
    results: Results
    workers: Workers
    model: Path

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
        self._floors(self.model)
        self.workers.map(self._pretrain, self.benchmark.settings)

    def search(self) -> None:
        """Finds the best options of both arms on the seed of the search."""
        self._search("lpl", self._best("baseline"))

    def report(self) -> None:
        """All reported runs: the searched setting's arms and controls, then the other settings' two arms."""
        best = {"baseline": self._best("baseline"), "lpl": self._best("lpl")}
        self.results.note("best", best)
        primary, seeds = self.benchmark.primary, self.benchmark.seeds
        # Seed by seed, so that an unfinished report has whole pairs.
        runs = [self._run(primary, arm, seed, best[arm]) for seed in seeds for arm in best]
        self.workers.map(self._complete, runs)
        self._keep_unets(runs[:2])
        for name, control in self.benchmark.controls.items():
            self.workers.map(self._complete, [self._control(name, control, seed, best[control.of]) for seed in seeds])
        others = [s for s in self.benchmark.settings if s != primary]
        self.workers.map(
            self._complete, [self._run(s, arm, seed, best[arm]) for s in others for seed in seeds for arm in best]
        )

    def _run(self, setting: Setting, arm: str, seed: int, options: Options, reported: bool = True) -> Run:
        return Run(setting, arm, seed, reported, self.benchmark.steps, options)

    def _control(self, name: str, control: Control, seed: int, options: Options) -> Run:
        steps = self.benchmark.steps
        if control.as_long_as is not None:
            earlier = [row["steps"] for row in self.results.rows if row["arm"] == name and row["reported"]]
            ratio = self.results.seconds_per_step(control.as_long_as) / self.results.seconds_per_step(control.of)
            steps = earlier[0] if earlier else max(1, round(steps * ratio))
        options = {key: value for key, value in options.items() if key not in control.without}
        return Run(self.benchmark.primary, name, seed, True, steps, options, control.command)

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
        baseline = self.folder / "baselines" / run.setting.name
        if not (baseline / "finished.json").is_file():
            raise UserError(
                f"{baseline}: no baseline there: run --stage baseline first, with --results FILE of your own if "
                f"{self.results.file} holds another machine's"
            )
        key = json.dumps(self.results.key(run), sort_keys=True)
        name = f"{run.setting.name}_{run.arm}_{run.seed}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        folder = self.folder / "runs" / name
        options = merged(
            self.benchmark.common,
            run.options,
            self._places(run.setting, baseline, folder),
            {"seed": run.seed, "max_train_steps": run.steps},
        )
        log = self.folder / "logs" / f"{name}.txt"
        self.workers.train(run.command, options, log)
        measured = self._measure(run.setting, folder, run.seed, log)
        self.results.add(run, measured)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        found = self.results.find(run)
        assert found is not None
        print(f"{name}: frechet {found['frechet']:.4g}, {found['seconds'] / run.steps:.3g} s a step", flush=True)
        return found

    def _places(self, setting: Setting, model: Path, output: Path) -> Options:
        return {
            "pretrained_model_name_or_path": str(model),
            "train_data_dir": str(self.data(setting) / setting.data),
            "resolution": setting.resolution,
            "latent_cache_dir": str(self.folder / "cache"),
            "output_dir": str(output),
        }

    def _measure(self, setting: Setting, run: Path, seed: int, log: Path) -> Row:
        cache = self.folder / "cache" / "evaluation"
        return self.workers.measure(run, self.data(setting), cache, self.benchmark.samples, seed, setting.data, log)

    def _floors(self, model: Path) -> None:
        """Before any process needs them: the reference's statistics, and the floors that pretraining aims at."""
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(model / "vae").eval()
        baselines: dict[str, Any] = self.results.content["baselines"]
        for setting in self.benchmark.settings:
            held_out = self.data(setting) / "held-out"
            reference_cache = self.folder / "cache" / "evaluation"
            reference = open_reference(held_out, setting.resolution, vae, reference_cache)
            entry = baselines.setdefault(setting.name, {"curve": []})
            train = open_reference(self.data(setting) / setting.data, setting.resolution, vae, reference_cache)
            entry["floor"] = floors(reference, held_out, train)
        self.results.write()

    def _pretrain(self, setting: Setting) -> None:
        """Trains on and on, with a measurement every so many steps."""
        how, entry = self.benchmark.pretraining, self.results.content["baselines"][setting.name]
        folder, log = self.folder / "baselines" / setting.name, self.folder / "logs" / f"baseline_{setting.name}.txt"
        target = how.ratio * entry["floor"]["frechet_train_to_held_out"]
        curve: list[Row] = entry["curve"]
        while not entry.get("reached") and (not curve or curve[-1]["steps"] < how.max_steps):
            steps = (curve[-1]["steps"] if curve else 0) + how.every
            options = merged(
                self.benchmark.common,
                how.options,
                self._places(setting, self.model, folder),
                {"seed": how.seed, "max_train_steps": steps, "checkpointing_steps": min(how.every, 2000)},
            )
            self.workers.train("lpl", options, log)
            curve.append({"steps": steps} | self._measure(setting, folder, how.seed, log))
            entry["reached"] = is_past_steep_phase([row["frechet"] for row in curve], target, how.flat)
            entry["options"] = {"seed": how.seed} | how.options
            self.results.write()
            found = curve[-1]["frechet"]
            print(f"baseline {setting.name}: step {steps}, frechet {found:.4g}, target {target:.4g}", flush=True)

    def _keep_unets(self, runs: list[Run]) -> None:
        """Copies both arms' UNets of the first reported seed to where they are committed from."""
        for run in runs:
            key = json.dumps(self.results.key(run), sort_keys=True)
            found = list((self.folder / "runs").glob(f"*_{hashlib.sha256(key.encode()).hexdigest()[:8]}"))
            if not found:
                print(f"{run.arm}, seed {run.seed}: its folder is not in {self.folder}, so its UNet is not copied")
                continue
            target = self.folder / "unets" / f"{run.arm}-seed{run.seed}.safetensors"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(found[0] / UNET, target)
