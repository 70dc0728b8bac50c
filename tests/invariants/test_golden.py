"""A change that claims no maths must show identical loss: logged losses of a short run against a committed curve.

To state a change of numbers: LPL_WRITE_GOLDEN=1 pytest tests/invariants/test_golden.py, and say so in CHANGELOG.md.
"""

import json
import os
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden.json")
NAMES = ("diffusion_loss", "lpl/loss", "lpl/weighted_loss", "gradient_norm", "lpl/gradient_share")
RELATIVE = 1e-3
"""Processors differ in the last digits of a convolution, and six AdamW steps amplify that; maths changes more."""


@pytest.mark.parametrize("name", ["default", "every_option"])
def test_losses_equal_the_golden_curve(train, name):
    options = {
        "default": {"lpl_weight": "auto", "lpl_norm_type": None, "lpl_t_threshold": None},
        "every_option": {
            "lpl_reduction": "gated",
            "lpl_loss_type": "l1",
            "lpl_norm_type": "channel",
            "lpl_num_blocks": 2,
            "snr_gamma": 5.0,
            "noise_offset": 0.05,
            "random_flip": True,
            "proportion_empty_prompts": 0.3,
            "timestep_bias_strategy": "earlier",
            "timestep_bias_multiplier": 3.0,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 2,
            "use_ema": True,
        },
    }[name]
    run = train(train_batch_size=3, max_train_steps=6, **options)
    logged = run.logged()
    found = {metric: {str(step): value for step, value in logged[metric].items()} for metric in NAMES}
    curves = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("LPL_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(curves | {name: found}, indent=1) + "\n")
    for metric in NAMES:
        assert found[metric] == pytest.approx(curves[name][metric], rel=RELATIVE, abs=1e-9), metric
