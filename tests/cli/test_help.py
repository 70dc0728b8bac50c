"""What the terminal offers: --help, completion, presets, the environment."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lpl.cli import COMMANDS
from lpl.config import TrainConfig, declared
from lpl.config.environment import FEATURES, missing

ROOT = Path(__file__).parents[2]


@pytest.fixture
def helped(run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*argv: str) -> str:
        monkeypatch.setenv("COLUMNS", "80")
        code, out, err = run_cli([*argv])
        assert (code, err) == (0, "")
        return str(out)

    return call


def options_in(text: str) -> list[str]:
    return re.findall(r"^  --(\w+)", text, re.M)


def test_train_shows_the_twenty_that_matter(helped: Any) -> None:
    text = helped("train", "--help")
    named = [name.removeprefix("no_") for name in options_in(text)]
    assert named == [name for name, facts in declared().items() if facts.main]
    assert len(named) == 20
    lines = text.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80


def test_all_shows_every_option_by_topic(helped: Any) -> None:
    text = helped("train", "--help", "all")
    assert [name.removeprefix("no_") for name in options_in(text)] == list(TrainConfig().flat())
    assert "\nLatent Perceptual Loss:\n" in text
    assert "  --lora_targets attention|attention_mlp|all\n" in text
    assert "  --lpl_weight X|auto" in text


@pytest.mark.parametrize(
    ("command", "own"), [("cache", []), ("data", ["num_shown"]), ("plan", ["memory", "num_processes", "sharding"])]
)
def test_other_commands_show_their_own_options(helped: Any, command: str, own: list[str]) -> None:
    text = helped(command, "--help")
    assert options_in(text) == own
    assert "Takes every option of `lpl train`" in text
    assert len(options_in(helped(command, "--help", "all"))) == len(own) + len(declared())


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(helped: Any, command: str) -> None:
    assert helped(command, "--help").startswith(f"usage: lpl {command}")
    assert helped(command, "-h") == helped(command, "--help")


def test_values_without_a_flag_are_shown(helped: Any) -> None:
    assert helped("report", "--help").startswith("usage: lpl report RUNS ... [options]\n")


def test_a_shell_completes_commands_options_choices_and_presets(run_cli: Any, tmp_path: Path) -> None:
    code, script, _ = run_cli(["completion", "bash"])
    assert code == 0
    (tmp_path / "completion.bash").write_text(script)
    asked = ("lpl tr", "lpl train --lpl_w", "lpl data --mixed_precision f", "lpl plan --config sd3")
    calls = (f"COMP_WORDS=({line}); COMP_CWORD={line.count(' ')}; _tyro_lpl; echo ${{COMPREPLY[@]}}" for line in asked)
    command = "\n".join([f"source {tmp_path}/completion.bash", *calls])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, env=os.environ)
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["train"],
        ["--lpl_weight", "--lpl_warmup_steps"],
        ["fp16"],
        ["sd35-lora"],
    ]


def test_completion_of_another_shell(run_cli: Any) -> None:
    assert run_cli(["completion", "cmd"])[::2] == (2, "error: lpl completion cmd: expected one of bash, zsh, fish\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["completion"], "lpl completion: expected one of bash, zsh, fish"),
        (["train", "--help", "rank"], "--help rank: alone, or with all for every option"),
        (["report", "run", "--port", "1"], "--port 1 acts with --serve: give that too"),
    ],
)
def test_what_would_have_no_effect_is_refused(run_cli: Any, argv: list[str], said: str) -> None:
    assert run_cli(argv)[::2] == (2, f"error: {said}\n")


def test_env_says_what_a_bug_report_needs(run_cli: Any) -> None:
    code, out, _ = run_cli(["env"])
    found = dict(line.split(": ", 1) for line in out.splitlines())
    assert code == 0
    assert found.keys() >= {"python", "torch", "os", "processor", "threads", "gpu", "driver", "cuda", "git"}


def test_missing_packages_are_told_with_their_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lpl.config.environment._version", lambda name: None if name in ("prodigyopt", "wandb") else "1"
    )
    assert list(missing()) == [
        "--optimizer prodigy needs prodigyopt: pip install 'latent-perceptual-loss[optim]'",
        "--report_to wandb needs wandb: pip install 'latent-perceptual-loss[wandb]'",
    ]


def test_extras_of_features_install_their_packages() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for feature in FEATURES:
        if feature.extra is not None:
            named = [re.split(r"[<>=; ]", line)[0] for line in extras[feature.extra]]
            assert set(feature.packages) <= set(named), feature.name
