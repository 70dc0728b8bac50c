"""What README promises: commands go together, the snippet works, the example trains, pages name what they should."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_vae

from lpl.cli import main
from lpl.presets import presets

ROOT = Path(__file__).parents[2]
FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The demo's model and data, exported as README says, with 12 of the images."""
    folder = tmp_path_factory.mktemp("readme")
    main(["demo", "--export_model", str(folder / "model")])
    main(["demo", "--export_data", str(folder / "data")])
    metadata = folder / "data" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    assert len(lines) >= 200
    for line in lines[12:]:
        (folder / "data" / json.loads(line)["file_name"]).unlink()
    metadata.write_text("\n".join(lines[:12]) + "\n")
    return folder


@pytest.mark.parametrize("file", ["README.md", "docs/evaluation.md"])
def test_commands_that_judge_parse_and_go_together(file, monkeypatch):
    """Each is accepted as it is written, and the report is on folders that commands above it write."""
    import lpl.analysis.check.run
    import lpl.comparison.run
    import lpl.evaluation.command
    import lpl.report.page

    called = {}
    for module, name in (
        (lpl.analysis.check.run, "run_check"),
        (lpl.evaluation.command, "run_eval"),
        (lpl.comparison.run, "run_compare"),
        (lpl.report.page, "write_report"),
    ):
        monkeypatch.setattr(module, name, lambda options, *_, name=name: called.__setitem__(name, options))
    text = (ROOT / file).read_text().replace("\\\n", " ")
    for command in re.findall(r"^    lpl ((?:check|eval|compare|report) .*)$", text, re.M):
        main(shlex.split(command, comments=True))
    assert list(called) == ["run_check", "run_eval", "run_compare", "write_report"]
    trained, compared = (called[name].train.run.output_dir for name in ("run_check", "run_compare"))
    assert called["run_eval"].pretrained_model_name_or_path == trained
    assert Path(called["run_eval"].output_dir).parent == Path(trained)
    assert called["write_report"].runs == (trained, compared)


def test_commands_by_hand_run(exported, monkeypatch):
    (command,) = [c for c in re.findall(r"^    lpl (train .*)$", README, re.M) if "--max_train_steps 20" in c]
    monkeypatch.chdir(exported)
    main([*shlex.split(command.replace("steps 20", "steps 1")), "--latent_cache_dir", "cache"])
    assert (exported / "lpl-output" / "model_index.json").is_file()


def test_example_trains_and_saves(exported, monkeypatch, capsys):
    monkeypatch.chdir(exported)
    monkeypatch.setattr(sys, "argv", ["minimal_loop.py", "model", "data"])
    source = (ROOT / "examples" / "minimal_loop.py").read_text()
    assert len(source.splitlines()) < 100
    script = exported / "minimal_loop.py"
    script.write_text(
        source.replace("STEPS, BATCH, LEARNING_RATE, SEED = 50, 8", "STEPS, BATCH, LEARNING_RATE, SEED = 2, 2")
    )
    runpy.run_path(str(script), run_name="__main__")
    assert "step 0: diffusion" in capsys.readouterr().out
    assert (exported / "minimal-loop-output" / "model_index.json").is_file()


def test_snippet_runs():
    from diffusers import DDPMScheduler

    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    noise_scheduler, timesteps = DDPMScheduler(), torch.tensor([5, 900])
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_output = (0.9 * noise).requires_grad_()
    names = {
        "vae": tiny_vae(),
        "noise_scheduler": noise_scheduler,
        "model_output": model_output,
        "noisy_latents": noisy_latents,
        "latents": latents,
        "timesteps": timesteps,
        "diffusion_loss": (model_output - noise).square().mean(),
    }
    exec(snippet, names)
    assert model_output.grad is not None
    assert float(names["objective"].weight) > 0


def test_every_preset_and_every_refusal_is_named():
    training, coming = ((ROOT / "docs" / name).read_text() for name in ("training.md", "coming_from_diffusers.md"))
    for name in presets():
        assert f"`{name}`" in training, name
    for name in (flag["name"] for flag in FLAGS if "replaced_by" in flag):
        assert f"`{name}`" in coming, name
