"""References: what is cached by content, the VAE's floor, and the figures of sets of images that are known."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_vae
from torch import Tensor

from lpl.base.errors import UserError
from lpl.evaluation.evaluate import Subsets, evaluate_images, measure_images
from lpl.evaluation.images import ImageSet, as_png, count_smaller, list_pictures
from lpl.evaluation.metrics import kernel_distance_subsets
from lpl.evaluation.reference import Reference, reconstruct

NAMES = [
    "frechet_grid",
    "kernel_grid",
    "precision",
    "recall",
    "density",
    "coverage",
    "spectrum_log_error_low",
    "spectrum_log_error_middle",
    "spectrum_log_error_high",
]


class Grid:
    """Means of a grid of cells; counts the images it has seen."""

    name, frechet_name, kernel_name = "grid", "frechet_grid", "kernel_grid"

    def __init__(self, key: str = "grid") -> None:
        self.key, self.seen = key, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return torch.nn.functional.avg_pool2d(images.float(), images.shape[-1] // 2).flatten(1)


def pictures(count: int, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)


def save(images: Tensor, folder: Path) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        (folder / f"{i:04}.png").write_bytes(as_png(image))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(pictures(120), tmp_path_factory.mktemp("reference") / "real")


@pytest.fixture(scope="module")
def vae() -> Any:
    return tiny_vae(widths=(8, 8, 16))


def test_statistics_are_cached_by_content(real: Path, vae: Any, tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "copy"
    shutil.copytree(real, folder)

    def seen(folder: Path, size: int = 16, key: str = "grid", with_vae: Any = None) -> int:
        extractor = Grid(key)
        Reference.from_folder(folder, size, extractor, with_vae, cache_dir=cache)
        return extractor.seen

    assert seen(real) == 120
    assert seen(real) == seen(folder) == 0
    assert seen(real, with_vae=vae) == 120  # the reconstructions alone
    assert seen(real, with_vae=vae) == 0
    assert seen(real, size=12) == 120
    assert seen(real, key="other") == 120
    assert seen(real, with_vae=tiny_vae(1, widths=(8, 8, 16))) == 120
    (folder / "0003.png").write_bytes(as_png(pictures(1, seed=5)[0]))
    assert seen(folder) == 120
    first, again = (Reference.from_folder(real, 16, Grid(k), vae, cache_dir=cache) for k in ("grid", "new"))
    for a, b in ((first.real, again.real), (first.reconstructed, again.reconstructed)):
        assert a is not None
        assert b is not None
        assert torch.equal(a.features, b.features)
        assert torch.equal(a.power, b.power)


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:-40] + bytes([b[-40] ^ 1]) + b[-39:]])
def test_damaged_cache_is_made_again(
    real: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    extractor = Grid()
    Reference.from_folder(real, 16, extractor, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level("WARNING", logger="lpl"):
        Reference.from_folder(real, 16, extractor, cache_dir=tmp_path)
    assert extractor.seen == 240
    assert str(file) in caplog.text


def test_reconstructions_and_floor(real: Path, vae: Any, tmp_path: Path) -> None:
    reference = Reference.from_folder(real, 16, Grid(), vae, cache_dir=tmp_path)
    images = pictures(120)
    decoded = torch.cat([reconstruct(part, vae) for part in images.split(16)])
    with torch.no_grad():
        expected = vae.decode(vae.encode(images[:2] / 127.5 - 1).latent_dist.mode()).sample
    assert (decoded[:2] - ((expected + 1) * 127.5).clamp(0, 255)).abs().max() < 0.51
    found = evaluate_images(decoded, reference)
    assert list(found) == NAMES
    for metric in found.values():
        assert metric["value"] == pytest.approx(metric["floor"], rel=1e-6, abs=1e-6)
    assert found["frechet_grid"]["value"] > 1
    # Against the reconstructions themselves, the same samples are perfect, and the floor is half against half.
    own = evaluate_images(decoded, reference, against="reconstructions")
    assert own["frechet_grid"]["value"] < 1e-3 < own["frechet_grid"]["floor"]
    assert (own["precision"]["value"], own["spectrum_log_error_high"]["value"]) == (1, 0)
    halves = Reference(reference.reconstructed.part(slice(1, None, 2)), None, 16, Grid())  # type: ignore[union-attr]
    assert own["frechet_grid"]["floor"] == evaluate_images(decoded[::2], halves)["frechet_grid"]["value"]
    for against in ("images", "reconstructions"):
        without = evaluate_images(decoded, reference, against=against, with_floor=False)
        assert {m["floor"] for m in without.values()} == {None}
    bare = Reference.from_folder(real, 16, Grid(), cache_dir=tmp_path)
    assert {m["floor"] for m in evaluate_images(decoded, bare).values()} == {None}
    with pytest.raises(ValueError, match="no VAE"):
        evaluate_images(decoded, bare, against="reconstructions")


def test_images_of_no_whole_latents_are_refused(vae: Any) -> None:
    with pytest.raises(UserError, match=r"^--resolution 18: the VAE gives such images back with 16 pixels"):
        reconstruct(pictures(1, size=18), vae)


def test_figures_order_better_and_worse_samples(real: Path, tmp_path: Path) -> None:
    reference = Reference.from_folder(real, 16, Grid(), cache_dir=tmp_path)
    good, bad = pictures(200, seed=1), (pictures(200, seed=1) // 3 + 150).to(torch.uint8)
    blurred = torch.nn.functional.avg_pool2d(good.float(), 3, 1, 1, count_include_pad=False).to(torch.uint8)
    figures = [evaluate_images(s, reference, resamples=50) for s in (good, bad, blurred)]
    for name in NAMES[:6]:
        better, worse = figures[0][name], figures[1][name]
        low, high = better["interval"]
        assert low <= better["value"] <= high
        assert low < high
        if better["lower_is_better"]:
            assert high < worse["interval"][0]
        else:
            assert low > worse["interval"][1]
    assert figures[2][NAMES[8]]["interval"][0] > figures[0][NAMES[8]]["interval"][1]
    assert [figures[0][name]["lower_is_better"] for name in NAMES] == [True, True, *[False] * 4, True, True, True]


def test_folder_tensor_and_set_give_the_same(real: Path, tmp_path: Path) -> None:
    reference = Reference.from_folder(real, 16, Grid(), cache_dir=tmp_path)
    images = pictures(60, seed=1)
    folder = save(images, tmp_path / "samples")
    measured = measure_images(images, reference)
    assert isinstance(measured, ImageSet)
    whole = evaluate_images(folder, reference, resamples=5)
    assert whole == evaluate_images(images, reference, resamples=5) == evaluate_images(measured, reference, resamples=5)
    assert whole != evaluate_images(images, reference, resamples=5, seed=1)
    with pytest.raises(ValueError, match=r"expected \(N, 3, 16, 16\) uint8"):
        evaluate_images(pictures(60, size=12), reference)


@pytest.mark.parametrize("count", [9, 12, 60, 120])
def test_counts_that_are_too_small_are_refused_or_marked(real: Path, tmp_path: Path, count: int) -> None:
    reference = Reference.from_folder(real, 16, Grid(), cache_dir=tmp_path)
    found = evaluate_images(pictures(count, seed=1), reference, resamples=5)
    refused = {name for name, metric in found.items() if metric["value"] is None}
    few = {"frechet_grid", "precision", "recall", "density", "coverage"}
    assert refused == {9: set(NAMES), 12: few, 60: set(), 120: set()}[count]
    for name in refused:
        assert f"there are {count} and 120" in found[name]["note"]
        assert found[name]["interval"] is None
    if count >= 60:
        assert found["precision"]["note"] == f"rough: only {count} images"
        assert found["frechet_grid"]["note"] is None  # 12 features
        assert (found["spectrum_log_error_low"]["note"] is None) == (count == 120)


def test_kernel_subsets(real: Path, tmp_path: Path) -> None:
    reference = Reference.from_folder(real, 16, Grid(), cache_dir=tmp_path)
    images = pictures(200, seed=1)
    plain, subsets = (
        evaluate_images(images, reference, ["kernel"], subsets=s)["kernel_grid"]["value"]
        for s in (None, Subsets(40, 60))
    )
    samples = measure_images(images, reference)
    expected = kernel_distance_subsets(samples.features, reference.real.features, 40, 60).mean()
    assert subsets == float(expected) != plain
    with pytest.raises(ValueError, match="subsets of 121"):
        evaluate_images(images, reference, ["kernel"], subsets=Subsets(40, 121))


def test_small_images_are_counted(tmp_path: Path) -> None:
    folder = save(pictures(3, size=16), tmp_path / "images")
    (folder / "large.png").write_bytes(as_png(pictures(1, size=40)[0]))
    assert [count_smaller(list_pictures(folder, ""), size) for size in (16, 17, 40, 41)] == [0, 3, 3, 4]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--reference_dir .*absent: no such folder$"):
        Reference.from_folder(tmp_path / "absent", 16, Grid())
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^--reference_dir: .*a.png: not a PNG.*; repair or remove it$"):
        Reference.from_folder(tmp_path, 16, Grid())
