"""Options: groups, defaults that depend on others, and what is free to change between calls."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from lpl.base.errors import UserError, require
from lpl.config import DataConfig, LPLConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lpl.config.checks import facts_of
from lpl.config.commands import DemoConfig, PruneConfig, ReportConfig, VerifyConfig
from lpl.config.model_commands import ExportConfig


def test_every_option_has_one_name_and_a_help_text() -> None:
    import ast
    import inspect
    import itertools

    names = [f.name for group in TrainConfig().groups() for f in fields(group)]
    assert len(names) == len(set(names)) == len(TrainConfig().flat())
    documented = set()
    for group in TrainConfig().groups():
        body = ast.parse(inspect.getsource(type(group))).body[0].body  # type: ignore[attr-defined]
        for option, text in itertools.pairwise(body):
            if (
                isinstance(option, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                documented.add(option.target.id)  # type: ignore[union-attr]
    assert set(names) <= documented


def test_groups_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        RunConfig().seed = 3  # type: ignore[misc]


def test_learning_rate_depends_on_what_is_trained() -> None:
    assert TrainConfig().learning_rate == 1e-5
    assert TrainConfig(model=ModelConfig(rank=4)).learning_rate == 1e-4
    assert TrainConfig(model=ModelConfig(rank=4), optim=OptimConfig(learning_rate=3e-4)).learning_rate == 3e-4


@pytest.mark.parametrize(
    ("choice", "denoiser", "expected"),
    [("auto", False, False), ("auto", True, True), ("true", False, True), ("false", True, False)],
)
def test_lpl_checkpointing_follows_the_denoiser_unless_told(choice: Any, denoiser: bool, expected: bool) -> None:
    config = TrainConfig(lpl=LPLConfig(lpl_checkpointing=choice), run=RunConfig(gradient_checkpointing=denoiser))
    assert config.lpl_checkpointing is expected


@pytest.mark.parametrize(
    ("samples", "processes", "options", "expected"),
    [
        (6, 1, {"num_train_epochs": 1}, 6),
        (6, 1, {"num_train_epochs": 1, "train_batch_size": 4}, 2),
        (6, 1, {"num_train_epochs": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2}, 5),
        (6, 2, {"num_train_epochs": 3, "train_batch_size": 2, "gradient_accumulation_steps": 2}, 3),
        (7, 3, {"num_train_epochs": 100, "train_batch_size": 1}, 234),
        (10**9, 1, {"num_train_epochs": 3}, 3 * 10**9),
        (6, 4, {"max_train_steps": 9}, 9),
    ],
)
def test_number_of_steps(samples: int, processes: int, options: dict[str, int], expected: int) -> None:
    """Epochs times samples over the global batch, rounded up once."""
    assert TrainConfig(run=RunConfig(**options)).num_steps(samples, processes) == expected


def test_crop_size_is_the_resolution() -> None:
    assert DataConfig(resolution=64).crop_size == 64


def test_require() -> None:
    require(True, "never seen")
    with pytest.raises(UserError, match=r"^said$"):
        require(False, "said")


def test_piecewise_rules_are_read_early() -> None:
    OptimConfig(lr_scheduler="piecewise_constant", lr_step_rules="1:10,0.1:20,0.01")
    for rules in ("", "1:10", "1:10,0.1:x,0.01", "1:10:3,0.1", "a,b"):
        with pytest.raises(UserError, match="--lr_step_rules"):
            OptimConfig(lr_scheduler="piecewise_constant", lr_step_rules=rules)


def test_the_home_folder_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands ~ in a YAML file, and a folder of that name is dangerous to remove."""
    monkeypatch.setenv("HOME", "/home/me")
    train = TrainConfig()
    groups = [(type(group), {}) for group in (train.run, train.data, train.model, train.logging)]
    groups += [(DemoConfig, {}), (VerifyConfig, {}), (PruneConfig, {})]
    groups += [(ExportConfig, {"source": "x", "output": "y"}), (ReportConfig, {"runs": ("x",)})]
    seen = 0
    for group, needed in groups:
        for name, facts in facts_of(group).items():
            if facts.path and name != "logging_dir":  # within another
                several = name == "runs"
                found: Any = group(**needed | {name: ("~/x", "y") if several else "~/x"})
                assert getattr(found, name) == (("/home/me/x", "y") if several else "/home/me/x")
                seen += 1
    assert seen > 20
