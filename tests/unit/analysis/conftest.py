"""The tiny model as plans see it; what is counted of it is counted once for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpl.config import ModelConfig
from lpl.families import blueprint, model_configs
from lpl.training.rehearsal import Rehearsal


@pytest.fixture(scope="session")
def plan_of(model: Path) -> Any:
    config = ModelConfig(str(model))
    return blueprint(model_configs(config), config)


@pytest.fixture(scope="session")
def rehearsal(plan_of: Any) -> Rehearsal:
    return Rehearsal(plan_of)
