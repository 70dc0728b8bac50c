"""Where the time of an `lpl train` step goes, on the demo's model and data, in shares: little depends on the machine.

python benchmarks/step_profile.py [steps]
"""

import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from lpl.config.command_line import parse_train
from lpl.demo.photographs import export_data
from lpl.demo.weights import export_model
from lpl.perceptual.loss import LatentPerceptualLoss
from lpl.training.preflight import preflight
from lpl.training.stopping import Stop

WARM_UP = 5


def timed(seconds: dict[str, float], name: str, function: Any) -> Any:
    """A function that adds its time to seconds[name]."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] += time.perf_counter() - start
        return result

    return run


def main(steps: int) -> None:
    from lpl.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        model, data = export_model(Path(folder) / "model"), export_data(Path(folder) / "data")
        config = parse_train(
            [
                "--config=demo",
                f"--pretrained_model_name_or_path={model}",
                f"--train_data_dir={data}",
                f"--output_dir={folder}/run",
                f"--latent_cache_dir={folder}/cache",
                f"--max_train_steps={WARM_UP + steps}",
                "--report_to=none",
            ]
        )
        trainer = Trainer(config, preflight(config), Stop())
        seconds: dict[str, float] = defaultdict(float)
        for _ in range(WARM_UP):
            trainer._optimizer_step()
            trainer.step += 1
        trainer.step_loss.family.denoise = timed(seconds, "denoiser", trainer.step_loss.family.denoise)
        LatentPerceptualLoss.__call__ = timed(  # type: ignore[method-assign]
            seconds, "decoder (LPL with its gradient)", LatentPerceptualLoss.__call__
        )
        trainer.accelerator.backward = timed(seconds, "backward", trainer.accelerator.backward)
        trainer.accelerator.clip_grad_norm_ = timed(seconds, "optimizer", trainer.accelerator.clip_grad_norm_)
        trainer.trained.optimizer.step = timed(seconds, "optimizer", trainer.trained.optimizer.step)
        trainer.trained.ema.step = timed(seconds, "optimizer", trainer.trained.ema.step)
        trainer.data.batch = timed(seconds, "rest: reading the batch", trainer.data.batch)
        trainer.step_loss.draw = timed(seconds, "rest: draws", trainer.step_loss.draw)
        start = time.perf_counter()
        for _ in range(steps):
            trainer._optimizer_step()
            trainer.step += 1
        total = time.perf_counter() - start
        for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
            print(f"{100 * value / total:5.1f} %  {name}")
        outside = total - sum(v for name, v in seconds.items() if not name.startswith("rest"))
        print(f"{100 * outside / total:5.1f} %  everything outside denoiser, decoder, backward and optimizer")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
