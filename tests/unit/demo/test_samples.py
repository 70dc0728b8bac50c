"""What samples are measured against, and the picture: its notes say where each part is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpl.demo import samples
from lpl.demo.photographs import to_tensor, training_crops
from lpl.demo.samples import SEED, SIDE, export_views, put_together
from lpl.demo.weights import load_pipeline


def test_cells_are_where_the_pictures_are() -> None:
    pictures = [[Image.new("RGB", (64, 64), (20 * row, 40 * column, 5)) for column in range(3)] for row in range(5)]
    names = [("real", ""), ("a", "guidance 1"), ("b", "guidance 1"), ("a", "guidance 3"), ("b", "guidance 3")]
    rows = [(name, setting, images) for (name, setting), images in zip(names, pictures, strict=True)]
    sheet, cells = put_together(rows, ["x", "y", "z"])
    assert len(cells) == 3 * (2 + 4)
    found = {(c.kind, c.prompt): c for c in cells}
    assert len(found) == len(cells)
    for row, (name, setting) in enumerate(names):
        for column, caption in enumerate("xyz"):
            for told in [setting] if setting else ["guidance 1", "guidance 3"]:
                cell = found[name, f"{caption}, {told}"]
                assert cell.seed == SEED + column
                part = np.asarray(sheet.crop(cell.box)).reshape(-1, 3)
                assert len(part) == SIDE**2
                assert np.unique(part, axis=0).tolist() == [[20 * row, 40 * column, 5]]


def test_views_are_other_crops_after_the_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "NUM_VIEWS", 6)
    drawn = []
    monkeypatch.setattr(samples, "random_crops", lambda *a, real=samples.random_crops: drawn.extend(real(*a)) or drawn)
    folder = export_views(tmp_path / "views")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [crop.caption for crop in drawn]
    assert not {(crop.photograph, crop.box) for crop in drawn} & {(c.photograph, c.box) for c in training_crops()}
    assert len({crop.photograph for crop in drawn}) > 2
    vae = load_pipeline().vae
    for row, crop in zip(rows, drawn, strict=True):
        made = np.asarray(Image.open(folder / row["file_name"])).astype(int)
        expected = vae.decode(vae.encode(to_tensor([crop.image])).latent_dist.mode()).sample[0].permute(1, 2, 0)
        assert np.abs(made - ((expected.detach().numpy() + 1) * 127.5).clip(0, 255)).max() < 1
        assert np.abs(made - np.asarray(crop.image).astype(int)).mean() > 0.5
