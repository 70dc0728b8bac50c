"""The store of tensors: what goes in comes out, whatever was interrupted."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lpl.base import files as files_module
from lpl.base.errors import DamagedCacheError, UserError
from lpl.data import store as store_module
from lpl.data.shard import SUFFIX, Shard
from lpl.data.store import INDEX, TensorStore, read_index, verify_index


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
    with pytest.raises(DamagedCacheError, match="an entry that was there is not"):
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
        with np.load(tmp_path / INDEX) as file:
            index = dict(file)
        for name, value in (("keys", index["keys"][:, :9]), ("places", index["places"] - 1), ("shards", np.arange(1))):
            np.savez(tmp_path / INDEX, **index | {name: value})
            broken.append((tmp_path / INDEX).read_bytes())
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


def read(folder: Path, name: str) -> dict[str, Tensor] | str:
    """An entry, or why it is refused."""
    try:
        return TensorStore(folder).gather([key(name)])
    except DamagedCacheError as error:
        return str(error)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_no_changed_byte_is_read(tmp_path: Path) -> None:
    """Of the header, the keys, the checksums or the tensors: what is read is what was written, or nothing is."""
    write(tmp_path, 1, 2).save_index()
    (shard,) = tmp_path.glob(f"*{SUFFIX}")
    content = shard.read_bytes()
    wanted = [TensorStore(tmp_path).gather([key(n)]) for n in "12"]
    harmless = 0
    for place in range(len(content)):
        shard.write_bytes(flipped(content, place))
        found = [read(tmp_path, name) for name in "12"]
        refused = [outcome for outcome in found if isinstance(outcome, str)]
        assert all(str(shard) in message and "\n" not in message for message in refused)
        for outcome, expected in zip(found, wanted, strict=True):
            assert isinstance(outcome, str) or all(torch.equal(outcome[name], expected[name]) for name in expected)
        harmless += not refused
        if refused:
            with pytest.raises(DamagedCacheError, match="is damaged"):
                Shard(shard).verify()
    assert harmless <= 8  # blanks around the header


def test_damage_is_named_and_counted(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    (shard,) = tmp_path.iterdir()
    content, two = shard.read_bytes(), torch.full((4, 3), 2).numpy().tobytes()
    shard.write_bytes(content.replace(two, bytes(len(two))))
    with pytest.raises(
        DamagedCacheError, match=r"1 of its 3 entries do not match .*lpl cache verify --delete"
    ) as caught:
        TensorStore(tmp_path).gather([key("1"), key("2")])
    assert str(shard) in str(caught.value)


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Changes the header of a safetensors file, but not its length."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    edit(header)
    packed = json.dumps(header, separators=(",", ":")).encode()
    assert len(packed) <= end - 8
    path.write_bytes(content[:8] + packed.ljust(end - 8) + content[end:])


def other_type(header: dict[str, Any]) -> None:
    header["std"]["dtype"] = "BF16"


def other_shape(header: dict[str, Any]) -> None:
    header["mean"]["shape"] = [2, 3, 4]


def names_swapped(header: dict[str, Any]) -> None:
    header["mean"], header["std"] = header["std"], header["mean"]


def nonsense(header: dict[str, Any]) -> None:
    header["mean"] = [None]


@pytest.mark.parametrize("edit", [other_type, other_shape, names_swapped, nonsense])
def test_a_header_that_says_something_else_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    store = write(tmp_path, 1, 2)
    edited(tmp_path / store.shards[0], edit)
    with pytest.raises(DamagedCacheError, match="is damaged"):
        TensorStore(tmp_path).gather([key("1")])


def test_the_order_of_rows_is_in_the_name(tmp_path: Path) -> None:
    """The same entries in two orders are two files: neither takes the other's place under an index."""
    first = write(tmp_path, 1, 2, 3)
    first.save_index()
    other = TensorStore(tmp_path / "staged")
    other.write([key(n) for n in "321"], fields(3, 2, 1))
    assert not set(other.shards) & set(first.shards)
    os.replace(tmp_path / "staged" / other.shards[0], tmp_path / first.shards[0])
    with pytest.raises(DamagedCacheError, match="not those that its name stands for"):
        TensorStore(tmp_path).gather([key("1")])


def swapped_rows(index: dict[str, np.ndarray]) -> None:
    index["places"] = index["places"][::-1].copy()


def other_shard(index: dict[str, np.ndarray]) -> None:
    index["places"][:, 0] = 1 - index["places"][:, 0]


def row_beyond(index: dict[str, np.ndarray]) -> None:
    index["places"][:, 1] += 7


def left_out(index: dict[str, np.ndarray]) -> None:
    index["keys"], index["places"] = index["keys"][:1], index["places"][:1]


def added(index: dict[str, np.ndarray]) -> None:
    index["keys"] = np.concatenate([index["keys"], index["keys"][:1] + 1])
    index["places"] = np.concatenate([index["places"], index["places"][:1]])


@pytest.mark.parametrize("lie", [swapped_rows, other_shard, row_beyond, left_out, added])
def test_an_index_that_lies_is_not_believed_and_is_found(
    tmp_path: Path, lie: Callable[[dict[str, np.ndarray]], None]
) -> None:
    write(tmp_path, 1, 2)
    write(tmp_path, 3, 4).save_index()
    verify_index(tmp_path)
    with np.load(tmp_path / INDEX) as file:
        index = dict(file)
    lie(index)
    np.savez(tmp_path / INDEX, **index)
    assert read_index(tmp_path) is not None
    for name in "1234":
        found = read(tmp_path, name)
        right = isinstance(found, dict) and found["mean"].unique().tolist() == [float(name)]
        assert right or (isinstance(found, str) and "lpl cache verify --delete" in found)
    with pytest.raises(DamagedCacheError, match="gives entries other places"):
        verify_index(tmp_path)


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
    for absent in ([alike[0], b"the same" + bytes(12)[:11] + b"x"], [b"\xff" * 20]):
        with pytest.raises(DamagedCacheError):
            store.gather(absent)
