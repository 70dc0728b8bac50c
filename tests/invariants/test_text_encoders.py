"""Trained text encoders keep what holds of the denoiser: resumed exactly, and alike however a batch is split."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from safetensors.torch import load_file

STEPS = 4
OPTIONS = {
    "train_text_encoder": True,
    "max_train_steps": STEPS,
    "checkpointing_steps": 2,
    "learning_rate": 1e-2,
    "text_encoder_lr": 2e-3,
    "text_encoder_2_lr": 1e-3,
    "proportion_empty_prompts": 0.3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 1,
    "max_token_length": 150,
}
VARIANTS = {
    "full": {"use_ema": True, "ema_decay": 0.9, "train_batch_size": 2, "gradient_accumulation_steps": 2},
    "lora": {"rank": 2, "lora_dropout": 0.3, "lora_targets": "all", "gradient_checkpointing": True},
}
ENCODERS = ("text_encoder", "text_encoder_2")


class Killed(BaseException):
    """Stands for the end of the process."""


def results(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the result, by file and name."""
    others = ("checkpoint-", "_kohya")
    files = [p for p in folder.rglob("*.safetensors") if not any(other in str(p) for other in others)]
    return {f"{p.relative_to(folder)} {name}": value for p in files for name, value in load_file(p).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("variant", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_a_whole_one(train: Any, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    from lpl.training.trainer import Trainer

    options = OPTIONS | VARIANTS[variant]
    whole = train(**options, output="whole")
    original = Trainer._optimizer_step

    def dying(self: Trainer) -> Any:
        if self.step == 3:
            raise Killed
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_optimizer_step", dying)
        with pytest.raises(Killed):
            train(**options)
    time.sleep(1.1)  # TensorBoard reads files of one second in the order of their names
    again = train(**options)
    assert same(results(again.folder), results(whole.folder))
    assert len({name.split()[0] for name in results(whole.folder)}) == (1 if variant == "lora" else 4)
    for part in ("model", "optimizer", *(("ema",) if variant == "full" else ())):
        assert same(again.checkpoint(STEPS, part), whole.checkpoint(STEPS, part)), part
    assert {name.split(".")[0] for name in whole.checkpoint(STEPS, "model")} == {"unet", *ENCODERS}
    assert again.losses() == whole.losses()
    rates = [f"learning_rate/{part}" for part in ENCODERS]
    assert [again.logged()[name] for name in rates] == [whole.logged()[name] for name in rates]
    assert list(again.logged()[rates[0]].values()) == pytest.approx(
        [value / 5 for value in again.logged()["learning_rate"].values()]
    )


def test_a_run_without_the_encoders_is_not_continued_with_them(train: Any) -> None:
    options = OPTIONS | {"max_train_steps": 2, "lr_scheduler": "constant", "lr_warmup_steps": None}
    first = train(**options | {"train_text_encoder": False, "text_encoder_lr": None, "text_encoder_2_lr": None})
    same = train(**options, expect_error=True)
    assert "--train_text_encoder False -> True" in same.errors[0]
    other = train(
        **options, expect_error=True, output="other", resume_from_checkpoint=first.folder / "checkpoint-2"
    )  # fmt: skip
    assert "holds other parameters than this run trains" in other.errors[0]
    assert "--train_text_encoder" in other.errors[0]


@pytest.mark.parametrize(
    ("variant", "fsdp"),
    [
        pytest.param("full", False, marks=pytest.mark.slow),
        ("full", True),
        ("lora", False),
        pytest.param("lora", True, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_with_twice_the_batch(
    train: Any,
    base_options: dict[str, Any],
    as_flags: Any,
    read_run: Any,
    tmp_path: Path,
    variant: str,
    fsdp: bool,
) -> None:
    """See test_accumulation.py for epsilon and tolerance. DDP refuses trained weights without a gradient."""
    epsilon, rate = 1e-2, 1e-2
    options = {**base_options, **OPTIONS, **VARIANTS[variant], "adam_epsilon": epsilon}
    options |= {"gradient_accumulation_steps": 1, "train_batch_size": 4, "lora_dropout": 0.0}
    whole = train(**{**options, "train_batch_size": 8}, output="one")
    launch(["train", *as_flags({**options, "output_dir": tmp_path / "two"})], 2, fsdp)
    two = read_run(tmp_path / "two")
    for name, values in whole.losses().items():
        assert list(two.losses()[name].values()) == pytest.approx(list(values.values()), rel=2e-5), name
    found, expected = two.checkpoint(STEPS, "model"), whole.checkpoint(STEPS, "model")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = STEPS * rate / epsilon * 1e-6 * max(1.0, float(value.abs().max()))
        assert (found[name] - value).abs().max() <= tolerance, name
    assert {name.split(".")[0] for name in found} == {"unet", *ENCODERS}
    for name, value in results(whole.folder).items():
        assert (results(tmp_path / "two")[name] - value).abs().max() <= 1e-3 * max(1.0, float(value.abs().max())), name
