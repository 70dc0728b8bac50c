"""Verifying and pruning a cache."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lpl.base.errors import UserError
from lpl.data import shard
from lpl.data.dataset import TrainingData
from lpl.data.upkeep import prune_cache, unused, verify_cache

Encode = Callable[..., TrainingData]


def age(folder: Path, days: float) -> None:
    then = time.time() - days * 86400
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def test_damage_is_said_removed_and_made_again(
    encode: Encode, encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, cache = encode(), tmp_path / "c"
    verify_cache(str(cache), delete=False)
    assert capsys.readouterr().out == f"{cache}: 5 files, 0 damaged\n"
    (name,) = data.caches.latents.shards
    shard = cache / "latents" / f"{'a' * 32}-3" / name
    content = bytearray(shard.read_bytes())
    content[-100] ^= 255
    shard.write_bytes(content)
    with pytest.raises(UserError, match="1 of 5 files are damaged: remove them with --delete"):
        verify_cache(str(cache), delete=False)
    assert str(shard) in capsys.readouterr().out
    verify_cache(str(cache), delete=True)
    assert "5 files, 1 damaged and removed" in capsys.readouterr().out
    encoder.images = 0
    encode().batch([(0, 0)])
    assert (encoder.images, len(encoder.captions)) == (5, 5)
    verify_cache(str(cache), delete=False)


def test_what_a_run_uses_stays(encode: Encode, encoder: Any, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    encode()
    encode(resolution=24)
    age(cache, 40)
    encode()  # marks what it uses
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    prune_cache(str(cache), 30, dry_run=True)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
    prune_cache(str(cache), 30, dry_run=False)
    encoder.images = 0
    encode()
    assert encoder.images == 0
    encode(resolution=24)
    assert encoder.images == 5


def test_leftovers_of_killed_runs_go(encode: Encode, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    encode()
    left = cache / "staged" / ("c" * 32) / "piece" / "latents"
    left.mkdir(parents=True)
    (left / ".half.tmp").write_bytes(b"1234")
    assert unused(cache, 1) == ([], 0)
    age(cache / "staged", 2)
    paths, size = unused(cache, 1)
    assert "c" * 32 in [path.name for path in paths]
    assert size == 4
    prune_cache(str(cache), 0, dry_run=False)
    assert [path for path in cache.rglob("*") if path.is_file() and path.name != "lock"] == []


def test_an_index_that_lies_is_found_and_removed(encode: Encode, tmp_path: Path, encoder: Any) -> None:
    cache = tmp_path / "c"
    encode()
    (path,) = cache.glob("latents/*/index.npz")
    with np.load(path) as file:
        index = dict(file)
    np.savez(path, **index | {"places": index["places"][::-1]})
    with pytest.raises(UserError, match=r"index\.npz is damaged \(row .* is not the entry it says"):
        encode().batch([(0, 0), (1, 0)])
    with pytest.raises(UserError, match="1 of 5 files are damaged"):
        verify_cache(str(cache), delete=False)
    verify_cache(str(cache), delete=True)
    encode().batch([(0, 0), (1, 0)])
    assert encoder.images == 5


@pytest.mark.parametrize("kind", ["latents", "catalogues"])
def test_what_cannot_be_read_is_not_damaged_and_stays(
    encode: Encode, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's file, or a server that does not answer: nothing that removing it would mend."""
    encode()
    file = next((tmp_path / "c" / kind).rglob("*.arrow" if kind == "catalogues" else "*.safetensors"))

    def refused(path: Any, *_: Any) -> Any:
        if str(path) == str(file):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *_)

    opened: Any = pa.memory_map if kind == "catalogues" else open
    if kind == "catalogues":
        monkeypatch.setattr(pa, "memory_map", refused)
    else:
        monkeypatch.setattr(shard, "open", refused, raising=False)
    for delete in (False, True):
        with pytest.raises(UserError, match="1 of 5 files could not be read: correct their permissions"):
            verify_cache(str(tmp_path / "c"), delete)
    assert f"{file}: cannot be read (Permission denied): correct its permissions" in capsys.readouterr().out
    assert file.is_file()
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): correct its permissions"):
        encode().batch([(0, 0)])


@pytest.mark.parametrize("kind", ["latents", "catalogues"])
def test_a_link_to_nothing_goes_like_a_damaged_file(encode: Encode, tmp_path: Path, kind: str) -> None:
    encode()
    cache = tmp_path / "c"
    file = next((cache / kind).rglob("*.arrow" if kind == "catalogues" else "*.safetensors"))
    file.unlink()
    file.symlink_to("nowhere")
    prune_cache(str(cache), 1, dry_run=True)
    with pytest.raises(UserError, match="1 of 5 files are damaged"):
        verify_cache(str(cache), delete=False)
    verify_cache(str(cache), delete=True)
    encode().batch([(0, 0)])


def test_caches_of_another_version_are_not_read_but_said(
    encode: Encode, encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode()
    cache = tmp_path / "c"
    (cache / "latents" / f"{'a' * 32}-3").rename(cache / "latents" / f"{'a' * 32}-2-float16")
    verify_cache(str(cache), delete=False)
    assert "1 folders are of another version" in capsys.readouterr().out
    encoder.images = 0
    encode()
    assert encoder.images == 5


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for command in (lambda folder: verify_cache(folder, False), lambda folder: prune_cache(folder, 1, False)):
        with pytest.raises(UserError, match=r"--latent_cache_dir .* no such folder"):
            command(str(tmp_path / "none"))
