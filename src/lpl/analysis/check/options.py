"""Options of `lpl check`."""

from __future__ import annotations

from dataclasses import dataclass, field

from lpl.config import TrainConfig, require

FEWEST, MOST = 16, 64
WALK_TOLERANCE = 2e-2
"""Largest difference of LPL's walk from vae.decode, of images that span 2: TF32 on a GPU stays below."""


@dataclass(frozen=True)
class CheckConfig:
    """Measure on a few of the images whether LPL can work here, and suggest its gate and weight; nothing is trained.

    Takes every option of `lpl train`, measures with them and writes to OUTPUT_DIR/check-report. Nothing is cached.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    num_images: int = 32
    """Images to measure on, spread over the data; 16 to 64."""

    def __post_init__(self) -> None:
        require(FEWEST <= self.num_images <= MOST, f"--num_images must lie in {FEWEST}..{MOST}, not {self.num_images}")
        require(self.train.lpl.use_lpl, "lpl check measures LPL: drop --no_use_lpl")
