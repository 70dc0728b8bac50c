"""With every option of the data on, a run is still a function of seed and step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lpl.training.step import TrainingStep
from lpl.training.trainer import Trainer

STEPS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Fourteen pictures of three shapes in two folders, with lists of tags; three to regularise with."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)

    def picture(path: Path, width: int, height: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (width, height), torch.randint(0, 256, (3 * width * height,), generator=generator)
                        .to(torch.uint8).numpy().tobytes()).save(path)  # fmt: skip

    for n in range(14):
        width, height = ((32, 32), (48, 24), (24, 44))[n % 3]
        folder = root / "data" / ("a" if n < 9 else "b")
        picture(folder / f"{n}.png", width, height)
        captions = [f"tag {n}, red, round, small", f"another {n}"]
        with open(folder / "metadata.jsonl", "a") as file:
            file.write(json.dumps({"file_name": f"{n}.png", "text": captions}) + "\n")
    for n in range(3):
        picture(root / "reg" / f"{n}.png", 32, 32)
        (root / "reg" / f"{n}.txt").write_text("a thing")
    return {"train_data_dir": root / "data", "reg_data_dir": root / "reg", "latent_cache_dir": root / "cache"}


@pytest.fixture
def options(folders: dict[str, Path]) -> dict[str, Any]:
    return {
        **folders,
        "prior_loss_weight": 0.5,
        "buckets": True,
        "bucket_step": 4,
        "crop_variants": 2,
        "random_flip": True,
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_prefix": "sks",
        "proportion_empty_prompts": 0.2,
        "repeats": "b=1.5",
        "max_train_steps": STEPS,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "checkpointing_steps": 4,
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def test_a_resumed_run_sees_the_same_samples(train: Any, options: dict[str, Any]) -> None:
    whole = train(**options, output="whole")

    class Killed(BaseException):
        pass

    step = Trainer._optimizer_step

    def dying(self: Trainer) -> Any:
        if self.step == 6:
            raise Killed
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_optimizer_step", dying)
        with pytest.raises(Killed):
            train(**options, output="killed")
    run = train(**options, output="killed")
    assert same(run.unet(), whole.unet())
    assert same(run.checkpoint(STEPS, "optimizer"), whole.checkpoint(STEPS, "optimizer"))


def seen(train: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """What each optimizer step takes: (sample, count, size conditioning, weight), as a sorted list a step."""
    steps: dict[int, list[Any]] = {}
    call = TrainingStep.__call__

    def spy(self: Any, denoiser: Any, batch: Any, device: Any, use_lpl: bool, step: int, *where: Any) -> Any:
        assert len({tuple(size[4:].tolist()) for size in batch.extra["sizes"]}) == 1
        rows = zip(batch.sample_ids, batch.counts, batch.extra["sizes"].tolist(), batch.weights.tolist(), strict=True)
        steps.setdefault(step, []).extend(rows)
        return call(self, denoiser, batch, device, use_lpl, step, *where)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", spy)
        train(**options)
    return [sorted(steps[n]) for n in range(len(steps))]


def test_batches_are_of_one_bucket_however_they_are_split(
    train: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = seen(train, monkeypatch, **options, output="2x2")
    assert [len(step) for step in expected] == [4] * STEPS
    shapes = {tuple(row[2][4:]) for step in expected for row in step}
    assert len(shapes) > 1
    assert {row[3] for step in expected for row in step} == {0.5, 1.0}
    for batch, accumulation in ((4, 1), (1, 4)):
        split = options | {"train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        assert seen(train, monkeypatch, **split, output=f"{batch}x{accumulation}") == expected


def test_weights_scale_both_losses(train: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[float, float, float, float]] = []
    call = TrainingStep.__call__

    def spy(self: Any, denoiser: Any, batch: Any, *args: Any) -> Any:
        from dataclasses import replace

        out = call(self, denoiser, batch, *args)
        with torch.no_grad():
            plain = call(self, denoiser, replace(batch, weights=torch.zeros_like(batch.weights)), *args)
        expected = (out.diffusion_per_sample * batch.weights).mean()
        found.append((float(out.loss.detach() - out.lpl), float(expected), float(plain.loss), float(plain.lpl)))
        return out

    monkeypatch.setattr(TrainingStep, "__call__", spy)
    train(**options, output="weights")
    assert len(found) == 2 * STEPS
    for diffusion, expected, nothing, no_lpl in found:
        assert diffusion == pytest.approx(expected, rel=1e-5)
        assert nothing == no_lpl == 0
