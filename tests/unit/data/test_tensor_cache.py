"""The store of tensors: what goes in comes out, whatever was interrupted."""

import os
from pathlib import Path

import pytest
import torch

from lpl.data import cache as cache_module
from lpl.data.cache import TensorCache, default_cache_dir
from lpl.errors import UserError


def entry(value: float) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((4, 3), value), "std": torch.full((2,), value).half()}


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path / "new")
    batch = torch.arange(24.0).reshape(2, 3, 4)
    cache.write({"a": {"x": batch[0]}, "b": {"x": batch[1], "y": batch[1].t(), "n": torch.tensor([5])}})
    cache.write({"c": entry(1.5)})
    for reader in (cache, TensorCache(tmp_path / "new")):
        assert set(reader.keys()) == {"a", "b", "c"}
        assert len(reader) == 3
        assert "a" in reader
        assert "d" not in reader
        assert torch.equal(reader.get("b")["y"], batch[1].t())
        assert reader.get("b")["n"].tolist() == [5]
        assert reader.get("c")["std"].dtype == torch.float16
    with pytest.raises(KeyError):
        cache.get("d")


def test_tensors_are_copies(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    cache.write({"a": entry(1)})
    first = cache.get("a")["mean"]
    first.fill_(7)
    assert first.is_contiguous()
    assert cache.get("a")["mean"].unique().tolist() == [1]
    assert TensorCache(tmp_path).get("a")["mean"].unique().tolist() == [1]


def test_refresh_sees_what_others_wrote(tmp_path: Path) -> None:
    mine, theirs = TensorCache(tmp_path), TensorCache(tmp_path)
    theirs.write({"a": entry(1)})
    assert "a" not in mine
    mine.refresh()
    assert mine.get("a")["mean"][0, 0] == 1


def test_same_entries_make_one_shard(tmp_path: Path) -> None:
    mine, theirs = TensorCache(tmp_path), TensorCache(tmp_path)
    mine.write({"a": entry(1), "b": entry(2)})
    theirs.write({"b": entry(2), "a": entry(1)})
    assert len(list(tmp_path.iterdir())) == 1
    assert mine.get("b")["mean"][0, 0] == 2


def test_killed_write_leaves_the_cache_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TensorCache(tmp_path).write({"a": entry(1)})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            TensorCache(tmp_path).write({"b": entry(2)})
    (tmp_path / ".left-over.tmp").write_bytes(b"half a shard")
    again = TensorCache(tmp_path)
    assert set(again.keys()) == {"a"}
    again.write({"b": entry(2)})
    assert set(TensorCache(tmp_path).keys()) == {"a", "b"}


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_damaged_shard_is_named(tmp_path: Path, keep: int) -> None:
    TensorCache(tmp_path).write({"a": entry(1)})
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match="delete it and run again") as caught:
        TensorCache(tmp_path)
    assert str(shard) in str(caught.value)
    assert "\n" not in str(caught.value)
    shard.unlink()
    assert len(TensorCache(tmp_path)) == 0


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TensorCache(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="--latent_cache_dir"):
        cache.write({"a": entry(1)})


def test_shards_are_readable_to_whom_the_umask_allows(tmp_path: Path) -> None:
    TensorCache(tmp_path).write({"a": entry(1)})
    (shard,) = tmp_path.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert shard.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("bad", [{"a/b": entry(1)}, {"": entry(1)}, {"a": {}}, {"a": {"x/y": torch.zeros(1)}}])
def test_keys_that_cannot_be_stored(tmp_path: Path, bad: dict[str, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError):
        TensorCache(tmp_path).write(bad)
    TensorCache(tmp_path).write({})
    assert list(tmp_path.iterdir()) == []


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/lpl")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == Path.home() / ".cache" / "lpl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "lpl"
