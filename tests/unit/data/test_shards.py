"""Lists of shards: braces, patterns, names, and what is refused."""

from pathlib import Path

import pytest

from lpl.base.errors import UserError
from lpl.data.sources.webdataset import expand_braces, labels, list_shards, without_secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x.tar", ["x.tar"]),
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{0..10}", [str(n) for n in range(11)]),
        ("{08..10}", ["08", "09", "10"]),
        ("a{0..1}b{x,yz}c", ["a0bxc", "a0byzc", "a1bxc", "a1byzc"]),
        ("{a,}.tar", ["a.tar", ".tar"]),
    ],
)
def test_braces(text: str, expected: list[str]) -> None:
    assert expand_braces(text, "f") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{3..1}", "{3..1} runs backwards"),
        ("{a..c}", "{a..c} is no range"),
        ("{}", "{} is no range"),
        ("{0..1", "a brace without its other half"),
        ("{a,{0..1}}", "a brace without its other half, or one inside another"),
        ("{0..9999999}", "{0..9999999} is too long a range"),
        ("{0..9999}{0..9999}", "100000000 shards; at most 1000000"),
    ],
)
def test_braces_that_are_none(text: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        expand_braces(text, "--webdataset x")
    assert str(caught.value).startswith(f"--webdataset x: {expected}")


def touch(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    return [str(folder / name) for name in names]


def test_paths_patterns_and_urls_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "a-1.tar", "a-0.tar", "b.tar", "deep/c.tar", "d[1].tar")
    spec = f"https://host/{{0..1}}.tar?key=x*y::{tmp_path}/b.tar::{tmp_path}/a-*.tar::{tmp_path}/d[1].tar"
    assert list_shards(spec) == [
        "https://host/0.tar?key=x*y",
        "https://host/1.tar?key=x*y",
        *(str(tmp_path / name) for name in ("b.tar", "a-0.tar", "a-1.tar", "d[1].tar")),
    ]
    assert list_shards(f"{tmp_path}/**/c.tar") == [str(tmp_path / "deep/c.tar")]
    assert list_shards(f"{tmp_path}/a-{{0..1}}.tar") == [str(tmp_path / f"a-{n}.tar") for n in (0, 1)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("DIR/{0..2}.tar", "DIR/1.tar: no such file (2 of 3 shards are missing)"),
        ("DIR/x*.tar", "DIR/x*.tar: no file matches"),
        ("DIR", "DIR: a folder: name its shards, such as DIR/*.tar"),
        ("DIR/0.tar::DIR/./0.tar", "DIR/0.tar: this shard is named twice"),
        ("https://u:p@host/0.tar?a=1::https://host/0.tar?a=2", "https://host/0.tar: this shard is named twice"),
        ("pipe:cat DIR/0.tar", "pipe:cat DIR/0.tar: no command is run"),
        ("DIR/0.tar::", "DIR/0.tar::: nothing before or after a ::"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, spec: str, expected: str) -> None:
    touch(tmp_path, "0.tar")
    with pytest.raises(UserError) as caught:
        list_shards(spec.replace("DIR", str(tmp_path)))
    assert str(caught.value).startswith("--webdataset " + expected.replace("DIR", str(tmp_path)))


def test_secrets_are_left_out() -> None:
    assert without_secrets("https://user:word@host:8/a.tar?token=1#x") == "https://host:8/a.tar"
    assert without_secrets("s3://bucket/a.tar") == "s3://bucket/a.tar"
    assert without_secrets("dir?/a#.tar") == "dir?/a#.tar"


def test_labels_are_short_and_differ() -> None:
    assert labels(["/x/a.0.tar", "/y/b.tgz", "https://host/c.tar?key=1"]) == ["a.0", "b.tgz", "c"]
    assert labels(["/x/cats/0.tar", "/x/dogs/0.tar", "/x/dogs/1.tar"]) == ["cats/0", "dogs/0", "dogs/1"]
    assert labels(["/x/0.tar", "/x/y/0.tar"]) == ["0", "y/0"]
    assert labels(["/x/0.tar", "/x/0"]) == ["0.tar", "0"]
