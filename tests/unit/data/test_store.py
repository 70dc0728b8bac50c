"""The store of tensors: what goes in comes out, whatever was interrupted."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lpl.data import files as files_module
from lpl.data import store as store_module
from lpl.data.shard import damage
from lpl.data.store import INDEX, TensorStore
from lpl.errors import UserError


def key(name: str) -> bytes:
    return name.encode().ljust(20, b"-")


def fields(*values: float) -> dict[str, Tensor]:
    column = torch.tensor(values)
    return {"mean": column[:, None, None].expand(-1, 4, 3).contiguous(), "std": column[:, None].expand(-1, 2).half()}


def write(folder: Path, *values: float) -> TensorStore:
    store = TensorStore(folder)
    store.write([key(str(value)) for value in values], fields(*values))
    return store


def test_entries_come_back_as_they_were(tmp_path: Path) -> None:
    store = write(tmp_path / "new", 1.5, 2.5)
    store.write([key("x")], {"only": torch.arange(6, dtype=torch.bfloat16).reshape(1, 2, 3).transpose(1, 2)})
    for reader in (store, TensorStore(tmp_path / "new")):
        assert len(reader) == 3
        assert key("1.5") in reader
        assert key("3.5") not in reader
        found = reader.gather([key("2.5"), key("1.5"), key("2.5")])
        assert found["mean"].shape == (3, 4, 3)
        assert found["mean"][:, 0, 0].tolist() == [2.5, 1.5, 2.5]
        assert found["std"].dtype == torch.float16
        assert found["std"][:, 1].tolist() == [2.5, 1.5, 2.5]
        assert torch.equal(reader.gather([key("x")])["only"][0], torch.arange(6).reshape(2, 3).t().bfloat16())
    with pytest.raises(KeyError):
        store.gather([key("3.5")])
    with pytest.raises(ValueError, match="several shapes"):
        store.gather([key("1.5"), key("x")])


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    write(tmp_path, 1.5, 2.5)
    (shard,) = tmp_path.iterdir()
    found = load_file(shard)
    assert sorted(found) == ["checksums", "keys", "mean", "std"]
    assert found["mean"][1, 0, 0] == 2.5
    assert bytes(found["keys"][0].tolist()) == key("1.5")


def test_tensors_are_copies(tmp_path: Path) -> None:
    store = write(tmp_path, 1)
    store.gather([key("1")])["mean"].fill_(7)
    assert store.gather([key("1")])["mean"].unique().tolist() == [1]


def test_refresh_sees_what_others_wrote(tmp_path: Path) -> None:
    mine = TensorStore(tmp_path)
    write(tmp_path, 1)
    assert key("1") not in mine
    mine.refresh()
    assert mine.gather([key("1")])["mean"][0, 0, 0] == 1


def test_keys_with_equal_beginnings_are_told_apart(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    keys = [b"samestart" + bytes([n]) * 11 for n in range(5)]
    store.write(keys, fields(0, 1, 2, 3, 4))
    assert [float(store.gather([k])["mean"][0, 0, 0]) for k in keys] == [0, 1, 2, 3, 4]
    assert b"samestart" + bytes([9]) * 11 not in store


def test_the_index_spares_opening_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 2)
    write(tmp_path, 3).save_index()
    opened = []
    original = store_module.Shard
    monkeypatch.setattr(store_module, "Shard", lambda path: opened.append(path.name) or original(path))
    reader = TensorStore(tmp_path)
    assert (len(reader), opened) == (3, [])
    assert [float(reader.gather([key(n)])["mean"][0, 0, 0]) for n in "123"] == [1, 2, 3]
    write(tmp_path, 4)
    opened.clear()
    assert len(TensorStore(tmp_path)) == 4
    assert len(opened) == 1


def test_an_index_of_shards_that_are_gone_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, 1)
    store = write(tmp_path, 2)
    store.save_index()
    (tmp_path / store.shard_of(key("1"))).unlink()
    reader = TensorStore(tmp_path)
    assert key("1") not in reader
    assert reader.gather([key("2")])["mean"][0, 0, 0] == 2


@pytest.mark.parametrize("damage", ["cut short", "other", "bits"])
def test_a_damaged_index_is_not_used(tmp_path: Path, damage: str) -> None:
    store = write(tmp_path, *range(20))
    store.save_index()
    whole = (tmp_path / INDEX).read_bytes()
    if damage == "cut short":
        broken = [whole[:size] for size in range(0, len(whole), 41)]
    elif damage == "other":
        broken = [b"PK damaged", b"", b"PK\x03\x04" + bytes(100)]
    else:
        broken = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(0, len(whole), 13)]
    for data in broken:
        (tmp_path / INDEX).write_bytes(data)
        reader = TensorStore(tmp_path)
        assert len(reader) == 20
        assert reader.gather([key("7")])["mean"][0, 0, 0] == 7


def test_memory_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in range(6):
        write(tmp_path, value)
    monkeypatch.setattr(store_module, "MAPPED_BYTES", 100)  # an entry is 52 bytes
    reader = TensorStore(tmp_path)
    for _ in range(2):
        for value in range(6):
            assert reader.gather([key(str(value))])["mean"][0, 0, 0] == value
            assert len(reader._open) <= 2


def test_killed_write_leaves_the_store_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 2)
    (tmp_path / ".left-over.tmp").write_bytes(b"half a shard")
    assert len(TensorStore(tmp_path)) == 1
    write(tmp_path, 2)
    assert len(TensorStore(tmp_path)) == 2


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_shard_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    write(tmp_path, 1)
    (shard,) = tmp_path.iterdir()
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match="lpl cache verify --delete") as caught:
        TensorStore(tmp_path)
    assert str(shard) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    store = write(tmp_path, 1, 2)
    shard = tmp_path / store.shard_of(key("2"))
    assert damage(shard) is None
    content = bytearray(shard.read_bytes())
    for place in (-3, -60, -150):
        changed = bytearray(content)
        changed[place] ^= 1
        shard.write_bytes(changed)
        assert "do not match" in str(damage(shard)), place
    shard.write_bytes(content[:-1])
    assert "bytes, not" in str(damage(shard))


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--latent_cache_dir"):
        write(tmp_path / "file" / "cache", 1)


def test_shards_are_readable_to_whom_the_umask_allows(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (shard,) = tmp_path.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert shard.stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    for keys, values in (
        ([b"short"], fields(1)),
        ([key("a")], fields(1, 2)),
        ([key("a")], {"keys": torch.zeros(1)}),
        ([key("a")], {}),
    ):
        with pytest.raises(ValueError, match="cannot store"):
            store.write(keys, values)
    store.write([], {})
    assert list(tmp_path.iterdir()) == []


def test_few_shards_are_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 3)
    store = TensorStore(tmp_path)
    for value in range(8):
        store.write([key(str(value))], fields(value))
    handles = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for value in [*range(8), *range(8)]:
        assert store.gather([key(str(value))])["mean"][0, 0, 0] == value
    if handles:
        assert len(os.listdir("/proc/self/fd")) <= handles + 3


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    alike = [b"the same" + bytes([n]) * 12 for n in range(3)]
    store.write(alike, fields(0.0, 1.0, 2.0))
    assert store.gather([alike[2], alike[0], alike[1]])["mean"][:, 0, 0].tolist() == [2.0, 0.0, 1.0]
    with pytest.raises(KeyError):
        store.gather([alike[0], b"the same" + bytes(12)[:11] + b"x"])
    with pytest.raises(KeyError):
        store.gather([b"\xff" * 20])
