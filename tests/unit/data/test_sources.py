"""What all sources share: the choice among them, captions, the first samples of several shards."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.sources import Sample, open_regularisation, open_source
from lpl.data.sources.base import captions_of, cut, digest, one_line


def test_nothing_given() -> None:
    with pytest.raises(UserError) as caught:
        open_source(DataConfig(), None)
    for flag in ("--train_data_dir", "--dataset_name", "--webdataset"):
        assert flag in str(caught.value)


def test_folders_and_shards_are_checked_before_anything_heavy_loads() -> None:
    code = "import sys, lpl.data.sources; sys.exit(bool({'datasets', 'torch', 'fsspec'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_regularisation_images_are_a_folder_of_their_own(folder: Path, tmp_path: Path) -> None:
    assert open_regularisation(DataConfig(train_data_dir=str(folder))) is None
    source = open_regularisation(DataConfig(reg_data_dir=str(folder), max_train_samples=1))
    assert source is not None
    assert source.name == f"--reg_data_dir {folder}"
    assert source.size == 5
    with pytest.raises(UserError, match=r"--reg_data_dir .*nowhere: no such folder: give an image folder$"):
        open_regularisation(DataConfig(reg_data_dir=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("value", "expected"), [("a", ("a",)), ("", ("",)), (["a", "b"], ("a", "b")), (["", "b"], ("", "b"))]
)
def test_captions_are_a_string_or_a_list(value: Any, expected: tuple[str, ...]) -> None:
    assert captions_of(value, "x") == expected


@pytest.mark.parametrize("value", [None, 3, [], ["a", None], [["a"]], {"a": 1}])
def test_anything_else_is_no_caption(value: Any) -> None:
    with pytest.raises(UserError, match=r"^x: a caption must be a string or a list of strings, not .*--caption_column"):
        captions_of(value, "x")


def test_a_caption_file_is_one_line() -> None:
    assert one_line("  a cat, \r\n\n on a mat\n") == "a cat, on a mat"
    assert one_line("\n \n") == ""


def test_digests_tell_strings_apart() -> None:
    assert digest("a", "bc") == digest("a", "bc")
    assert len({digest("a", "bc"), digest("ab", "c"), digest("abc"), digest("1:a", "bc"), digest("abc", "")}) == 5


class Shard:
    size = None

    def __init__(self, key: str, count: int) -> None:
        self.key, self.stamp, self._count = key, key * 2, count
        self.log: list[str] = []

    def samples(self) -> Iterator[Sample]:
        self.log.append("opened")
        try:
            for n in range(self._count):
                yield Sample(f"{self.key}/{n}", ("",), "", "", "", bytes)
        finally:
            self.log.append("closed")


def test_first_samples_leave_later_shards_closed() -> None:
    shards = [Shard("a", 2), Shard("b", 2), Shard("c", 2)]
    (piece,) = cut(shards, 3)
    for _ in range(2):
        assert [sample.id for sample in piece.samples()] == ["a/0", "a/1", "b/0"]
    assert [shard.log for shard in shards] == [["opened", "closed"] * 2, ["opened", "closed"] * 2, []]
    assert len(list(cut(shards, 99)[0].samples())) == 6
    assert cut(shards, None) is shards


def test_first_samples_that_are_given_up_close_their_shard() -> None:
    shard = Shard("a", 2)
    samples = cut([shard], 2)[0].samples()
    next(samples)
    samples.close()  # type: ignore[attr-defined]
    assert shard.log == ["opened", "closed"]


def test_stamp_of_first_samples_covers_count_and_shards() -> None:
    def identity(count: int, *keys: str) -> tuple[str, str]:
        (piece,) = cut([Shard(key, 1) for key in keys], count)
        return piece.key, piece.stamp

    assert identity(3, "a", "b") == identity(3, "a", "b")
    assert len({identity(3, "a", "b"), identity(4, "a", "b"), identity(3, "a", "c"), identity(3, "a")}) == 4
