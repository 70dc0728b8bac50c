"""Optimizers by name: what each gets of the flags, what is refused, and that a resumed run ends the same."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import prodigyopt
import pytest
import schedulefree
import torch
from torch import nn
from transformers.optimization import Adafactor

from lpl.base.errors import UserError
from lpl.config import OptimConfig
from lpl.config.command_line import parse_train
from lpl.training.optimizers import build_optimizer, check_class, check_steps, coefficients
from lpl.training.sharded import join_optimizer, split_optimizer

CPU = torch.device("cpu")


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2, 2, 3, 3))]


def build(name: str, given: str | None = None, **options: Any) -> Any:
    return build_optimizer(parameters(), OptimConfig(optimizer=name, optimizer_args=given, **options), 1e-3)


def check(**options: Any) -> None:
    config = OptimConfig(**options)
    check_class(config)
    check_steps(config, CPU)


def refused(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        check(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "cls", "expected"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}),
        ("prodigy", prodigyopt.Prodigy, {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "decouple": True}),
        ("schedulefree_adamw", schedulefree.AdamWScheduleFree,
         {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "warmup_steps": 7}),
        ("adafactor", Adafactor,
         {"weight_decay": 0.1, "scale_parameter": False, "relative_step": False, "eps": (1e-30, 1e-3)}),
        ("torch.optim.RMSprop", torch.optim.RMSprop, {"weight_decay": 0, "eps": 1e-8}),
    ],
)  # fmt: skip
def test_each_has_what_the_flags_say(name: str, cls: type, expected: dict[str, Any], capsys: Any) -> None:
    flags = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "adam_weight_decay": 0.1}
    optimizer = build(name, **flags, lr_warmup_steps=7)
    assert type(optimizer) is cls
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in expected} == expected
    assert group["lr"] == 1e-3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "given", "key", "value"),
    [
        ("prodigy", "d_coef=2.0, safeguard_warmup=True", "d_coef", 2.0),
        ("adafactor", "scale_parameter=True", "scale_parameter", True),
        ("torch.optim.SGD", "momentum=0.9, weight_decay=0.2", "weight_decay", 0.2),
        ("adamw", "amsgrad=True", "amsgrad", True),
    ],
)
def test_keywords_reach_the_optimizer(name: str, given: str, key: str, value: Any) -> None:
    assert build(name, given).param_groups[0][key] == value


def test_biases_and_norms_do_not_decay() -> None:
    wide, narrow = build("adamw", adam_weight_decay=0.3).param_groups
    assert [p.ndim for p in wide["params"]] == [2, 4]
    assert [p.ndim for p in narrow["params"]] == [1]
    assert (wide["weight_decay"], narrow["weight_decay"]) == (0.3, 0.0)
    (group,) = build("adamw", adam_weight_decay=0.3, decay_all=True).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (3, 0.3)
    assert [g["weight_decay"] for g in build("torch.optim.SGD", "weight_decay=0.2").param_groups] == [0.2, 0.0]
    (group,) = build("torch.optim.Rprop").param_groups  # takes no weight decay
    assert len(group["params"]) == 3


def test_norms_of_a_run_do_not_decay(train: Any) -> None:
    """With decay as the only change (a rate times decay of 1/2 beside tiny steps), only what decays halves."""
    options = {"learning_rate": 1e-6, "adam_weight_decay": 5e5, "max_train_steps": 1, "checkpointing_steps": 1}
    split, all_ = train(**options), train(**options, decay_all=True, output="all")
    start = split.checkpoint(1, "model")
    norms = [name for name, p in start.items() if p.ndim == 1 and name.endswith("norm1.weight")]
    assert norms
    for name in norms:
        assert split.checkpoint(1, "model")[name].mean() == pytest.approx(1, abs=1e-4)
        assert all_.checkpoint(1, "model")[name].mean() == pytest.approx(0.5, abs=1e-4)
    for name in (name for name, p in start.items() if p.ndim > 1):
        assert torch.equal(split.checkpoint(1, "model")[name], all_.checkpoint(1, "model")[name])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizer": "adam"}, "--optimizer adam: expected one of adamw, adamw8bit, adafactor, prodigy"),
        ({"optimizer": "prodigy", "use_8bit_adam": True}, "--use_8bit_adam and --optimizer prodigy are both given"),
        ({"optimizer": "prodigy", "scale_lr": True}, "--scale_lr with --optimizer prodigy"),
        ({"optimizer_args": "lr=3"}, "--optimizer_args lr: --learning_rate sets that"),
        ({"optimizer_args": "betas=(0, 0)"}, "--optimizer_args betas: --adam_beta1 and --adam_beta2 sets that"),
        ({"optimizer": "prodigy", "optimizer_args": "d_coeff=1"}, "takes no such keyword; did you mean d_coef?"),
        ({"optimizer": "prodigy", "optimizer_args": "d_coef=x"}, "--optimizer_args d_coef=x: expected key=value"),
        ({"optimizer": "prodigy", "optimizer_args": "d0=-1"}, "d0=-1: ValueError: Invalid d0 value: -1"),
        ({"optimizer": "adafactor", "optimizer_args": "relative_step=True"}, "Cannot combine manual `lr` and"),
        ({"optimizer": "nowhere.Lion"}, "--optimizer nowhere.Lion: cannot import nowhere (No module named 'nowhere')"),
        ({"optimizer": "torch.optim.Adan"}, "--optimizer torch.optim.Adan: torch.optim has no Adan; did you mean Adam"),
        ({"optimizer": "torch.nn.Linear"}, "--optimizer torch.nn.Linear: Linear is no torch.optim.Optimizer"),
        ({"optimizer": "torch.optim.LBFGS"}, "--optimizer torch.optim.LBFGS: "),
        ({"optimizer": "torch.optim.SparseAdam"}, "--optimizer torch.optim.SparseAdam: RuntimeError: "),
        ({"optimizer": "schedulefree_adamw", "lr_scheduler": "cosine"}, "--lr_scheduler cosine with --optimizer"),
        ({"optimizer": "schedulefree_adamw", "use_ema": True}, "--use_ema with --optimizer schedulefree_adamw"),
        ({"optimizer": "schedulefree.RAdamScheduleFree", "use_ema": True}, "--use_ema with --optimizer schedulefree.R"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options: dict[str, Any], expected: str) -> None:
    assert expected in refused(**options)


@pytest.mark.parametrize(
    ("name", "package"),
    [("prodigy", "prodigyopt"), ("schedulefree_adamw", "schedulefree"), ("adamw8bit", "bitsandbytes")],
)  # fmt: skip
def test_missing_package_says_what_to_install(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    text = refused(optimizer=name)
    assert text == f"--optimizer {name} needs {package}: pip install 'latent-perceptual-loss[optim]'"


def test_refusals_come_before_the_model_loads(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpl.training.trainer.load_family", lambda *_: pytest.fail("the model was loaded"))
    run = train(optimizer="prodigy", optimizer_args="nonsense=1", expect_error=True)
    assert run.errors == [line for line in run.errors if "--optimizer_args nonsense: Prodigy takes no" in line] != []
    run = train(optimizer="torch.optim.LBFGS", expect_error=True)
    assert len(run.errors) == 1
    assert "--optimizer torch.optim.LBFGS" in run.errors[0]
    assert not run.folder.exists() or not list(run.folder.glob("*"))


def test_rate_of_prodigy_is_one_unless_given() -> None:
    assert parse_train(["--optimizer", "prodigy"]).learning_rate == 1.0
    assert parse_train(["--optimizer", "prodigy", "--rank", "2"]).learning_rate == 1.0
    assert parse_train(["--optimizer", "prodigy", "--learning_rate", "0.5"]).learning_rate == 0.5
    assert parse_train(["--optimizer", "adafactor"]).learning_rate == 1e-5


class Odd(torch.optim.Optimizer):
    """Keeps a tensor and numbers in its groups, a mapping and None in its state."""

    def __init__(self, params: Any, lr: float, twist: float = 1.0) -> None:
        super().__init__(
            params, {"lr": lr, "twist": twist, "count": torch.zeros((), dtype=torch.int32), "best": math.inf}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("inner", {"sum": torch.zeros_like(p), "none": None, "deep": {"n": 0}})
                state["inner"]["deep"]["n"] += 1
                state["inner"]["sum"] += p.grad
                p -= group["lr"] * state["inner"]["sum"] / group["count"]


class Unsaved(Odd):
    """Keeps what no file of ours holds."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["generator"] = torch.Generator()


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("odd_optimizers")
    module.Odd, module.Unsaved = Odd, Unsaved  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odd_optimizers", module)


def test_state_that_checkpoints_cannot_hold_is_refused_before_training() -> None:
    text = refused(optimizer="odd_optimizers.Unsaved")
    assert "TypeError: its state has generator, a Generator, which checkpoints cannot hold" in text


def test_state_goes_through_json(tmp_path: Path) -> None:
    optimizer = Odd(parameters(), 0.1)
    for _ in range(2):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    before = optimizer.state_dict()
    tensors, rest = split_optimizer(before)
    assert sorted(tensors) == ["0.inner/sum", "1.inner/sum", "2.inner/sum", "group0.count"]
    after = join_optimizer(tensors, json.loads(json.dumps(rest)))
    assert after == before
    assert after["state"][1]["inner"]["deep"] == {"n": 2}


def test_coefficients_are_the_runs_and_state_is_the_checkpoints() -> None:
    optimizer = build("prodigy", "d_coef=2.0")
    (wide, narrow) = coefficients(optimizer)
    assert wide["d_coef"] == 2.0
    assert (wide["weight_decay"], narrow["weight_decay"]) == (0.01, 0.0)
    assert not {"params", "lr", "d", "d_max", "d_numerator", "k"} & set(wide)


RUNS = {
    "adafactor": {"optimizer": "adafactor", "optimizer_args": "beta1=0.9"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": None, "optimizer_args": "d0=1e-4"},
    "schedulefree_adamw": {"optimizer": "schedulefree_adamw", "lr_warmup_steps": 2},
    "package.Class": {"optimizer": "odd_optimizers.Odd", "optimizer_args": "twist=2.0"},
    "torch.optim.NAdam": {
        "optimizer": "torch.optim.NAdam",
        "use_ema": True,
        "lr_scheduler": "cosine",
        "rank": 2,
    },  # fmt: skip,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(train: Any, name: str) -> None:
    options = RUNS[name] | {"checkpointing_steps": 3, "train_batch_size": 2}
    steps = {} if RUNS[name].get("lr_scheduler") else {"max_train_steps": 3}
    whole = train(**options, max_train_steps=6, output="whole")
    if steps:
        train(**options, **steps, output="halves")
    else:  # the length enters the schedule: forget the second half
        train(**options, max_train_steps=6, output="halves")
        folder = whole.folder.parent / "halves"
        (folder / "finished.json").unlink()
        (folder / "checkpoint-6" / "state.json").unlink()
    resumed = train(**options, max_train_steps=6, output="halves")
    for part in ("model", "optimizer"):
        a, b = whole.checkpoint(6, part), resumed.checkpoint(6, part)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    states = [json.loads((run.folder / "checkpoint-6" / "state.json").read_text()) for run in (whole, resumed)]
    assert states[0] == states[1]
    a, b = whole.unet(), resumed.unet()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    losses = list(whole.losses()["train_loss"].values())
    assert len(set(losses)) == 6
    assert whole.losses() == resumed.losses()


def test_prodigy_logs_the_rate_it_found(train: Any) -> None:
    run = train(optimizer="prodigy", learning_rate=None, max_train_steps=3, checkpointing_steps=3)
    logged = run.logged()
    (group, *_) = json.loads((run.folder / "checkpoint-3" / "state.json").read_text())["optimizer"]["param_groups"]
    assert logged["adapted_learning_rate"][3] == pytest.approx(group["d"])
    assert group["d"] >= 1e-6
    assert logged["learning_rate"][3] == 1.0
    assert "adapted_learning_rate" not in train(output="adamw").logged()


def test_checkpoint_of_another_optimizer_is_refused(train: Any) -> None:
    first = train(max_train_steps=2, checkpointing_steps=2)
    checkpoint = first.folder / "checkpoint-2"
    run = train(output="other", resume_from_checkpoint=checkpoint, optimizer="adafactor", expect_error=True)
    assert "holds the state of torch.AdamW, not of this run's transformers.Adafactor: see --optimizer" in run.errors[0]
    run = train(output="third", resume_from_checkpoint=checkpoint, decay_all=True, expect_error=True)
    assert "see --decay_all" in run.errors[0]
