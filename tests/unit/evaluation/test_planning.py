"""What `lpl eval` refuses before anything loads, and which pixels it takes."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_images

from lpl.base.errors import UserError
from lpl.config import ModelConfig
from lpl.config.model_commands import EvalConfig
from lpl.evaluation.images import list_pictures, read_captions
from lpl.evaluation.planning import Plan, check_eval, input_digests
from lpl.families.sampling import CLASSIFIER_FREE, PipelineSampler, vae_stride


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_images(tmp_path_factory.mktemp("planning") / "real", count=12, size=18))


def plan(reference: Path, output: Path, **options: Any) -> Plan:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    given |= {"reference_dir": str(reference), "output_dir": str(output), "metrics": ("spectrum",)}
    return check_eval(EvalConfig(**given))


def test_samples_drawn_into_the_reference_are_refused(model: Path, tmp_path: Path) -> None:
    """They would be taken for real images; by a symbolic link just the same."""
    real = Path(tiny_images(tmp_path / "real", count=12))
    (tmp_path / "link").symlink_to(real, target_is_directory=True)
    drawn: dict[str, Any] = {"pretrained_model_name_or_path": model, "num_samples": 12}
    for output in (real, real / "out", tmp_path / "link" / "a" / "out"):
        with pytest.raises(UserError, match=rf"^--output_dir {output}: its samples and those of --reference_dir"):
            plan(real, output, **drawn)
        assert not (output / "out").exists()
    plan(real, tmp_path, **drawn)  # beside the reference
    inside = Path(tiny_images(tmp_path / "images" / "00000", count=12))
    with pytest.raises(UserError, match=rf"^--output_dir {tmp_path}: its samples"):
        plan(inside, tmp_path, **drawn)


def test_images_and_reference_within_each_other_are_refused(tmp_path: Path) -> None:
    real = Path(tiny_images(tmp_path / "real", count=12))
    inside = Path(tiny_images(real / "samples", count=12))
    for images, against in ((inside, real), (real, inside)):
        with pytest.raises(UserError, match=rf"^--images {images}: its images and those of --reference_dir {against}"):
            plan(against, tmp_path / "out", images=images, floor=False)
    assert len(plan(real, tmp_path / "out", images=real, floor=False).files) == 24


def test_pixels_are_whole_latents_of_the_vae(model: Path, reference: Path, tmp_path: Path) -> None:
    """The tiny model has 4 pixels a latent, the first image 18."""
    there = {"images": reference}
    vae = there | {"pretrained_vae_model_name_or_path": model / "vae"}
    assert plan(reference, tmp_path, **there).resolution == 18
    assert plan(reference, tmp_path, **vae).resolution == 16
    assert plan(reference, tmp_path, **there, pretrained_model_name_or_path=model).resolution == 16
    assert plan(reference, tmp_path, **vae, resolution=20).resolution == 20
    with pytest.raises(UserError, match=r"^--resolution 18: the VAE takes multiples of 4 pixels"):
        plan(reference, tmp_path, **vae, resolution=18)
    assert plan(reference, tmp_path, **there, resolution=18).resolution == 18


def test_metrics_of_another_source_are_not_overwritten(model: Path, reference: Path, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {"pretrained_model_name_or_path": model, "num_samples": 12}
    there: dict[str, Any] = {"images": reference}
    other = tiny_images(tmp_path / "other", count=12)
    file = tmp_path / "out" / "eval.json"
    file.parent.mkdir()
    for old, fine, refused in (
        (None, drawn, [there]),
        (str(reference), there, [drawn, {"images": other}]),
    ):
        file.write_text(json.dumps({"lpl": "0.1", "kind": "eval", "options": {"images": old}}))
        plan(reference, file.parent, **fine)
        for options in refused:
            with pytest.raises(UserError, match=r"^--output_dir .*out: its eval.json is of .* would be overwritten"):
                plan(reference, file.parent, **options)
    file.write_text("{")
    with pytest.raises(UserError, match=r"^--output_dir .*out: eval.json in it is not what lpl eval wrote there"):
        plan(reference, file.parent, **there)


def test_pixels_per_latent(model: Path, tmp_path: Path) -> None:
    (tmp_path / "dc").mkdir()
    (tmp_path / "dc" / "config.json").write_text('{"encoder_block_out_channels": [1, 1, 1, 1, 1, 1]}')
    assert vae_stride(ModelConfig(str(model))) == 4
    assert vae_stride(ModelConfig("x.safetensors", single_file_config=str(model))) == 4
    assert vae_stride(ModelConfig("x.safetensors")) == 8
    assert vae_stride(ModelConfig(str(model), pretrained_vae_model_name_or_path=str(tmp_path / "dc"))) == 32
    assert vae_stride(ModelConfig(pretrained_vae_model_name_or_path="some/vae")) is None


def pipeline_of(kind: str, folder: Path) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return folder


def test_guidance_is_refused_where_its_meaning_is_not_known(model: Path, reference: Path, tmp_path: Path) -> None:
    """By the class alone, before anything loads: 1 may be no guidance, or 0."""
    options: dict[str, Any] = {"resolution": 16, "num_samples": 10, "floor": False}
    for kind in ("OvisImagePipeline", "Flux2Pipeline", "NewPipeline"):
        options["pretrained_model_name_or_path"] = folder = pipeline_of(kind, tmp_path / kind)
        with pytest.raises(UserError, match=rf"^--guidance_scale 1: what that is to a {kind} is not known") as caught:
            plan(reference, tmp_path / "out", **options, guidance_scale=1)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=rf"^--guidance_scale 2: what that is to a {kind} is not known"):
            plan(reference, tmp_path / "out", **options, guidance_scale=(2, 3))
        assert plan(reference, tmp_path / "out", **options).sampling.guidance_scale is None
        several = plan(reference, tmp_path / "out", **options, num_inference_steps=(4, 20)).each()
        assert [one.folder.name for one in several] == ["steps-4", "steps-20"]
    for folder in (model, pipeline_of("KolorsPipeline", tmp_path / "known")):
        options["pretrained_model_name_or_path"] = folder
        assert plan(reference, tmp_path / "out", **options).sampling.guidance_scale == 5
        assert plan(reference, tmp_path / "out", **options, guidance_scale=1).sampling.guidance_scale == 1


def test_a_pipeline_with_a_guidance_of_its_own_is_not_given_one() -> None:
    import torch

    given: list[dict[str, Any]] = []

    class Pipeline:
        def set_progress_bar_config(self, **_: Any) -> None: ...

        def __call__(self, **options: Any) -> Any:
            given.append(options)
            return type("Output", (), {"images": torch.zeros(1, 3, 8, 8)})

    sampler = PipelineSampler(Pipeline())
    for scale in (None, 1.0):
        sampler(["x"], [torch.Generator()], 2, scale, 8)
    assert [options.get("guidance_scale", "its own") for options in given] == ["its own", 1.0]


def test_pipelines_of_which_guidance_is_known_do_what_is_known() -> None:
    """Read in diffusers itself: none up to 1, else none + g (text - none)."""
    import diffusers

    folder = Path(diffusers.__file__).parent / "pipelines"
    texts = [file.read_text() for file in folder.glob("*/pipeline_*.py") if "deprecated" not in str(file)]
    for kind in CLASSIFIER_FREE:
        (text,) = [text for text in texts if f"\nclass {kind}(" in text]
        assert re.search(r"guidance_scale > 1(\.0)?\b", text), kind
        assert re.search(r"\+ (self\.)?guidance_scale \* \(", text), kind


SEPARATED = "one\u2028two\x85three"


def test_captions_are_read_whole(tmp_path: Path) -> None:
    """A byte order mark, a list of captions, separators of Unicode within a caption, Windows' line ends."""
    folder = Path(tiny_images(tmp_path / "images", count=3))
    files = list_pictures(folder, "--images")
    rows = [
        {"file_name": "0.png", "text": SEPARATED},
        {"file_name": "1.png", "text": ["first", "second"]},
        {"file_name": "2.png", "text": "é"},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_captions(folder, files, "--images") == [SEPARATED, "first", "é"]
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": []}')
    assert read_captions(folder, files, "--images") is None
    assert read_captions(folder, files[:1], "--images") == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"file_name": "0.png", "text": "a"}\nno json', "line 2: not JSON"),
        (b'"text"', "line 1: not a JSON object"),
        (b'{"file_name": "0.png", "text": 3}', 'line 1: "text" is neither a text nor a list of texts'),
        (b'{}\n{"text": "\xe9"}', "line 2: not UTF-8 text \\(byte 13 of the file\\)"),
    ],
)
def test_captions_that_cannot_be_read_name_file_and_line(content: bytes, message: str, tmp_path: Path) -> None:
    folder = Path(tiny_images(tmp_path / "images", count=1))
    (folder / "metadata.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=f"^--reference_dir .*metadata.jsonl.*{message}"):
        read_captions(folder, [folder / "0.png"], "--reference_dir")


def test_linked_folders_are_listed_as_training_lists_them(tmp_path: Path) -> None:
    real = Path(tiny_images(tmp_path / "real", count=3))
    (real / "more").symlink_to(tiny_images(tmp_path / "elsewhere", count=2), target_is_directory=True)
    (real / "round").symlink_to(real, target_is_directory=True)
    names = [file.relative_to(real).as_posix() for file in list_pictures(real, "--reference_dir")]
    assert names == ["0.png", "1.png", "2.png", "more/0.png", "more/1.png"]


def test_samples_that_the_reference_links_to_are_refused(model: Path, tmp_path: Path) -> None:
    real = Path(tiny_images(tmp_path / "real", count=12))
    (real / "link").symlink_to(tiny_images(tmp_path / "out" / "images" / "00000", count=12), target_is_directory=True)
    with pytest.raises(UserError, match=rf"^--output_dir {tmp_path / 'out'}: its samples and those of --reference_dir"):
        plan(real, tmp_path / "out", pretrained_model_name_or_path=model, num_samples=12)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """In eval.json it could not be written, after all had been measured."""
    real = Path(tiny_images(tmp_path / "real", count=12))
    (real / "0.png").rename(real / os.fsdecode(b"caf\xe9.png"))
    for folders in ({"reference": real}, {"reference": tiny_images(tmp_path / "good", count=12), "images": real}):
        with pytest.raises(UserError, match=r"the file name b'caf\\xe9.png' is not UTF-8: rename it$"):
            plan(output=tmp_path / "out", **{"images": tmp_path / "good", "floor": False} | folders)


@pytest.mark.parametrize(("count", "fine"), [(0, True), (1, False), (99, False), (100, True)])
def test_intervals_need_resamples(count: int, fine: bool) -> None:
    make = lambda: EvalConfig("model", reference_dir="real", num_bootstrap=count)  # noqa: E731
    if fine:
        assert make().num_bootstrap == count
        return
    with pytest.raises(
        UserError, match=rf"^--num_bootstrap {count}: .* need 100 resamples or more; 0 leaves intervals"
    ):
        make()


def test_digests_are_what_eval_json_will_hold(model: Path, tmp_path: Path) -> None:
    """They change with an image's bytes and with a caption, and not with the folder's name."""
    real = Path(tiny_images(tmp_path / "real", count=12))
    options = EvalConfig(str(model), reference_dir=str(real), num_samples=12, output_dir=str(tmp_path / "out"))
    first = input_digests(options)
    assert first["prompts_digest"] == check_eval(options).prompts_digest
    assert input_digests(replace(options, reference_dir=str(real.rename(tmp_path / "moved")))) == first
    options = replace(options, reference_dir=str(tmp_path / "moved"))
    metadata = tmp_path / "moved" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"text": "', '"text": "some '))
    captioned = input_digests(options)
    assert captioned["reference_digest"] == first["reference_digest"]
    assert captioned["prompts_digest"] != first["prompts_digest"]
    (tmp_path / "moved" / "3.png").write_bytes((tmp_path / "moved" / "4.png").read_bytes())
    assert input_digests(options)["reference_digest"] != first["reference_digest"]
    assert input_digests(options)["prompts_digest"] == captioned["prompts_digest"]
