"""What a resumed run must not do in silence: use another run's rate, end before it began, change its data."""

import pytest
import torch
from tiny_models import tiny_images

from lpl.config.run_folder import list_checkpoints
from lpl.training.checkpoint import save_checkpoint


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


@pytest.mark.parametrize(
    "name", ["state.json", "model.safetensors", pytest.param("optimizer.safetensors", marks=pytest.mark.slow)]
)
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(train, source, name):
    whole = {key: tensor.clone() for key, tensor in source.checkpoint(4, "optimizer").items()}  # not the file's memory
    file = source.folder / "checkpoint-4" / name
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    named = train(output="source", max_train_steps=6, resume_from_checkpoint="checkpoint-4", expect_error=True)
    assert len(named.errors) == 1
    assert "checkpoint-4 is damaged" in named.errors[0]
    run = train(output="source", max_train_steps=6, checkpointing_steps=2)
    assert f"checkpoint-4 is damaged ({name} has " in run.stderr
    again = run.checkpoint(4, "optimizer")
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert [path.name for path in list_checkpoints(run.folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_allow_changes_continues_and_says_with_what(train, source, tmp_path):
    refused = train(output="source", max_train_steps=5, learning_rate=2e-3, seed=3, expect_error=True)
    assert "--learning_rate 0.001 -> 0.002" in refused.errors[0]
    assert "--seed 0 -> 3" in refused.errors[0]
    assert "--allow_changes" in refused.errors[0]
    options = {"max_train_steps": 5, "learning_rate": 2e-3, "seed": 3}
    run = train(output="source", allow_changes=True, **options)
    assert "--allow_changes: " in run.stderr
    assert "continues with --learning_rate 0.001 -> 0.002, --seed 0 -> 3" in run.stderr
    assert list(run.logged()["learning_rate"].values()) == pytest.approx([1e-3] * 4 + [2e-3])
    # The new options are the run's own from now on.
    assert "nothing to do" in train(output="source", **options).stdout


def test_allow_changes_takes_other_data(train, source, tmp_path):
    grown = tiny_images(tmp_path / "data", count=7)
    train(output="run", max_train_steps=2, checkpointing_steps=2, train_data_dir=grown)
    tiny_images(grown, count=8)
    run = train(output="run", max_train_steps=3, checkpointing_steps=2, train_data_dir=grown, allow_changes=True)
    assert "checkpoint-2 was trained on other images or captions" in run.stderr


def test_another_number_of_samples_a_step_is_refused(train, source):
    run = train(output="source", max_train_steps=6, train_batch_size=2, expect_error=True)
    assert "samples a step 1 -> 2" in run.errors[0]


def test_limit_never_deletes_the_checkpoint_just_written(tmp_path):
    """Later checkpoints may lie there when a run has gone back to an earlier one."""
    parameters = {"weight": torch.nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    for step, limit in ((6, None), (8, None), (3, 1)):
        save_checkpoint(tmp_path, step, parameters, optimizer, None, {}, limit)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]
