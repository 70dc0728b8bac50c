"""Options of the other commands, some of which take those of `lpl train` too."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

from lpl.base.errors import UserError, require
from lpl.config import TrainConfig
from lpl.config.checks import Needs, Options, option
from lpl.config.model_commands import EvalConfig, check_points
from lpl.config.run_folder import PAGE

MOST_SHOWN = 300
UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class PlanConfig(Options):
    """Say what a run needs, and what it would need with one option changed; no data and no weights are read.

    Takes every option of `lpl train`. Without --pretrained_model_name_or_path: SDXL base 1.0.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    memory: str = "24GiB"
    """Memory of the GPU: 24GiB or 24 (2^30 bytes each), 24GB (10^9)."""
    num_processes: int | None = option(None, least=1, most=100_000)
    """GPUs; unset: as launched, or one."""
    sharding: Literal["none", "fsdp2"] = "none"
    """How the GPUs share the model: each has it whole (none), or it is split over them (fsdp2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory_bytes > 0, f"--memory must be above 0, not {self.memory}")

    @property
    def memory_bytes(self) -> int:
        """Memory of the GPU in bytes.

        Raises:
            UserError: --memory is no size.
        """
        found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?) ?(GiB|GB|MiB|MB)?", self.memory, re.IGNORECASE)
        if found is None:
            raise UserError(f"--memory {self.memory}: expected a size such as 24GiB, 24GB or 24 (GiB)")
        number, unit = found.groups()
        return int(float(number) * UNITS[(unit or "GiB").lower()])


@dataclass(frozen=True)
class CacheConfig(Options):
    """Encode a run's images and captions beforehand; a run with the same options then encodes nothing.

    Takes every option of `lpl train`. `lpl cache verify` and `lpl cache prune` look after what is cached.
    """

    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class VerifyConfig(Options):
    """Read every file of a cache and compare checksums; damage exits with 2."""

    latent_cache_dir: str | None = option(None, path=True)
    """The cache; unset: the user's."""
    delete: bool = False
    """Remove what is damaged; the next run encodes it again."""


@dataclass(frozen=True)
class PruneConfig(Options):
    """Remove from a cache what no run has used for a while."""

    latent_cache_dir: str | None = option(None, path=True)
    """The cache; unset: the user's."""
    days: float = option(30.0, least=0)
    """Remove what was not used for this many days; 0: everything."""
    dry_run: bool = False
    """Only say what would go."""


@dataclass(frozen=True)
class DataReportConfig(Options):
    """Read all images once, report on them and draw what the model will see; no weights are needed, nothing is cached.

    Takes every option of `lpl train`. Writes to OUTPUT_DIR/data-report. Streams are read again for the pictures.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    num_shown: int = option(24, least=0, most=MOST_SHOWN)
    """How many draws, from the run's first on, the contact sheet shows; 0: no pictures."""


@dataclass(frozen=True)
class DemoConfig(Options):
    """Train a small but real SDXL on photographs without and with LPL and compare them, or export its parts."""

    output_dir: str = option("lpl-demo", path=True)
    """Where model, data and results go."""
    export_model: str | None = option(None, path=True)
    """Only write the small SDXL to this folder, in diffusers' format."""
    export_data: str | None = option(None, path=True)
    """Only write its photographs to this folder, with metadata.jsonl."""
    max_train_steps: int | None = option(None, least=1, most=10**9)
    """Optimizer steps of each run; unset: the preset's."""


FEWEST = 16
PORT = 8155


@dataclass(frozen=True)
class CheckConfig(Options):
    """Measure on a few of the images whether LPL can work here, and suggest its gate and weight; nothing is trained.

    Takes every option of `lpl train`, measures with them and writes to OUTPUT_DIR/check-report. Nothing is cached.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    num_images: int = option(32, least=FEWEST, most=64)
    """Images to measure on, spread over the data; 16 to 64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.train.lpl.use_lpl, "lpl check measures LPL: drop --no_use_lpl")


@dataclass(frozen=True)
class ReportConfig(Options):
    """Write one HTML page about runs, comparisons, evaluations and checks; it works from disk, without network."""

    runs: tuple[str, ...] = option(MISSING, path=True)
    """Folders that lpl train, compare, eval or check wrote; the others are compared with the first one named."""
    output: str | None = option(None, path=True)
    """The HTML file; unset: report.html in the first folder."""
    max_megabytes: float = option(7.5, least=1, most=10_000.0)
    """Largest size of the page; pictures are made smaller to keep below it."""
    export: str | None = option(None, path=True)
    """Folder for every chart as SVG and PDF, every table as CSV and LaTeX, and pictures as PNG, beside the page."""
    serve: bool = False
    """Instead of writing the page, show it at 127.0.0.1 until Ctrl-C and update it while the runs go on."""
    port: int = option(PORT, least=0, most=65535)
    """Port of --serve; 0: any free one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.runs), "name a folder to report on: lpl report RUN ...")
        given = [name for name in ("output", "export") if getattr(self, name) is not None]
        require(not self.serve or not given, f"--serve writes nothing: drop {' and '.join(f'--{n}' for n in given)}")
        require(self.serve or self.port == PORT, f"--port {self.port} acts with --serve: give that too")

    @property
    def most_bytes(self) -> int:
        """Largest size of the page in bytes."""
        return int(self.max_megabytes * 10**6)

    @property
    def page(self) -> Path:
        """The file to write."""
        return Path(self.runs[0]) / PAGE if self.output is None else Path(self.output)


PROMPTS = Needs(
    "--reference_dir (for images while training: --validation_prompts)", lambda config: config.reference_dir is not None
)


@dataclass(frozen=True)
class CompareConfig(Options):
    """Train under several sets of options from one model, on the same draws, and say what differs measurably.

    Takes every option of `lpl train` for what all arms share; --output_dir gets ARM/seed-N for each run, compare.json
    and report.html. Finished runs are left alone, so the same command continues.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    arms: str | None = option(None, path=True)
    """YAML file of the arms: a line `name: {option: value, ...}` each, the baseline first."""
    seeds: tuple[int, ...] = option((0, 1, 2), least=0, most=2**32 - 1)
    """Every arm is run with each of these as --seed."""
    reference_dir: str | None = option(None, path=True)
    """Folder of real images: also measure every run as lpl eval does. Unset: validation losses alone."""
    num_samples: int = option(1000, least=1, most=10**6, needs="reference_dir")
    """Samples of every run for --reference_dir."""
    prompts: str | None = option(None, path=True, needs=PROMPTS)
    """Prompts of the samples: a .txt file with a prompt a line, or a metadata.jsonl with "text"; unset: the captions
    of --reference_dir."""

    num_inference_steps: int | tuple[int, ...] = option(
        EvalConfig.num_inference_steps, least=1, most=10_000, needs="reference_dir"
    )
    """Sampling steps, one or several, see guidance_scale."""
    guidance_scale: float | tuple[float, ...] | None = option(None, least=0, needs="reference_dir")
    """Scale of classifier-free guidance, as lpl eval takes it. With several scales or steps every run is measured at
    every pair, and each arm is compared at its own best guidance, for each number of steps."""

    scheduler: Literal["model", "dpmsolver++"] = option("model", needs="reference_dir")
    """Sampler, as lpl eval takes it."""
    timestep_spacing: Literal["model", "leading", "linspace", "trailing"] = option("model", needs="reference_dir")
    """The sampler's timesteps, as lpl eval takes them; use trailing with few steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.arms is not None, "--arms is missing: a YAML file of `name: {option: value}`, the baseline first")
        require(bool(self.seeds), "--seeds is empty: give at least one, better three")
        require(len(set(self.seeds)) == len(self.seeds), f"--seeds: {self.seeds} has a seed twice")
        self.require_acting()
        check_points(self.guidance_scale, self.num_inference_steps)
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
