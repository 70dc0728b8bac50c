"""The quality benchmark, all stages or one; the same command continues what was interrupted. See README.md.

python -m benchmarks.quality.run --stage all --budget_minutes 600
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.quality.arms import ARMS, as_toy, only_settings, read_arms
from benchmarks.quality.fetch import Counts, fetch
from benchmarks.quality.measure import SAMPLER
from benchmarks.quality.results import Results
from benchmarks.quality.stages import Stages
from benchmarks.quality.summary import summary
from benchmarks.quality.workers import ROOT, STOPPED, BudgetSpentError, Workers
from lpl.errors import UserError

STAGES = ("fetch", "baseline", "search", "report")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.run", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--budget_minutes", type=float, help="stop after so many; the same command continues")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "lpl-quality", help="data, runs and caches")
    parser.add_argument("--results", type=Path, help="results.json; unset: in output_dir")
    parser.add_argument("--arms", type=Path, default=ARMS, help="what is run")
    parser.add_argument("--settings", help="only these of its settings, such as all-64,quarter-64; unset: all")
    parser.add_argument("--images", type=Path, help="photographs of your own, instead of the others")
    parser.add_argument("--stamps", type=Path, help="usr/share/tuxpaint/stamps of the unpacked Debian package")
    parser.add_argument("--model", type=Path, help="pipeline to begin with; unset: lpl.demo's")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--toy", action="store_true", help="every stage in a minute, on lpl.demo's photographs alone")
    return parser.parse_args(argv)


def run(options: argparse.Namespace) -> None:
    """Runs the stages.

    Raises:
        UserError: bad input, or a run that failed.
        BudgetSpentError: stopped before the end.
    """
    benchmark = read_arms(options.arms)
    resolutions = sorted({setting.resolution for setting in benchmark.settings})  # the data are those of all
    if options.toy:
        benchmark, resolutions = as_toy(benchmark), resolutions[:1]
    if options.settings is not None:
        benchmark = only_settings(benchmark, options.settings.split(","))
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output_dir {folder}: another process is at work there") from error
        chosen = STAGES if options.stage == "all" else (options.stage,)
        if "fetch" in chosen:
            images = None if options.images is None else options.images.resolve()
            stamps = None if options.stamps is None else options.stamps.resolve()
            counts = Counts(4, 20) if options.toy else Counts()
            fetch(folder, resolutions, images=images, stamps=stamps, demo_only=options.toy, counts=counts)
        file = options.results or folder / "results.json"
        model = folder / "model" if options.model is None else options.model.resolve()
        if options.model is not None and not (model / "model_index.json").is_file():
            raise UserError(f"--model {model}: no pipeline there")
        workers = Workers(options.processes, options.budget_minutes, lock.fileno())
        fixed = {"common": benchmark.common, "model": "lpl.demo" if options.model is None else str(model)} | SAMPLER
        results = Results(file, benchmark.primary, fixed)
        stages = Stages(benchmark, folder, results, workers, model, options.model is not None)

        def end(number: int, _frame: FrameType | None) -> None:
            workers.stop()

        before = [signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            for stage in chosen:
                if stage != "fetch":
                    getattr(stages, stage)()
        finally:
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
                signal.signal(number, handler)
            print(summary(results.content))


def main() -> int:
    """The exit code: 0 done, 2 a fault, 4 stopped before the end."""
    try:
        run(parse(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BudgetSpentError:
        print("stopped: the same command continues", file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
