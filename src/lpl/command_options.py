"""Options of the small commands; those of `lpl train` are in lpl.config, others with what they run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lpl.config import TrainConfig
from lpl.config.checks import check_declared, option, require
from lpl.errors import UserError

MOST_SHOWN = 300
UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class PlanConfig:
    """Say what a run needs, and what it would need with one option changed; no data and no weights are read.

    Takes every option of `lpl train`. Without --pretrained_model_name_or_path: SDXL base 1.0.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    memory: str = "24GiB"
    """Memory of the GPU: 24GiB or 24 (2^30 bytes each), 24GB (10^9)."""
    num_processes: int | None = option(None, most=100_000)
    """GPUs; unset: as launched, or one."""
    sharding: Literal["none", "fsdp2"] = "none"
    """How they share the model: each has it whole, or it is split over them."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(self.memory_bytes > 0, f"--memory must be above 0, not {self.memory}")
        number = self.num_processes
        require(number is None or number >= 1, f"--num_processes must be at least 1, not {number}")

    @property
    def memory_bytes(self) -> int:
        """Memory of the GPU in bytes.

        Raises:
            UserError: no size.
        """
        found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?) ?(GiB|GB|MiB|MB)?", self.memory, re.IGNORECASE)
        if found is None:
            raise UserError(f"--memory {self.memory}: expected a size such as 24GiB, 24GB or 24 (GiB)")
        number, unit = found.groups()
        return int(float(number) * UNITS[(unit or "GiB").lower()])


@dataclass(frozen=True)
class VerifyConfig:
    """Read every file of a cache and compare checksums; damage exits with 2."""

    latent_cache_dir: str | None = option(None, path=True)
    """The cache; unset: the user's."""
    delete: bool = False
    """Remove what is damaged; the next run encodes it again."""

    def __post_init__(self) -> None:
        check_declared(self)


@dataclass(frozen=True)
class PruneConfig:
    """Remove from a cache what no run has used for a while."""

    latent_cache_dir: str | None = option(None, path=True)
    """The cache; unset: the user's."""
    days: float = 30.0
    """For how long it must not have been used; 0: everything goes."""
    dry_run: bool = False
    """Only say what would go."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(self.days >= 0, f"--days must be 0 or more, not {self.days}")


@dataclass(frozen=True)
class DataReportConfig:
    """Read all images once, report on them and draw what the model will see; no weights are needed, nothing is cached.

    Takes every option of `lpl train`. Writes to OUTPUT_DIR/data-report. Streams are read anew for what is drawn.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    num_shown: int = 24
    """Draws on the contact sheet, the first of the run; 0: no pictures."""

    def __post_init__(self) -> None:
        check_declared(self)
        require(0 <= self.num_shown <= MOST_SHOWN, f"--num_shown must lie in 0..{MOST_SHOWN}, not {self.num_shown}")


@dataclass(frozen=True)
class DemoConfig:
    """Train a small but real SDXL on photographs without and with LPL and compare them, or export its parts."""

    output_dir: str = option("lpl-demo", path=True)
    """Where model, data and results go."""
    export_model: str | None = option(None, path=True)
    """Only write the small SDXL to this folder, in diffusers' format."""
    export_data: str | None = option(None, path=True)
    """Only write its photographs to this folder, with metadata.jsonl."""
    max_train_steps: int | None = None
    """Optimizer steps of each run; unset: the preset's."""

    def __post_init__(self) -> None:
        check_declared(self)
