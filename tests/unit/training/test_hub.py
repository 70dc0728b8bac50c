"""The model card and the push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from PIL import Image

from lpl.config import DataConfig, LoggingConfig, LPLConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lpl.config.files import write_config
from lpl.training.saving import write_model_card


def card(folder: Path, **groups: Any) -> tuple[dict[str, Any], str]:
    """The card's metadata and text."""
    config = TrainConfig(**groups)
    write_config(config, folder)
    text = write_model_card(config, folder).read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_card_of_a_fine_tune(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for step in (5, 10):
        Image.new("RGB", (4, 4)).save(tmp_path / "samples" / f"step-{step:07d}.png")
    head, body = card(
        tmp_path,
        model=ModelConfig("stabilityai/stable-diffusion-xl-base-1.0"),
        data=DataConfig(dataset_name="some/photos"),
        logging=LoggingConfig(hub_token="hf_secret", validation_prompt="a fox"),
        run=RunConfig(max_train_steps=17),
    )
    assert head["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert head["datasets"] == ["some/photos"]
    assert head["library_name"] == "diffusers"
    assert {"text-to-image", "latent-perceptual-loss"} <= set(head["tags"])
    assert "lora" not in head["tags"]
    assert "Latent Perceptual Loss" in body
    assert "The weights are those of the last step." in body
    assert "DiffusionPipeline.from_pretrained" in body
    assert "![a fox](samples/step-0000010.png)" in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["max_train_steps"] == 17
    assert "hf_secret" not in body
    assert "hub_token" not in body


@pytest.mark.parametrize(("choice", "said"), [("auto", "moving average (decay 0.99)"), ("raw", "of the last step")])
def test_card_says_which_weights_these_are(tmp_path: Path, choice: Any, said: str) -> None:
    optim = OptimConfig(use_ema=True, ema_decay=0.99, final_weights=choice)
    _, body = card(tmp_path, model=ModelConfig("a/b"), optim=optim)
    assert said in body


def test_card_of_a_lora_without_lpl_from_a_folder(tmp_path: Path, model: Path) -> None:
    head, body = card(tmp_path, model=ModelConfig(str(model), rank=4), lpl=LPLConfig(use_lpl=False))
    assert "base_model" not in head  # a folder of this machine is nobody else's
    assert "lora" in head["tags"]
    assert "load_lora_weights" in body
    assert "plain diffusion objective" in body


def test_push_uploads_the_result_only(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Created:
        repo_id = "me/out"

    def create(name: str, **options: Any) -> Any:
        calls.append({"create": name, **options})
        return Created

    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: calls.append(options))
    (tmp_path / "out" / "data-report").mkdir(parents=True)
    (tmp_path / "out" / "check-report" / "maps").mkdir(parents=True)
    for name in (
        "data-report/draws.png",
        "check-report/maps/mid.png",
        "bad_files.jsonl",
    ):  # these show or name training images
        (tmp_path / "out" / name).write_text('{"id": "1", "name": "1.png", "reason": "cut"}')
    monkeypatch.setattr("lpl.data.bad_files.BadFiles.write", lambda _: None)
    run = train(push_to_hub=True, hub_token="hf_secret", checkpointing_steps=1, save_steps=1)
    created, uploaded = calls
    assert created == {"create": "out", "exist_ok": True, "token": "hf_secret"}
    assert uploaded["repo_id"] == "me/out"
    assert uploaded["folder_path"] == run.folder
    from huggingface_hub.utils import filter_repo_objects

    files = [str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()]
    sent = set(filter_repo_objects(files, ignore_patterns=uploaded["ignore_patterns"]))
    assert {"README.md", "config.yaml", "model_index.json", "unet/config.json"} <= sent
    kept = ("checkpoint", "saved-", "logs", "data-report", "check-report", "bad_files")
    assert not any(name.startswith(kept) for name in sent)
    assert all(any(name.startswith(start) for name in files) for start in kept)
    assert not any(b"hf_secret" in (run.folder / name).read_bytes() for name in sent)


def test_push_that_cannot_work_is_said_before_training(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(*_: Any) -> None:
        raise AssertionError("weights were about to load")

    monkeypatch.setattr("lpl.training.trainer.load_family", no_model)
    failed = train(push_to_hub=True, hub_model_id="me/model", expect_error=True)
    assert failed.errors[0].startswith("error: --push_to_hub: cannot create me/model: ")
    assert not failed.folder.exists()
