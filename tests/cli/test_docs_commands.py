"""Every `lpl` command of README and docs is run as it stands, on tiny models, in a folder with what it names."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_images, tiny_sdxl

from lpl.config import TrainConfig, commands
from lpl.config.command_line import parse_options
from lpl.config.model_commands import EvalConfig, ExportConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHER = re.compile(r"^(?:OMP_NUM_THREADS=\d+ |accelerate launch .*?-m )")
ELSEWHERE = {
    "lpl demo --output_dir lpl-demo": "test_demo.py",
    "lpl train --config sdxl --dataset_name my/dataset": "the Hub is not asked: here it parses",
    "lpl train --config flux-lora --pretrained_model_name_or_path flux1-dev.safetensors --single_file_config "
    "black-forest-labs/FLUX.1-dev --train_data_dir my_images --output_dir my_lora": "test_transformer_file.py",
}
"""What is not run here, and what runs it."""
MODEL = (
    "--pretrained_model_name_or_path tiny --pretrained_vae_model_name_or_path tiny/vae --resolution 16 --bucket_step 4"
)
CACHE = "--latent_cache_dir cache"
STEPS = "--max_train_steps 1 --lr_warmup_steps 0 --gradient_accumulation_steps 1"
SMALL = {
    "plan": MODEL,
    "cache": f"{MODEL} {CACHE}",
    "cache verify": CACHE,
    "cache prune": CACHE,
    "data": "--resolution 16 --bucket_step 8",
    "train": f"{MODEL} {CACHE} {STEPS}",
    "check": f"{MODEL} {CACHE} --num_images 16",
    "compare": f"{MODEL} {CACHE} {STEPS} --seeds 0",
    "eval": "--num_samples 50 --resolution 16 --num_inference_steps 1 --num_bootstrap 0 --reference_cache_dir cache",
}
"""What makes a command small; the last of a flag that is given twice counts."""
IF_GIVEN = {
    "--validation_samples": "--validation_samples 2",
    "--validation_steps": "--validation_steps 1",
    "--validation_prompt": "--num_validation_images 1",
    "--save_steps": "--save_steps 1",
    "--guidance_scale": "--guidance_scale 1 2 --num_inference_steps 1 --num_samples 50",
}
PARSERS = {
    "train": TrainConfig,
    "plan": commands.PlanConfig,
    "data": commands.DataReportConfig,
    "check": commands.CheckConfig,
    "compare": commands.CompareConfig,
    "report": commands.ReportConfig,
    "export": ExportConfig,
    "eval": EvalConfig,
    "demo": commands.DemoConfig,
    "cache": TrainConfig,
    "cache verify": commands.VerifyConfig,
    "cache prune": commands.PruneConfig,
}


def commands_of(page: Path) -> list[str]:
    """The `lpl` commands of a page, without launchers, comments and where their output goes."""
    lines = re.sub(r" *\\\n *", " ", page.read_text()).splitlines()
    found = [LAUNCHER.sub("", line.strip()) for line in lines if line.startswith("    ")]
    return [shlex.join(shlex.split(line.partition(" > ")[0], comments=True)) for line in found if line[:4] == "lpl "]


ALL = list(dict.fromkeys(command for page in PAGES for command in commands_of(page)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run: images, prompts and arms under the names that the pages give them."""
    here = tmp_path_factory.mktemp("docs")
    tiny_sdxl(here / "tiny")
    tiny_images(here / "my_images", count=16)
    tiny_images(here / "real_images", count=52, size=16, seed=3)
    shutil.copytree(here / "tiny", here / "demo-model")
    (here / "prompts.txt").write_text("a red square\na blue circle\n")
    (arms,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.S)
    (here / "arms.yaml").write_text(arms)
    return here


def split(command: str) -> tuple[str, list[str]]:
    """The command's name, of one word or two, and its arguments."""
    words = shlex.split(command)[1:]
    named = 2 if words[0] == "cache" and not words[1].startswith("-") else 1
    return " ".join(words[:named]), words[named:]


def test_every_command_parses() -> None:
    assert len(ALL) >= 38
    assert set(ELSEWHERE) <= set(ALL)
    parsed = 0
    for command in ALL:
        name, argv = split(command)
        if name in PARSERS:
            parse_options(PARSERS[name], argv, f"lpl {name}")
            parsed += 1
    assert parsed >= 34


def test_every_launch_parses() -> None:
    """What stands before `-m lpl` is what accelerate takes; test_processes.py launches."""
    from accelerate.commands.launch import launch_command_parser

    pages = (re.sub(r" *\\\n *", " ", page.read_text()) for page in PAGES)
    launched = [line for page in pages for line in re.findall(r"^    accelerate launch (.*)$", page, re.M)]
    assert len(launched) >= 4
    for line in launched:
        given = launch_command_parser().parse_args(shlex.split(line, comments=True))
        assert given.module
        assert given.training_script == "lpl"


@pytest.mark.slow  # what each command does, other tests show; that it parses, the one above
@pytest.mark.parametrize("command", [command for command in ALL if command not in ELSEWHERE])
def test_it_runs(command: str, folder: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    name, argv = split(command)
    smaller = [SMALL.get(name, ""), *(more for flag, more in IF_GIVEN.items() if flag in argv)]
    argv = [*name.split(), *argv, *shlex.split(" ".join(smaller))]
    if name in ("train", "compare"):  # another command of the pages may have used the folder
        shutil.rmtree(argv[argv.index("--output_dir") + 1] if "--output_dir" in argv else "lpl-output", True)
    code, _, err = run_cli(argv)
    assert code == 0, err
