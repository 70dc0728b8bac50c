"""Where a run may write: not on what it reads, not on what others wrote, not beside another run; and what has ended."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lpl.base.errors import TrainingStoppedError, UserError
from lpl.base.files import alone_in
from lpl.base.output_folder import RECORD
from lpl.config.command_line import parse_train
from lpl.training.output import output_of
from lpl.training.run_state import RunState
from lpl.training.saving import save_result


def seen(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()}


def put(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")


PLACES: dict[str, tuple[Callable[[Path, Path], tuple[Path, Path]], str]] = {
    "the model's folder": (lambda m, _: (m, m), "is the same folder"),
    "by a link": (lambda m, w: ((w / "link").symlink_to(m), (m, w / "link"))[1], "is the same folder"),
    "by ..": (lambda m, _: (m, m / "unet" / ".."), "is the same folder"),
    "above a model called unet": (
        lambda m, w: (shutil.move(m, w / "unet"), (w / "unet", w))[1],
        "unet in it is written",
    ),
    "within a component": (lambda m, _: (m, m / "vae" / "out"), "lies in the vae of the model"),
    "the VAE's folder": (lambda m, _: (m, m / "vae"), "is the same folder|lies in the vae"),
    "a copy of the model": (
        lambda m, w: (m, Path(shutil.copytree(m, w / "copy"))),
        "model_index.json in it is not what",
    ),
    "hard links to the model": (
        lambda m, w: (m, Path(shutil.copytree(m, w / "copy", copy_function=os.link))),
        "model_index.json in it is not what",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_no_run_lands_on_a_model(train_in: Any, model: Path, tmp_path: Path, place: str) -> None:
    make, told = PLACES[place]
    (tmp_path / "work").mkdir()
    source, folder = make(Path(shutil.copytree(model, tmp_path / "work" / "m")), tmp_path / "work")
    before = seen(tmp_path)
    run = train_in(folder, pretrained_model_name_or_path=source, expect_error=True)
    assert run.code == 2
    assert len(run.errors) == 1
    assert any(part in run.errors[0] for part in told.split("|")), run.errors
    assert seen(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet/mine.txt", {}),
        ("tokenizer_2/vocab.json", {}),
        ("checkpoint-4/optimizer.bin", {}),
        ("checkpoint-4", {}),
        ("saved-3/x", {}),
        ("logs/x", {}),
        ("samples/x.png", {"validation_prompt": "a"}),
        ("validation.jsonl", {"validation_samples": 1}),
        ("finished.json", {}),
        ("bad_files.jsonl", {}),
        (".tmp-result/x", {}),
        ("pytorch_lora_weights.safetensors", {"rank": 2}),
    ],
)
def test_nothing_of_others_is_replaced(train: Any, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    put(tmp_path / "out", name)
    before = seen(tmp_path)
    run = train(expect_error=True, **options)
    assert run.code == 2
    (line,) = run.errors
    assert line.startswith(f"error: --output_dir {tmp_path / 'out'}: {name.split('/')[0]}"), line
    assert seen(tmp_path) == before


@pytest.fixture(scope="module")
def ended(train_in: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of each; not to be changed."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    train_in(folder, checkpointing_steps=1, save_steps=2)
    return folder


@pytest.fixture
def copy(ended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ended, tmp_path / "out"))


def test_a_run_goes_on_over_its_own_result_alone(train: Any, copy: Path) -> None:
    (copy / "unet" / "mine.txt").write_text("mine")
    (copy / "checkpoint-1" / "notes.txt").write_text("mine")
    assert "nothing to do" in train(checkpointing_steps=1, save_steps=2).stdout  # it would replace nothing
    before = seen(copy)
    for name in ("unet/mine.txt", "checkpoint-1/notes.txt"):
        (line,) = train(max_train_steps=3, checkpointing_steps=1, expect_error=True).errors
        assert name in line
        assert seen(copy) == before
        before.pop(str(copy / name))
        (copy / name).unlink()
    train(max_train_steps=3, checkpointing_steps=3)
    assert json.loads((copy / "finished.json").read_text())["step"] == 3


@pytest.mark.parametrize("has_record", [True, False])
def test_a_result_that_is_gone_is_made_again(train: Any, copy: Path, ended: Path, has_record: bool) -> None:
    gone = ["unet/config.json"] if has_record else [p.name for p in copy.iterdir() if (p / "config.json").is_file()]
    if not has_record:  # of a version that kept none
        (copy / RECORD).unlink()
        gone.append("model_index.json")
    for name in gone:
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    run = train(checkpointing_steps=1, save_steps=2)
    assert (
        f"{copy}: the run had ended, but {'unet/config.json' if has_record else 'its result'} is missing" in run.stderr
    )
    assert (copy / "unet" / "config.json").read_bytes() == (ended / "unet" / "config.json").read_bytes()
    assert "nothing to do" in train(checkpointing_steps=1, save_steps=2).stdout


def test_a_run_of_a_version_without_records_goes_on(train: Any, copy: Path) -> None:
    (copy / RECORD).unlink()
    (copy / "unet" / "mine.txt").write_text("mine")
    (line,) = train(max_train_steps=3, checkpointing_steps=1, save_steps=2, expect_error=True).errors
    assert "unet/mine.txt" in line
    (copy / "unet" / "mine.txt").unlink()
    train(max_train_steps=3, checkpointing_steps=1, save_steps=3)
    assert json.loads((copy / "finished.json").read_text())["step"] == 3


def test_what_comes_into_the_way_of_a_result_stays_and_so_does_the_result(tmp_path: Path) -> None:
    class Weights:
        final = "raw"

        def put(self, kind: str) -> None:
            assert kind == "raw"

    def write(folder: Path) -> None:
        put(folder, "unet/config.json")

    config = parse_train([f"--output_dir={tmp_path}"])
    put(tmp_path, "unet/mine.txt")
    for number in (1, 2):
        with pytest.raises(TrainingStoppedError, match=rf"unet/mine.txt in it .* is in {tmp_path}/result-7-{number}$"):
            save_result(output_of(config), 7, Weights(), write, True, "data")  # type: ignore[arg-type]
        assert (tmp_path / f"result-7-{number}" / "unet" / "config.json").is_file()
    assert (tmp_path / "unet" / "mine.txt").is_file()
    assert not (tmp_path / "finished.json").exists()


def test_a_second_run_is_refused_while_one_is_at_work(train: Any, tmp_path: Path) -> None:
    before = os.listdir(tmp_path)
    with alone_in(tmp_path / "out"):
        (line,) = train(expect_error=True).errors
    assert line.startswith(f"error: --output_dir {tmp_path / 'out'}: another lpl command is at work in it")
    assert os.listdir(tmp_path) == before


def test_a_checkpoint_with_a_note_in_it_is_not_pruned(
    tmp_path: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from lpl.training.checkpoint import prune_checkpoints

    (copy / "checkpoint-1" / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING, "lpl"):
        prune_checkpoints(copy, copy / "checkpoint-2", 1)
    assert caplog.messages == [f"{copy / 'checkpoint-1'} stays: no run wrote notes.txt in it"]
    (copy / "checkpoint-1" / "notes.txt").unlink()
    prune_checkpoints(copy, copy / "checkpoint-2", 1)
    assert not (copy / "checkpoint-1").exists()


@pytest.mark.parametrize(("before", "device", "told"), [(None, "cpu", 0), (1, "cpu", 0), (3, "cpu", 1), (3, "cuda", 0)])
def test_other_threads_are_told_of_on_resume(
    ended: Path, caplog: pytest.LogCaptureFixture, before: int | None, device: str, told: int
) -> None:
    assert json.loads((ended / "checkpoint-2" / "state.json").read_text())["threads"] == torch.get_num_threads() == 1
    state = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device(device)))
    with caplog.at_level(logging.WARNING, "lpl"):
        RunState._tell_threads(state, Path("checkpoint-2"), before)  # type: ignore[arg-type]
    begins = "checkpoint-2: was written with 3 threads, now there are 1: what follows equals the run so far only up to"
    assert [message.startswith(begins) for message in caplog.messages] == [True] * told


@pytest.mark.parametrize("name", ["", ".", "../x", "a/../../x", "/tmp/x"])
def test_logs_stay_within_the_output(name: str) -> None:
    with pytest.raises(UserError, match="--logging_dir "):
        parse_train([f"--logging_dir={name}"])


@pytest.mark.parametrize("name", ["unet", "samples/x", "checkpoint-3", "tokenizer_2", "saved-1"])
def test_logs_do_not_take_another_name(train: Any, name: str) -> None:
    (line,) = train(logging_dir=name, expect_error=True).errors
    assert line == f"error: --logging_dir {name}: a run writes something else of that name: choose another"
