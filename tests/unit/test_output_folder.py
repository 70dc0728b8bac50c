"""A command replaces only what the same command wrote: names, results, links, inputs, and one command at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lpl.base.errors import UserError
from lpl.base.files import LOCK, alone_at, alone_in
from lpl.base.output_folder import RECORD, Names, OutputFolder, check_apart
from lpl.data.lock import in_use, maintenance

NAMES = Names(
    {"config.yaml": lambda path: path.read_text() == "ours", "checkpoint-#/": None, "logs/": None, "rows.jsonl": None},
    ("unet/", "model_index.json"),
)


def output(folder: Path) -> OutputFolder:
    return OutputFolder(folder, "lpl train")


def staged(folder: Path, text: str) -> dict[str, Path]:
    temporary = folder / ".tmp-result"
    (temporary / "unet").mkdir(parents=True)
    (temporary / "unet" / "weights.safetensors").write_text(text)
    (temporary / "model_index.json").write_text(text)
    return {path.name: path for path in temporary.iterdir()}


def seen(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("config.yaml", "config.yaml in it is not what lpl train wrote there"),
        ("checkpoint-4/mine.txt", "checkpoint-4 in it is not what"),
        ("checkpoint-4", "checkpoint-4 in it is a file, where lpl train writes a folder"),
        ("logs/a/b.txt", "logs in it is not what"),
        ("rows.jsonl/x", "rows.jsonl in it is a folder, where lpl train writes a file"),
        ("unet/mine.txt", "unet/mine.txt in it is not what"),
        ("unet", "unet in it is a file, where"),
        ("model_index.json", "model_index.json in it is not what"),
    ],
)
def test_what_nobody_wrote_is_refused_and_left(tmp_path: Path, name: str, told: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("precious")
    before = seen(tmp_path)
    with pytest.raises(UserError, match=f"^--output_dir {tmp_path}: {told}"):
        output(tmp_path).check(NAMES)
    assert seen(tmp_path) == before
    OutputFolder(tmp_path, "lpl eval").claim(NAMES)  # what another command claims is not this one's
    with pytest.raises(UserError, match=told):
        output(tmp_path).check(NAMES)


@pytest.mark.parametrize("name", ["checkpoint-4", "logs", "rows.jsonl", "unet", "unet/weights.safetensors"])
def test_a_part_that_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    output(folder).claim(NAMES)
    output(folder).put(staged(folder, "a"))
    for part in (folder / "unet" / "weights.safetensors",):
        part.unlink()
    if "/" not in name and (folder / name).exists():
        (folder / name).rmdir()
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{name} in it is "):
        output(folder).check(NAMES)
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    with pytest.raises(UserError, match=f"{name} in it is "):
        output(linked).check(NAMES)  # the folder itself may be one


def test_what_is_free_empty_proved_or_claimed_may_be_written(tmp_path: Path) -> None:
    output(tmp_path / "none").check(NAMES)
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text("ours")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    output(tmp_path).check(NAMES)
    output(tmp_path).claim(NAMES)
    for file in ("logs/x", "checkpoint-7/x", "rows.jsonl", "unet/.DS_Store"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("x")
    output(tmp_path).check(NAMES)


def test_a_result_takes_the_place_of_its_own_alone(tmp_path: Path) -> None:
    own = output(tmp_path)
    for text in ("a", "b"):
        own.put(staged(tmp_path, text), ("finished.json", text.encode()))
        own.check(NAMES)
        assert (tmp_path / "unet" / "weights.safetensors").read_text() == text
        assert own.missing() is None
        assert sorted(os.listdir(tmp_path)) == [RECORD, "finished.json", "model_index.json", "unet"]
    for name, told in {"unet/mine.txt": "is not what lpl train wrote", "model_index.json": "has been changed"}.items():
        kept = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text("mine")
        before = seen(tmp_path)
        for act in (lambda: own.check(NAMES), lambda: own.put(staged(tmp_path, "c"), ("finished.json", b"c"))):
            with pytest.raises(UserError, match=f"{name} in it {told}"):
                act()
        assert {k: v for k, v in seen(tmp_path).items() if ".tmp-result" not in k} == before
        for path in (tmp_path / ".tmp-result").rglob("*.*"):
            path.unlink()
        (tmp_path / ".tmp-result" / "unet").rmdir()
        (tmp_path / ".tmp-result").rmdir()
        (tmp_path / name).unlink() if kept is None else (tmp_path / name).write_bytes(kept)
    (tmp_path / "unet" / "weights.safetensors").unlink()
    assert own.missing() == "unet/weights.safetensors"


def test_a_kill_between_two_parts_leaves_what_the_next_may_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, replace = output(tmp_path), Path.replace
    own.put(staged(tmp_path, "a"), ("finished.json", b"a"))
    with monkeypatch.context() as patch:

        def dies_at_second(path: Path, target: Path) -> Path:
            if target == tmp_path / "unet":
                raise KeyboardInterrupt
            return replace(path, target)

        patch.setattr(Path, "replace", dies_at_second)
        with pytest.raises(KeyboardInterrupt):
            own.put(dict(sorted(staged(tmp_path, "b").items())), ("finished.json", b"b"))
    assert (tmp_path / "model_index.json").read_text() == "b"
    assert not (tmp_path / "finished.json").exists()  # nothing says that this mixture is a result
    own.check(NAMES)
    (tmp_path / ".tmp-result").rename(tmp_path / "left")
    own.put(staged(tmp_path, "c"), ("finished.json", b"c"))
    own.check(NAMES)


def test_the_same_content_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("a")
    output(tmp_path).put(staged(tmp_path, "a"))
    output(tmp_path).check(NAMES)


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"lpl train": 1}', '{"lpl train": {"names": 3}}', "\udcff"])
def test_a_record_of_something_else_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=rf"^.*{RECORD}: .*: move it away, or name another folder$"):
        output(tmp_path).check(NAMES)


def test_an_input_is_never_where_an_output_goes(tmp_path: Path) -> None:
    model = tmp_path / "proj" / "unet"
    (model / "vae").mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "proj" / "file.safetensors").touch()
    for given in (model, tmp_path / "link", tmp_path / "proj" / "x" / ".." / "unet"):
        (tmp_path / "proj" / "x").mkdir(exist_ok=True)
        for folder, told in ((model, "is the same folder"), (tmp_path / "proj", "unet in it is written to")):
            with pytest.raises(UserError, match=rf"^--output_dir {folder}: {told}.*--model {given} would be"):
                check_apart(folder, NAMES.results, {"model": str(given)})
            with pytest.raises(UserError, match="would be overwritten"):
                check_apart(folder, NAMES.results, {"vae": str(given / "vae") if folder != model else str(given)})
    check_apart(tmp_path, NAMES.results, {"model": str(model), "hub": "org/name", "none": None})
    check_apart(tmp_path / "proj", NAMES.results, {"file": str(tmp_path / "proj" / "file.safetensors")})


def elsewhere(code: str) -> subprocess.Popen[str]:
    """Another process that has done something and waits."""
    code = f"from pathlib import Path\n{code}\n    print('ready', flush=True)\n    import time; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def test_one_command_at_a_time_and_none_after_a_kill(tmp_path: Path) -> None:
    out, cache, file = tmp_path / "out", tmp_path / "cache", tmp_path / "x.safetensors"
    child = elsewhere(
        "from lpl.base.files import alone_in, alone_at\nfrom lpl.data.lock import in_use\n"
        f"with alone_in(Path({str(out)!r})), in_use(Path({str(cache)!r})), alone_at(Path({str(file)!r}), ''):"
    )
    with pytest.raises(UserError, match=f"^--output_dir {out}: another lpl command is at work in it"), alone_in(out):
        pass
    with pytest.raises(UserError, match=f"^--output {file}: another"), alone_at(file, "--output"):
        pass
    with pytest.raises(UserError, match=f"^--latent_cache_dir {cache}: another lpl command is using it"):
        maintenance(cache).__enter__()
    with in_use(cache):  # runs share it
        pass
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with alone_in(out), alone_at(file, "--output"), maintenance(cache):
        assert (out / LOCK).is_file()
    assert sorted(os.listdir(tmp_path)) == ["cache", "out"]
    assert os.listdir(out) == []
    assert os.listdir(cache / "in-use") == ["lock"]


def test_a_run_waits_for_maintenance(tmp_path: Path) -> None:
    child = elsewhere(f"from lpl.data.lock import maintenance\nwith maintenance(Path({str(tmp_path)!r})):")
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {child.pid}"])
    started = time.monotonic()
    with in_use(tmp_path):
        assert time.monotonic() - started > 0.3
    assert killer.wait() == 0
    child.wait()


def test_a_folder_that_nothing_came_into_is_gone_again(tmp_path: Path) -> None:
    with alone_in(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with alone_in(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "x").touch()
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["x"]
