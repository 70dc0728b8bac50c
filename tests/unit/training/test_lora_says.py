"""What the files of a LoRA say of their training: as A1111, Forge and ComfyUI's managers read it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

NAMES = ("pytorch_lora_weights.safetensors", "says_kohya.safetensors")


def said_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as content:
        return dict(content.metadata())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of pictures with tags."""
    from tiny_models import tiny_images

    root = tmp_path_factory.mktemp("pictures") / "mine"
    for name, count, tags in (("cats", 3, "cat, red , cat"), ("dogs", 2, "dog, red")):
        tiny_images(root / name, count)
        (root / name / "metadata.jsonl").unlink()
        for number in range(count):
            (root / name / f"{number}.txt").write_text(tags)
    return root


def test_both_files_say_what_programs_show(train: Any, pictures: Path, model: Path) -> None:
    before = time.time()
    run = train(
        output="says", train_data_dir=pictures, repeats="cats=2", rank=1, buckets=True, bucket_step=8, bucket_area=256,
        max_train_steps=2, snr_gamma=5, metadata_author="me", metadata_license="CC0-1.0", metadata_title="Mine",
        metadata_tags="animals, red",
        metadata_description="animals", caption_prefix="zwx",
    )  # fmt: skip
    for name in NAMES:
        said = said_of(run.folder / name)
        assert json.loads(said["ss_tag_frequency"]) == {"cats": {"cat": 6, "red": 3}, "dogs": {"dog": 2, "red": 2}}
        assert json.loads(said["ss_dataset_dirs"]) == {
            "cats": {"n_repeats": 2.0, "img_count": 3},
            "dogs": {"n_repeats": 1.0, "img_count": 2},
        }
        buckets = json.loads(said["ss_bucket_info"])["buckets"].values()
        assert sum(bucket["count"] for bucket in buckets) == 5
        assert all(width >= height for width, height in (bucket["resolution"] for bucket in buckets))
        assert before < float(said["ss_training_started_at"]) <= float(said["ss_training_finished_at"]) < time.time()
        told = ("ss_num_train_images", "ss_num_reg_images", "ss_steps", "ss_resolution", "ss_clip_skip", "ss_epoch")
        assert [said[key] for key in told] == ["5", "0", "2", "(16, 16)", "None", "0"]
        told = ("author", "license", "tags", "description", "trigger_phrase", "prediction_type", "resolution")
        assert [said[f"modelspec.{key}"] for key in told] == [
            "me", "CC0-1.0", "animals, red", "animals", "zwx", "epsilon", "16x16",
        ]  # fmt: skip
        assert (said["ss_sd_model_name"], said["ss_zero_terminal_snr"]) == (model.name, "False")
        assert str(pictures) not in "".join(said.values())
        assert said["modelspec.title"] == "Mine"
    assert said["ss_output_name"] == "says_kohya"
