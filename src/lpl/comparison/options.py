"""Options of `lpl compare`, which come beside those of `lpl train`."""

from __future__ import annotations

from dataclasses import dataclass, field

from lpl.config import TrainConfig
from lpl.config.checks import check_declared, option, require
from lpl.evaluation.options import EvalConfig, check_points

DEFAULT_SAMPLES = 1000
FILE = "compare.json"
"""What the comparison is written to, in --output_dir."""


@dataclass(frozen=True)
class CompareConfig:
    """Train under several sets of options from one model, on the same draws, and say what differs measurably.

    Takes every option of `lpl train` for what all arms share; --output_dir gets ARM/seed-N for each run, compare.json
    and report.html. Finished runs are left alone, so the same command continues.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    arms: str | None = option(None, path=True)
    """YAML file of the arms: a line `name: {option: value, ...}` each, the baseline first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every arm is run with each of these as --seed."""
    reference_dir: str | None = option(None, path=True)
    """Folder of real images: also measure every run as lpl eval does. Unset: validation losses alone."""
    num_samples: int = option(DEFAULT_SAMPLES, most=10**6)
    """Samples of every run for --reference_dir."""
    prompts: str | None = option(None, path=True)
    """What they are of: a .txt file of a prompt a line, or a metadata.jsonl with "text"; unset: the captions of
    --reference_dir."""

    num_inference_steps: int | tuple[int, ...] = option(EvalConfig.num_inference_steps, most=10_000)
    """Sampling steps, one or several, see guidance_scale."""
    guidance_scale: float | tuple[float, ...] | None = None
    """Of classifier-free guidance, as lpl eval takes it. With several scales or steps every run is measured at every
    pair, and arms are compared each at its own best guidance, for each number of steps."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(self.arms is not None, "--arms is missing: a YAML file of `name: {option: value}`, the baseline first")
        require(bool(self.seeds), "--seeds is empty: give at least one, better three")
        require(len(set(self.seeds)) == len(self.seeds), f"--seeds: {self.seeds} has a seed twice")
        bad = [seed for seed in self.seeds if not 0 <= seed < 2**32]
        require(not bad, f"--seeds must lie in 0..{2**32 - 1}, not {bad}")
        require(self.num_samples >= 1, f"--num_samples must be at least 1, not {self.num_samples}")
        require(
            self.reference_dir is not None or self.num_samples == DEFAULT_SAMPLES,
            "--num_samples acts with --reference_dir",
        )
        require(
            self.reference_dir is not None or self.prompts is None,
            f"--prompts {self.prompts} acts with --reference_dir (for images while training: --validation_prompts)",
        )
        check_points(self.guidance_scale, self.num_inference_steps)
        for name in ("guidance_scale", "num_inference_steps"):
            require(
                self.reference_dir is not None or getattr(self, name) == getattr(EvalConfig, name),
                f"--{name} acts with --reference_dir",
            )
        require(
            self.train.run.seed == 0,
            f"--seed {self.train.run.seed}: lpl compare takes all its seeds together, as --seeds 0 1 2",
        )
        require(not self.train.run.dry_run, "--dry_run: lpl compare has none; try one arm with lpl train --dry_run")
        check_logs(self.train)
        require(
            not self.train.logging.push_to_hub,
            "--push_to_hub: every run would overwrite the same repository; push the best one's folder afterwards, or "
            "run its options with lpl train",
        )
        require(
            self.train.data.holds_out or self.reference_dir is not None,
            "nothing would be measured: hold images out with --validation_samples (or --validation_data_dir), or give "
            "--reference_dir",
        )


def check_logs(config: TrainConfig) -> None:
    """Refuses logs that the time of each step cannot be read from.

    Raises:
        UserError: --report_to without TensorBoard.
    """
    require(
        config.logging.report_to in ("tensorboard", "all"),
        f"--report_to {config.logging.report_to}: lpl compare reads the time of each step from TensorBoard's logs; "
        "use tensorboard or all",
    )
