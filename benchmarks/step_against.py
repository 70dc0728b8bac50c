"""A step of the demo's model, the start of a run and `lpl --help` against another checkout: alternating, median ratios.

    git worktree add ../older COMMIT
    OMP_NUM_THREADS=1 python benchmarks/step_against.py ../older [steps]

Only the command line is used. For the steps each checkout trains in its own process and waits after each optimizer step
while the other takes one. The start is a run of one step with a filled cache.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1]
STARTS, HELPS = 6, 12
WORKER = """
import runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
answers, sys.stdout, began = sys.stdout, sys.stderr, None
def wait(*_):
    global began
    print("ready" if began is None else time.perf_counter() - began, file=answers, flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
register_optimizer_step_post_hook(wait)
sys.argv[0] = "lpl"
runpy.run_module("lpl", run_name="__main__", alter_sys=True)
"""


def environment(checkout: Path) -> dict[str, str]:
    """Environment variables to run a checkout's lpl."""
    return os.environ | {"PYTHONPATH": str(checkout / "src"), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def training(folder: Path, checkout: Path, steps: int) -> list[str]:
    """Words of a command that trains the demo's model into a folder of this checkout."""
    own = folder / ("now" if checkout == HERE else "older")
    return [
        "train", "--config=demo", f"--pretrained_model_name_or_path={folder}/model", f"--train_data_dir={folder}/data",
        f"--output_dir={own}/run-{steps}", f"--latent_cache_dir={own}/cache", f"--max_train_steps={steps}",
        "--report_to=none", f"--checkpointing_steps={10**6}", "--lpl_norm_type=channel", "--lpl_sigma_threshold=3",
        "--lpl_target_share=0.5",
    ]  # fmt: skip


def lpl(checkout: Path, *argv: str) -> None:
    """Runs a command of a checkout to its end."""
    command = [sys.executable, "-m", "lpl", *argv]
    subprocess.run(command, check=True, env=environment(checkout), capture_output=True)


class Steps:
    """A run that makes one optimizer step each time it is called."""

    def __init__(self, folder: Path, checkout: Path, steps: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *training(folder, checkout, steps)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment(checkout),
        )  # fmt: skip
        assert self._answer() == "ready\n", f"{checkout} does not start"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def __call__(self) -> float:
        """Makes a step; returns its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self._answer())


def timed(call: Callable[[], None]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def report(what: str, older: Callable[[], float], now: Callable[[], float], repeats: int) -> None:
    """Measures both times in turn, after an uncounted first pair, and prints the median of their ratio."""
    ratios = []
    for repeat in range(repeats + 1):
        first, second = (older, now) if repeat % 2 else (now, older)
        times = [first(), second()]
        before, after = times if repeat % 2 else times[::-1]
        if repeat:
            ratios.append(after / before)
    ratios.sort()
    quarters = f"quartiles {ratios[len(ratios) // 4]:.3f}, {ratios[3 * len(ratios) // 4]:.3f}"
    print(f"{what}: {median(ratios):.3f} of the older's ({quarters}; {repeats} pairs)", flush=True)


def main(older: Path, steps: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lpl(HERE, "demo", f"--export_model={folder}/model")
        lpl(HERE, "demo", f"--export_data={folder}/data")
        report("lpl --help", *(lambda c=c: timed(lambda: lpl(c, "--help")) for c in (older, HERE)), HELPS)

        def start(checkout: Path) -> float:
            argv = training(folder, checkout, 1)
            shutil.rmtree(folder / ("now" if checkout == HERE else "older") / "run-1", ignore_errors=True)
            return timed(lambda: lpl(checkout, *argv))

        report("a run of one step", lambda: start(older), lambda: start(HERE), STARTS)
        runs = [Steps(folder, checkout, steps + 3) for checkout in (older, HERE)]
        report("step", *runs, steps)
        for run in runs:
            run.process.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
