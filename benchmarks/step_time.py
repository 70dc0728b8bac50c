"""A whole optimizer step of the demo's model with LPL, relative to one without: alternating in one process, medians.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py [steps]

The demo's decoder is large compared with its denoiser, and its gate passes 67 % of the samples; for SDXL see `lpl
plan`.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from lpl.config.command_line import parse_train
from lpl.demo.photographs import export_data
from lpl.demo.weights import export_model
from lpl.training.preflight import preflight
from lpl.training.stopping import Stop

ARMS = {
    "without LPL": ["--no_use_lpl"],
    "LPL": [],
    "LPL, checkpointing": ["--lpl_checkpointing=true"],
    "LPL, bfloat16": ["--lpl_dtype=bfloat16"],
    "LPL, random depth": ["--lpl_random_depth", "--lpl_weight=1.0"],
    "LPL, t < 200": ["--lpl_t_threshold=200"],
}


def main(steps: int) -> None:
    from lpl.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        model, data = export_model(Path(folder) / "model"), export_data(Path(folder) / "data")
        seconds: dict[str, list[float]] = {name: [] for name in ARMS}
        trainers = {}
        for name, flags in ARMS.items():
            config = parse_train(
                [
                    "--config=demo",
                    f"--pretrained_model_name_or_path={model}",
                    f"--train_data_dir={data}",
                    f"--output_dir={folder}/{len(trainers)}",
                    f"--latent_cache_dir={folder}/cache",
                    f"--max_train_steps={steps + 1}",
                    "--report_to=none",
                    *flags,
                ]
            )
            trainers[name] = Trainer(config, preflight(config), Stop())
        for step in range(steps + 1):
            for name, trainer in trainers.items():
                start = time.perf_counter()
                trainer._optimizer_step()
                trainer.step += 1
                if step:
                    seconds[name].append(time.perf_counter() - start)
        base = sum(seconds["without LPL"])
        print("| step | median, without LPL = 1 | mean |\n|---|---|---|")
        for name, values in seconds.items():
            middle = median(values) / median(seconds["without LPL"])
            print(f"| {name} | {middle:.2f} | {sum(values) / base:.2f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
