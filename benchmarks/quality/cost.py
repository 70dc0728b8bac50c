"""What a step of an arm costs, counted, for arms that get as much as another one: a clock shows the load, too."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.arms import Options
from benchmarks.quality.variants import OPTIONS
from benchmarks.quality.workers import as_texts
from lpl.analysis.needs import estimate
from lpl.base.errors import require
from lpl.config.command_line import parse_train
from lpl.config.files import as_flags
from lpl.families import blueprint, model_configs
from lpl.training.rehearsal import Rehearsal


def step_cost(options: Options, pipeline: Path) -> float:
    """FLOPs of a step for one sample, with LPL's as many as are expected.

    Args:
        options: of `lpl train`.
        pipeline: folder of what is trained.

    Raises:
        UserError: options of variants are among them, of which no cost is known.
    """
    variants = sorted(OPTIONS.keys() & options.keys())
    require(not variants, f"arms.yaml: costs: the FLOPs of {', '.join(variants)} are not counted")
    config = parse_train(
        as_flags(as_texts(options | {"pretrained_model_name_or_path": str(pipeline), "resolution": 64}))
    )
    needs = estimate(config, Rehearsal(blueprint(model_configs(config.model), config.model), "cpu"))
    return needs.step_flops + needs.mean_lpl_flops
