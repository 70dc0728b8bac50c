"""Validation through the real command line: what is held out, what is measured, and what it leaves undisturbed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import launch
from PIL import Image

import lpl.families.sdxl as sdxl
from lpl.data.dataset import TrainingData
from lpl.training import trainer
from lpl.training.validation import HeldOutLoss
from lpl.training.validation_images import ImageDrawer, image_seed

HELD = {"validation_samples": 2, "validation_steps": 2, "max_train_steps": 4, "use_lpl": True}


@pytest.fixture(autouse=True)
def quick_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdxl.SDXL, "steps", 2)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def drawn_by(monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[str]]:
    """Ids that training draws and ids that validation takes, filled as a run goes on."""
    trained: set[str] = set()
    validated: set[str] = set()
    original = TrainingData.batch

    def spy(self: TrainingData, draws: Any, fixed: bool = False) -> Any:
        batch = original(self, draws, fixed)
        (validated if fixed else trained).update(batch.sample_ids)
        return batch

    monkeypatch.setattr(TrainingData, "batch", spy)
    return trained, validated


def test_what_is_held_out_is_never_trained_on(train: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Over epochs and repeats, with a copy of every image among the regularisation images."""
    reg = Path(shutil.copytree(data, tmp_path / "reg"))
    trained, validated = drawn_by(monkeypatch)
    options = HELD | {"max_train_steps": 30, "validation_steps": 30, "reg_data_dir": reg, "train_batch_size": 2}
    options["use_lpl"] = False
    run = train(**options)
    assert len(validated) == 2
    assert len(trained) == 2 * (6 - 2)
    assert not trained & (validated | {f"reg/{name}" for name in validated})
    assert {row["samples"] for row in rows(run.folder)} == {2}
    ids = set(validated)
    trained.clear(), validated.clear()
    train(**options, output="buckets", buckets=True, bucket_step=4)
    assert validated == ids
    assert not trained & (ids | {f"reg/{name}" for name in ids})


def test_a_folder_of_its_own(train: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """What it shares with the training images is not trained on."""
    folder = tmp_path / "held"
    folder.mkdir()
    names = sorted(path.name for path in data.glob("*.png"))
    shutil.copy(data / names[0], folder / "renamed.png")
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    for name in ("renamed", "red"):
        (folder / f"{name}.txt").write_text("a caption")
    trained, validated = drawn_by(monkeypatch)
    run = train(max_train_steps=8, validation_steps=8, validation_data_dir=folder)
    assert validated == {"validation/renamed.png", "validation/red.png"}
    assert trained == set(names[1:])
    assert [(row["step"], row["samples"]) for row in rows(run.folder)] == [(0, 2), (8, 2)]


def test_both_losses_by_bin_for_raw_and_averaged_weights(train: Any) -> None:
    run = train(**HELD, use_ema=True, ema_decay=0.7)
    found = rows(run.folder)
    assert [(row["step"], row["weights"]) for row in found] == [(s, k) for s in (0, 2, 4) for k in ("raw", "ema")]
    logged = run.logged()
    for row in found:
        prefix = f"validation/{row['weights']}"
        assert row["edges"] == list(range(0, 1001, 100))
        bins = row["diffusion_loss_bins"]
        assert row["diffusion_loss"] == pytest.approx(sum(bins) / 10)
        assert [value is None for value in row["lpl_bins"]] == [False] * 7 + [True] * 3  # the gate is t < 700
        assert row["lpl"] == pytest.approx(sum(row["lpl_bins"][:7]) / 7)
        for k in range(10):
            assert logged[f"{prefix}/diffusion_loss/bin_{k}"][row["step"]] == pytest.approx(bins[k], rel=1e-6)
        assert logged[f"{prefix}/lpl"][row["step"]] == pytest.approx(row["lpl"], rel=1e-6)
        assert f"{prefix}/lpl/bin_7" not in logged
    numbers = [{k: v for k, v in row.items() if k != "weights"} for row in found]
    assert numbers[0] == numbers[1]
    assert len({row["diffusion_loss"] for row in found}) == 5
    assert len({row["lpl"] for row in found}) == 5


def test_a_step_that_changes_nothing_measures_the_same(train: Any) -> None:
    """Noise, timesteps, crops, captions and posterior samples are fixed."""
    run = train(
        **HELD, learning_rate=1e-30, proportion_empty_prompts=0.5, random_flip=True, crop_variants=3, lpl_crop=8,
        lpl_random_depth=True, noise_offset=0.1, snr_gamma=5.0,
    )  # fmt: skip
    first, *others = ({k: v for k, v in row.items() if k != "step"} for row in rows(run.folder))
    assert others == [first, first]
    assert first["lpl"] > 0


@pytest.mark.parametrize(("batch", "masked"), [(1, "none"), (3, "none"), (3, "alpha")])
def test_figures_are_what_they_say(
    train: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, masked: str
) -> None:
    """Against the equations, sample by sample and whatever the batch, also where norm `batch` could mix samples."""
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    if masked == "alpha":
        for file in folder.glob("*.png"):
            picture = Image.open(file).convert("RGBA")
            picture.paste((0, 0, 0, 0), (0, 0, picture.width // 2, picture.height))
            picture.save(file)
    kept: list[tuple[Any, Any]] = []
    original = HeldOutLoss.measure

    def spy(self: HeldOutLoss, denoiser: Any, *args: Any) -> Any:
        found = original(self, denoiser, *args)
        kept.append((by_hand(self, denoiser), found))
        return found

    monkeypatch.setattr(HeldOutLoss, "measure", spy)
    train(**HELD | {"max_train_steps": 2}, train_batch_size=batch, lpl_norm_type="batch", loss_type="huber",
          train_data_dir=folder, masked_loss=masked)  # fmt: skip
    assert len(kept) == 2
    for (diffusion, perceptual, masks), found in kept:
        assert masks == (20 if masked == "alpha" else 0)
        assert found["diffusion_loss_bins"] == pytest.approx([np.mean(own) for own in diffusion], rel=1e-4)
        assert found["lpl_bins"][:7] == pytest.approx([np.mean(own) for own in perceptual[:7]], rel=1e-4)


@torch.no_grad()
def by_hand(losses: HeldOutLoss, denoiser: Any) -> tuple[list[list[float]], list[list[float]], int]:
    """Losses by bin, one sample after another, and how many had a mask."""
    from lpl.diffusion.draws import draw_normal, keyed_uniform

    step, data, seed = losses.step, losses.data, losses.seed
    cumulative = step.schedule.alpha.square()
    diffusion: list[list[float]] = [[] for _ in range(10)]
    perceptual: list[list[float]] = [[] for _ in range(10)]
    masks = 0
    for index in data.split.held_out.tolist():
        for k in range(10):
            batch = data.batch([(index, k)], fixed=True)
            masks += batch.mask is not None and bool((batch.mask < 1).any())
            name = batch.sample_ids[0]
            t = 100 * k + int(100 * keyed_uniform(seed, "validation_timestep", name, k))
            latents = step.latent_space.from_raw(batch.raw_latents)
            noise = draw_normal(latents.shape[1:], seed, "validation_noise", name, k)[None]
            alpha, sigma = cumulative[t].sqrt().float(), (1 - cumulative[t]).sqrt().float()
            noisy = alpha * latents + sigma * noise
            output = step.family.denoise(denoiser, noisy, torch.tensor([t]), batch.text, batch.extra)
            mask = torch.ones(1, 1, *latents.shape[2:]) if batch.mask is None else batch.mask
            square = mask * (output - noise).square()
            diffusion[k].append(float(square.sum() / (square.shape[1] * mask.sum())))
            if t < 700:
                clean = (noisy - sigma * output) / alpha
                perceptual[k].append(float(step.objective.loss_fn(clean, latents, batch.mask).per_sample))
    return diffusion, perceptual, masks


@pytest.mark.parametrize(
    "options",
    [{"rank": 2, "lora_dropout": 0.5}, {"optimizer": "schedulefree_adamw"}, {"train_text_encoder": True}],
)
def test_training_goes_on_as_if_there_had_been_none(train: Any, data: Path, tmp_path: Path, options: Any) -> None:
    """Losses and weights bit for bit."""
    folder = tmp_path / "held"
    folder.mkdir()
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    (folder / "red.txt").write_text("red")
    common = options | {"max_train_steps": 4, "checkpointing_steps": 4, "gradient_accumulation_steps": 2}
    quiet = train(**common, output="quiet")
    loud = train(
        **common, validation_steps=1, validation_data_dir=folder, validation_prompt="x", num_validation_images=1
    )
    assert loud.losses() == quiet.losses()
    assert same(loud.checkpoint(4, "model"), quiet.checkpoint(4, "model"))
    assert [row["step"] for row in rows(loud.folder)] == [0, 1, 2, 3, 4]
    assert len(list((loud.folder / "samples").iterdir())) == 5


def test_rows_after_a_stop_are_those_of_a_whole_run(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of measuring at step 2, then killed at step 5 with a checkpoint of step 4 behind it."""
    options = HELD | {
        "max_train_steps": 6, "checkpointing_steps": 2, "use_ema": True, "validation_prompt": "x",
        "validation_samples": 1, "num_validation_images": 1,
    }  # fmt: skip
    whole = train(**options, output="whole")
    original, calls = HeldOutLoss._losses, []

    def stopping(self: HeldOutLoss, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 * 10 + 15:  # of step 2, in the averaged weights
            live[0].stop._deadline = 0.0
        return original(self, *args)

    live: list[trainer.Trainer] = []
    begin = trainer.Trainer.fit
    monkeypatch.setattr(trainer.Trainer, "fit", lambda self: (live.append(self), begin(self))[1])
    with monkeypatch.context() as patch:
        patch.setattr(HeldOutLoss, "_losses", stopping)
        stopped = train(**options, expect_error=True)
    assert (stopped.code, len(calls)) == (4, 35)
    assert [row["step"] for row in rows(stopped.folder)] == [0, 0]
    assert len(list((stopped.folder / "samples").iterdir())) == 1
    step = trainer.Trainer._optimizer_step

    def dying(self: Any) -> Any:
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_optimizer_step", dying)
        train(**options, expect_error=True)
    shutil.rmtree(stopped.folder / "checkpoint-4")
    again = train(**options)
    assert rows(again.folder) == rows(whole.folder)
    tags = [tag for tag in whole.counts() if tag.startswith("validation/")]
    assert {tag: again.counts()[tag] for tag in tags} == dict.fromkeys(tags, 4)
    assert same(again.unet(), whole.unet())


def test_other_held_out_images_are_other_data(train: Any, data: Path) -> None:
    options = {"max_train_steps": 2, "checkpointing_steps": 2, "validation_samples": 2}
    train(**options)
    refused = train(
        **options | {"max_train_steps": 4, "validation_samples": 1}, lr_scheduler="constant", expect_error=True
    )
    assert "--validation_samples 2 -> 1" in refused.errors[0]


def test_prompts_of_a_file_with_their_seeds(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a fox", "seed": 7}\n\n{"prompt": "a cat", "negative_prompt": "a dog"}\n')
    asked: list[tuple[Any, ...]] = []
    original = sdxl.SDXL.sample

    def spy(self: Any, denoiser: Any, *args: Any) -> Any:
        asked.append(args[:3])
        return original(self, denoiser, *args)

    monkeypatch.setattr(sdxl.SDXL, "sample", spy)
    options = {"validation_prompts": file, "use_ema": True, "num_validation_images": 2, "validation_steps": 2}
    run = train(**options, seed=3)
    drawn = [keyed(3, 1, i) for i in range(2)]
    once = [("a fox", "", 7), ("a fox", "", 8), ("a cat", "a dog", drawn[0]), ("a cat", "a dog", drawn[1])]
    assert asked == once * 4  # two kinds at two steps
    assert (run.folder / "samples" / "step-0000000.png").is_file()


def keyed(seed: int, prompt: int, image: int) -> int:
    from lpl.diffusion.draws import keyed_seed

    return keyed_seed(seed, "validation_image", prompt, image)


def test_one_image_is_decoded_at_a_time_without_the_denoiser(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling is over by then, the denoiser has made room, gradients are gone, and the VAE goes back where it was."""
    events: list[str] = []
    draw, sample, decode = ImageDrawer.draw, sdxl.SDXL.sample, sdxl.SDXL.decode

    def drawing(self: ImageDrawer, denoiser: Any, *args: Any) -> Any:
        events.append("draw")
        to = denoiser.to
        denoiser.to = lambda device: (events.append(f"denoiser to {device}"), to(device))[1]
        vae_to = self.family.vae.to
        self.family.vae.to = lambda device: (events.append(f"vae to {device}"), vae_to(device))[1]
        try:
            return draw(self, denoiser, *args)
        finally:
            del denoiser.to, self.family.vae.to

    def sampling(self: Any, denoiser: Any, *args: Any) -> Any:
        events.append("sample")
        assert all(p.grad is None for p in denoiser.parameters())
        latents = sample(self, denoiser, *args)
        assert (latents.device.type, latents.requires_grad) == ("cpu", False)
        return latents

    def decoding(self: Any, latents: Any) -> Any:
        handle = self.vae.decoder.register_forward_hook(
            lambda _m, _i, out: events.append(f"decode {len(out)} {out.requires_grad}")
        )
        try:
            return decode(self, latents)
        finally:
            handle.remove()

    monkeypatch.setattr(ImageDrawer, "draw", drawing)
    monkeypatch.setattr(sdxl.SDXL, "sample", sampling)
    monkeypatch.setattr(sdxl.SDXL, "decode", decoding)
    train(use_lpl=False, validation_prompt="x", num_validation_images=3, validation_steps=2)
    once = [
        "draw",
        *["sample"] * 3,
        "denoiser to cpu",
        "vae to cpu",
        *["decode 1 False"] * 3,
        "vae to cpu",
        "denoiser to cpu",
    ]
    assert events == once * 2


def test_a_bad_prompt_file_is_refused(train: Any, tmp_path: Path) -> None:
    """Which ones: tests/unit/data/test_prompts.py."""
    file = tmp_path / "p.txt"
    file.write_bytes(b"caf\xe9\n")
    failed = train(validation_prompts=file, expect_error=True)
    (line,) = failed.errors
    assert line.startswith(f"error: --validation_prompts {file}, line 1: not UTF-8 text (byte 3 of the file)")
    assert not failed.folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_samples": 6}, "--validation_samples 6: --train_data_dir "),
        ({"validation_samples": -1}, "--validation_samples must be 0 or more, not -1"),
        ({"validation_samples": 1, "validation_data_dir": "x"}, "are both given: choose one"),
        ({"validation_data_dir": "missing"}, "--validation_data_dir missing: no such folder: give an image folder"),
        ({"validation_prompts": "x.txt", "validation_prompt": "x"}, "put the prompt into the file"),
    ],
)
def test_what_cannot_be_held_out_is_refused(train: Any, options: Any, message: str) -> None:
    failed = train(**options, expect_error=True)
    assert len(failed.errors) == 1
    assert message in failed.errors[0]
    assert not failed.folder.exists()


def test_a_folder_that_holds_every_training_image_is_refused(train: Any, data: Path) -> None:
    failed = train(validation_data_dir=data, expect_error=True)
    assert f"--validation_data_dir {data}: leaves none of the 6 training images" in failed.errors[0]


def test_a_gate_that_nothing_passes_is_said(train: Any) -> None:
    run = train(**HELD | {"validation_samples": 1}, lpl_t_threshold=1, lpl_weight=0.1)
    assert "validation says nothing of LPL: none of its 10 timesteps passes the gate t < 1" in run.stderr
    assert all("lpl" not in row and math.isfinite(row["diffusion_loss"]) for row in rows(run.folder))


def test_seeds_are_the_runs_or_the_prompts() -> None:
    from lpl.base.text import Prompt

    assert image_seed(Prompt("a", seed=5), 0, 3, 2) == 7
    drawn = {image_seed(Prompt("a"), run, prompt, image) for run in (0, 1) for prompt in (0, 1) for image in (0, 1)}
    assert len(drawn) == 8


@pytest.mark.parametrize(
    ("fsdp", "rank"),
    [pytest.param(False, None, marks=pytest.mark.slow), (True, None), pytest.param(True, 2, marks=pytest.mark.slow)],
)
def test_two_processes_measure_and_draw_the_same(
    train: Any, as_flags: Any, base_options: Any, read_run: Any, tmp_path: Path, fsdp: bool, rank: int | None
) -> None:
    """Three batches and three images on two processes: bit for bit at step 0, where weights are equal."""
    options = HELD | {
        "validation_samples": 1, "train_batch_size": 4, "max_train_steps": 3, "validation_steps": 1, "use_ema": True,
        "ema_decay": 0.7, "adam_epsilon": 1e-2, "validation_prompt": "x", "num_validation_images": 3, "rank": rank,
    }  # fmt: skip
    alone = train(**options, gradient_accumulation_steps=2)
    folder = tmp_path / "two"
    launch(["train", *as_flags({"output_dir": folder, **base_options, **options})], 2, fsdp)
    found, expected = rows(folder), rows(alone.folder)
    assert found[:2] == expected[:2]
    for row, own in zip(found, expected, strict=True):
        assert (row["step"], row["weights"]) == (own["step"], own["weights"])
        for name in ("diffusion_loss", "lpl"):
            assert row[name] == pytest.approx(own[name], rel=1e-6 if rank else 1e-5)
        averages = [r["diffusion_loss"] for r in expected if r["step"] == row["step"]]
        assert row["step"] < 2 or abs(averages[0] / averages[1] - 1) > 1e-6
    losses, expected_losses = read_run(folder).losses(), alone.losses()
    for name in ("diffusion_loss", "lpl/loss"):
        assert list(losses[name].values()) == pytest.approx(list(expected_losses[name].values()), rel=5e-5)
    pictures = [(path / "samples" / "step-0000000.png").read_bytes() for path in (folder, alone.folder)]
    assert pictures[0] == pictures[1]


def test_a_finished_run_of_epochs_is_known_as_such(train: Any) -> None:
    """Six images less two, two a step: a step more would be planned for all six."""
    options = {"validation_samples": 2, "max_train_steps": None, "num_train_epochs": 1, "train_batch_size": 2}
    assert "steps        2 steps of 2 samples, which draw each of 4 images once" in train("--dry_run", **options).stdout
    train(**options)
    assert "nothing to do" in train(**options).stdout
