"""Files of one size and one time of change, as archives leave them, that change places."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lpl.data.sources.remote import Versions


def swap(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def test_images_and_captions_that_change_places(
    encode: Callable[..., Any], folder: Path, picture: Callable[..., Any], tmp_path: Path
) -> None:
    for path in folder.rglob("*.*"):
        path.unlink()
    for n in range(4):
        picture(n, 40, 32).save(folder / f"{n}.bmp")
        (folder / f"{n}.txt").write_text(f"caption {n}")
        for file in (folder / f"{n}.bmp", folder / f"{n}.txt"):
            os.utime(file, (1e9, 1e9))
    encode()
    swap(folder / "0.bmp", folder / "1.bmp")
    swap(folder / "2.txt", folder / "3.txt")
    after, right = encode(), encode(latent_cache_dir=str(tmp_path / "another"))
    draws = [(n, 0) for n in range(4)]
    assert torch.equal(after.batch(draws).raw_latents, right.batch(draws).raw_latents)
    assert [after.samples[n].captions for n in range(4)] == [[f"caption {n}"] for n in (0, 1, 3, 2)]


def test_files_that_rows_name(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for file, content in ((a, b"1" * 9000), (b, b"2" * 9000)):
        file.write_bytes(content)
        os.utime(file, (1e9, 1e9))
    noted = Versions()(str(a))
    swap(a, b)
    assert Versions()(str(a)) != noted


def test_files_that_metadata_names_elsewhere(
    encode: Callable[..., Any], folder: Path, picture: Callable[..., Any], tmp_path: Path
) -> None:
    """They are in no list of the folder: each is told apart by itself."""
    for path in folder.rglob("*.*"):
        path.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for n in range(2):
        picture(n, 40, 32).save(elsewhere / f"{n}.bmp")
        os.utime(elsewhere / f"{n}.bmp", (1e9, 1e9))
    rows = [json.dumps({"file_name": str(elsewhere / f"{n}.bmp"), "text": str(n)}) for n in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    encode()
    swap(elsewhere / "0.bmp", elsewhere / "1.bmp")
    after, right = encode(), encode(latent_cache_dir=str(tmp_path / "another"))
    draws = [(n, 0) for n in range(2)]
    assert torch.equal(after.batch(draws).raw_latents, right.batch(draws).raw_latents)
