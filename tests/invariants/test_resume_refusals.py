"""What a resumed run must not do in silence: use another run's rate, end before it began, change its data."""

import pytest
import torch

from lpl.testing import tiny_images
from lpl.training.checkpoint import list_checkpoints, save_checkpoint


@pytest.fixture
def source(train):
    """A finished run of four steps with checkpoints at 2 and 4."""
    return train(output="source", max_train_steps=4, checkpointing_steps=2)


def test_rate_of_a_run_that_starts_from_anothers_checkpoint_is_its_own(train, source):
    checkpoint = source.folder / "checkpoint-4"
    run = train(output="other", max_train_steps=6, resume_from_checkpoint=checkpoint, learning_rate=3e-5)
    assert run.logged()["learning_rate"][6] == pytest.approx(3e-5)


def test_checkpoint_beyond_the_runs_length_is_refused(train, source):
    checkpoint = source.folder / "checkpoint-4"
    run = train(output="other", max_train_steps=3, resume_from_checkpoint=checkpoint, expect_error=True)
    assert "step 4" in run.stderr
    assert "--max_train_steps" in run.stderr
    assert not (run.folder / "model_index.json").exists()


def test_changed_data_is_refused(train, source, tmp_path):
    grown = tiny_images(tmp_path / "data", count=6)
    first = train(output="run", max_train_steps=2, checkpointing_steps=2, train_data_dir=grown)
    tiny_images(grown, count=7)
    run = train(output="run", max_train_steps=4, checkpointing_steps=2, train_data_dir=grown, expect_error=True)
    assert "other images or captions" in run.stderr
    assert (first.folder / "checkpoint-2").is_dir()


def test_another_spelling_of_the_same_folder_continues(train, source, data):
    run = train(output="source", max_train_steps=5, checkpointing_steps=2, train_data_dir=f"{data}/.")
    assert run.code == 0


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_damaged_checkpoint_is_named(train, source, name):
    file = source.folder / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    run = train(output="source", max_train_steps=6, checkpointing_steps=2, expect_error=True)
    assert len(run.errors) == 1
    assert "checkpoint-4: damaged" in run.errors[0]


def test_limit_never_deletes_the_checkpoint_just_written(tmp_path):
    """Later checkpoints may lie there when a run has gone back to an earlier one."""
    parameters = {"weight": torch.nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    for step, limit in ((6, None), (8, None), (3, 1)):
        save_checkpoint(tmp_path, step, parameters, optimizer, None, {}, limit)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
