"""An optimizer step of the demo's model, every default on, in steps of another checkout: alternating, median ratio.

    git worktree add ../older COMMIT
    OMP_NUM_THREADS=1 python benchmarks/step_against.py ../older [steps]

Each checkout runs in a process of its own and waits while the other steps.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parents[1]
WORKER = """
import inspect, sys, time
from pathlib import Path
out = sys.stdout
sys.stdout = sys.stderr
from lpl.cli import parse_train
from lpl.demo.photographs import export_data
from lpl.demo.weights import export_model
from lpl.training.preflight import preflight
from lpl.training.trainer import Trainer
folder, steps = Path(sys.argv[1]), sys.argv[2]
model, data = export_model(folder / "model"), export_data(folder / "data")
config = parse_train(["--config=demo", f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}",
    f"--output_dir={folder}/run", f"--latent_cache_dir={folder}/cache", f"--max_train_steps={steps}",
    "--report_to=none"])
more = []
if "stop" in inspect.signature(Trainer).parameters:
    from lpl.training.stopping import Stop
    more = [Stop()]
trainer = Trainer(config, preflight(config), *more)
print("ready", file=out, flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    trainer._optimizer_step()
    trainer.step += 1
    print(time.perf_counter() - start, file=out, flush=True)
"""


def start(checkout: Path, folder: str, steps: int) -> subprocess.Popen[str]:
    """A process that makes a step for every line it is sent, and answers with its seconds."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, folder, str(steps)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", f"{checkout} does not start"
    return process


def main(older: Path, steps: int) -> None:
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        processes = [start(checkout, folder, steps + 2) for checkout, folder in ((older, a), (HERE, b))]
        ratios = []
        for step in range(steps + 1):
            times = []
            for process in processes if step % 2 else processes[::-1]:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("step\n")
                process.stdin.flush()
                times.append(float(process.stdout.readline()))
            before, now = times if step % 2 else times[::-1]
            if step:
                ratios.append(now / before)
        for process in processes:
            process.kill()
        quarters = sorted(ratios)[len(ratios) // 4], sorted(ratios)[3 * len(ratios) // 4]
        print(f"step in steps of {older}: {median(ratios):.3f} (quartiles {quarters[0]:.3f}, {quarters[1]:.3f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 100)
