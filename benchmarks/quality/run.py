"""The quality benchmark, all stages or one; the same command continues what was interrupted. See README.md.

python -m benchmarks.quality.run --stage all --budget_minutes 600
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

from benchmarks.quality.arms import ARMS, as_toy, read_arms
from benchmarks.quality.fetch import PACKAGES, fetch, few_packages, unpack
from benchmarks.quality.flow import FlowStages
from benchmarks.quality.kept import FOLDER, take_published
from benchmarks.quality.results import Results
from benchmarks.quality.stages import Stages
from benchmarks.quality.summary import FILE, summary
from benchmarks.quality.workers import ROOT, STOPPED, BudgetSpentError, Workers
from lpl.base.errors import UserError

STAGES = ("fetch", "vae", "denoiser", "features", "search", "report", "flow")
"""In this order; the denoiser's first measurement trains the feature space, beside the denoiser."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.run", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--budget_minutes", type=float, help="stop after so many; the same command continues")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "lpl-quality", help="data, runs and caches")
    parser.add_argument("--results", type=Path, help="results.json, weights/ beside it; unset: in output_dir")
    parser.add_argument("--arms", type=Path, default=ARMS, help="what is run")
    parser.add_argument(
        "--packages", type=Path, help="where Debian's packages are unpacked; unset: apt-get downloads them"
    )
    parser.add_argument("--processes", type=int, default=2, help="at a time, a core each")
    parser.add_argument("--scratch", action="store_true", help="begin anew, not with the rows and weights kept here")
    parser.add_argument("--toy", action="store_true", help="every stage in minutes, on a part of the pictures")
    return parser.parse_args(argv)


def begin_with_published(results: Path) -> None:
    """Puts the rows and weights kept beside this file where there are none, to go on from them."""
    if not results.is_file() and FILE.is_file():
        results.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(FILE, results)
    if (results.parent / "weights").resolve() != FOLDER:
        take_published(FOLDER, results.parent / "weights")


def run(options: argparse.Namespace) -> None:
    """Runs the stages.

    Raises:
        UserError: bad input, or a run that failed.
        BudgetSpentError: stopped before the end.
    """
    benchmark = as_toy(read_arms(options.arms)) if options.toy else read_arms(options.arms)
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--output_dir {folder}: another process is at work there") from error
        chosen = STAGES if options.stage == "all" else (options.stage,)
        file = (options.results or folder / "results.json").resolve()
        if not options.toy and not options.scratch:
            begin_with_published(file)
        if "fetch" in chosen:
            fetch_into(folder, options)
        workers = Workers(options.processes, options.budget_minutes, lock.fileno(), folder / "pause")
        results = Results(file)
        parts = benchmark, folder, results, workers, (4,) if options.toy else ()
        stages, flow = Stages(*parts), FlowStages(*parts)

        def end(number: int, _frame: FrameType | None) -> None:
            workers.stop()

        before = [signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            for stage in chosen:
                if stage != "fetch":
                    getattr(flow if stage == "flow" else stages, stage)()
        finally:
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
                signal.signal(number, handler)
            print(summary(results.content))


def fetch_into(folder: Path, options: argparse.Namespace) -> None:
    """The stage fetch; a toy run takes few of the pictures."""
    if not options.toy:
        fetch(folder, options.packages)
        return
    whole = options.packages
    if whole is None:
        whole = folder / "all-packages"
        for name in PACKAGES:
            unpack(name, whole)
    fetch(folder, few_packages(whole, folder / "few-packages"), 0.2)


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
