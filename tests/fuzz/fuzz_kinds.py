"""Every kind of file that is handed over: a small one that is right, and what reads it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_mutations import BYTES, JSON, TENSORS, TEXT, YAML, Mutation

ORIGINALS = Path(__file__).parent / "originals"
Act = Callable[[], Any]
Call = Callable[[list[str]], tuple[int, str, str]]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the kind.
        ways: how its files are changed.
        prepare: makes a small file that is right; returns it, and what reads it: raises a UserError, or calls the
            command line and returns its code, output and errors.
        count: how many changes `make test` tries.
    """

    name: str
    ways: tuple[Mutation, ...]
    prepare: Callable[[Base], tuple[Path, Act]]
    count: int = 12


@dataclass(frozen=True)
class Base:
    """What the files stand on; not to be changed.

    Attributes:
        folder: an empty one, of this kind's own.
        model, data: a tiny model and pictures with captions.
        run: a run on them of two steps, with checkpoints and validation.
        cache: of that run.
        call: runs `lpl ARGV`.
    """

    folder: Path
    model: Path
    data: Path
    run: Path
    cache: Path
    call: Call

    def copy(self, of: str) -> Path:
        """A copy of one of them in the folder."""
        return Path(shutil.copytree(getattr(self, of), self.folder / of, dirs_exist_ok=True))


def result(kind: str) -> Callable[[Base], tuple[Path, Act]]:
    """eval.json, check.json or compare.json, by `lpl report`."""

    def prepare(base: Base) -> tuple[Path, Act]:
        file = Path(shutil.copy(ORIGINALS / f"{kind}.json", base.folder))
        page = base.folder.parent / f"{base.folder.name}.html"
        return file, lambda: base.call(["report", str(base.folder), f"--output={page}"])

    return prepare


def of_run(name: str) -> Callable[[Base], tuple[Path, Act]]:
    """A file of a run's folder, by `lpl report` and by what a further `lpl train` asks of it."""

    def prepare(base: Base) -> tuple[Path, Act]:
        from lpl.config.run_folder import read_rows
        from lpl.training.output import finished_at

        run = base.copy("run")
        page = base.folder / "page.html"

        def act() -> Any:
            finished_at(run)
            found = base.call(["report", str(run), f"--output={page}"])
            if found[0] == 0 and name == "validation.jsonl":
                read_rows(run / name)
            return found

        (file,) = run.glob(name)
        return file, act

    return prepare


def differences(base: Base) -> tuple[Path, Act]:
    """A run's config.yaml, by the run that would continue it, and as --config."""
    from lpl.base.errors import UserError
    from lpl.config.command_line import parse_train
    from lpl.config.files import differences
    from lpl.config.run_folder import CONFIG_FILE

    run = base.copy("run")

    def act() -> None:
        try:
            config = parse_train(["--config", str(run / CONFIG_FILE)])
        finally:
            differences(parse_train([]), run)
        assert config.flat()
        if config.run.train_batch_size > 2**16:
            raise UserError("not bounded\n")

    return run / CONFIG_FILE, act


def config(base: Base) -> tuple[Path, Act]:
    """--config, up to the plan of a dry run."""
    file = base.folder / "config.yaml"
    lines = [
        "resolution: 16",
        "max_train_steps: 2",
        "lpl_weight: 1.0",
        "buckets: false",
        "repeats: balanced",
        "seed: 3",
    ]
    lines += ["optimizer_args: 'amsgrad=True'", "lr_scheduler: piecewise_constant", "lr_step_rules: '1:10,0.1'"]
    lines += [
        "validation_prompt: fox",
        "caption_prefix: a",
        "train_batch_size: 2",
        f"output_dir: {base.folder / 'out'}",
    ]
    file.write_text("\n".join([*lines, f"train_data_dir: {base.data}", f"pretrained_model_name_or_path: {base.model}"]))
    return file, lambda: base.call(["train", "--dry_run", "--config", str(file)])


def arms(base: Base) -> tuple[Path, Act]:
    """--arms of lpl compare."""
    from lpl.comparison.arms import read_arms
    from lpl.config.command_line import parse_compare

    file = base.folder / "arms.yaml"
    file.write_text(
        "base: {}\nlpl: {lpl_weight: 2.0, lr_scheduler: cosine}\nother:\n  train_batch_size: 4\n  rank: null\n"
    )
    options = parse_compare([f"--arms={file}", "--validation_samples=2", "--seeds", "0", "1"])
    return file, lambda: read_arms(options)


def metadata(base: Base) -> tuple[Path, Act]:
    """metadata.jsonl, by `lpl data`."""
    data = base.copy("data")
    return data / "metadata.jsonl", lambda: _report_data(base, data)


def captions(base: Base) -> tuple[Path, Act]:
    """A caption file beside an image, by `lpl data`."""
    data = base.copy("data")
    (data / "metadata.jsonl").unlink()
    for image in data.glob("*.png"):
        image.with_suffix(".txt").write_text("a fox, in the snow\n")
    return data / "0.txt", lambda: _report_data(base, data)


def _report_data(base: Base, data: Path) -> Any:
    argv = ["data", "--resolution=16", f"--train_data_dir={data}", f"--output_dir={base.folder / 'out'}"]
    return base.call([*argv, "--shuffle_caption", "--num_shown=3"])


def tar_json(base: Base) -> tuple[Path, Act]:
    """A shard's member with captions."""
    from lpl.config import DataConfig
    from lpl.data.sources import open_source

    file = base.folder / "caption.json"
    file.write_text('{"text": ["a fox", "snow"], "width": 3}')

    def act() -> None:
        with tarfile.open(base.folder / "0.tar", "w") as shard:
            for name, content in (("0.png", (base.data / "0.png").read_bytes()), ("0.json", file.read_bytes())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
        _read(open_source(DataConfig(webdataset=str(base.folder / "0.tar")), None))

    return file, act


def shard(base: Base) -> tuple[Path, Act]:
    """A WebDataset shard."""
    from lpl.config import DataConfig
    from lpl.data.sources import open_source

    file = base.folder / "0.tar"
    with tarfile.open(file, "w") as archive:
        for image in base.data.glob("*.png"):
            archive.add(image, image.name)
            text = tarfile.TarInfo(f"{image.stem}.txt")
            text.size = 5
            archive.addfile(text, io.BytesIO(b"a fox"))
    return file, lambda: _read(open_source(DataConfig(webdataset=str(file)), None))


def _read(source: Any) -> None:
    for piece in source.pieces:
        for sample in piece.samples():
            sample.read()


def prompts(ending: str) -> Callable[[Base], tuple[Path, Act]]:
    """Prompts of evaluations and of validation."""

    def prepare(base: Base) -> tuple[Path, Act]:
        from lpl.base.text import read_prompts

        file = base.folder / f"prompts{ending}"
        rows = [{"prompt": "a fox", "seed": 3}, {"text": ["snow", "ice"]}]
        lines = ["a fox", "snow"] if ending == ".txt" else map(json.dumps, rows)
        file.write_text("\n".join(lines))
        return file, lambda: [prompt.text.encode() for prompt in read_prompts(file)]

    return prepare


def of_model(name: str) -> Callable[[Base], tuple[Path, Act]]:
    """A file of a model, by the checks and by loading it; a config also by a plan, which builds networks of it."""

    def prepare(base: Base) -> tuple[Path, Act]:
        import torch

        from lpl.config import ModelConfig
        from lpl.families import blueprint, load_family, model_configs
        from lpl.training.rehearsal import Rehearsal

        model = base.copy("model")
        options = ModelConfig(str(model))

        def act() -> None:
            configs = model_configs(options)
            if name.endswith("config.json") and "tokenizer" not in name:
                Rehearsal(blueprint(configs, options))
            family = load_family(options, torch.device("cpu"), torch.float32)
            family.encode_text(["a fox", ""])
            family.encode_images(torch.zeros(1, 3, 16, 16))

        (file,) = model.glob(name)
        return file, act

    return prepare


def single_file(base: Base) -> tuple[Path, Act]:
    """A model in one file: its header."""
    import torch
    from safetensors.torch import save_file

    from lpl.config import ModelConfig
    from lpl.families import model_configs, plan_configs

    file = base.folder / "model.safetensors"
    names = ("conditioner.embedders.1.model.ln_final.weight", "conditioner.embedders.0.transformer.weight")
    names += ("first_stage_model.weight", "v_pred")
    tensors = {name: torch.zeros(4) for name in names}
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(4, 4, 1, 1)
    save_file(tensors, file, {"format": "pt", "modelspec.prediction_type": "v"})
    config = ModelConfig(str(file), single_file_config=str(base.model))

    def act() -> None:
        model_configs(config)
        plan_configs(config)

    return file, act


def transformer(base: Base) -> tuple[Path, Act]:
    """A transformer in one file, beside a folder with the other parts: its header, and by loading it."""
    import torch
    from tiny_models import tiny_zimage

    from lpl.base.tensor_file import write_tensors
    from lpl.config import ModelConfig
    from lpl.families import load_family, load_for_export, model_configs

    folder, file = tiny_zimage(base.folder / "model"), base.folder / "model.safetensors"
    write_tensors(*load_for_export(ModelConfig(str(folder)), None, None, 1.0).single_file("x")[:1], file, {})
    config = ModelConfig(str(file), single_file_config=str(folder))

    def act() -> None:
        model_configs(config)
        load_family(config, torch.device("cpu"), torch.float32)

    return file, act


def lora(base: Base) -> tuple[Path, Act]:
    """A LoRA file, by its export for other programs."""
    import torch
    from safetensors.torch import save_file

    from lpl.config import ModelConfig
    from lpl.families import check_export, kohya_lora

    file = base.folder / "lora.safetensors"
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(2, 16), f"{layer}.lora_B.weight": torch.zeros(16, 2)}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 4, "unet.r": 2})})
    config = ModelConfig(str(base.model))

    def act() -> None:
        check_export(config, False, file)
        kohya_lora(file, config, "x")

    return file, act


def of_cache(pattern: str) -> Callable[[Base], tuple[Path, Act]]:
    """A file of the cache, by a run that reads it, or by what looks after it."""

    def prepare(base: Base) -> tuple[Path, Act]:
        cache = base.copy("cache")
        argv = ["cache", f"--pretrained_model_name_or_path={base.model}", f"--train_data_dir={base.data}"]
        argv += ["--resolution=16", f"--output_dir={base.folder / 'out'}"]
        file = next(iter(sorted(cache.glob(pattern))))

        def act() -> Any:
            fresh = base.folder / "fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(cache, fresh)
            found = base.call([*argv, f"--latent_cache_dir={fresh}"])
            return found if found[0] else base.call(["cache", "verify", f"--latent_cache_dir={fresh}"])

        return file, act

    return prepare


def manifest(base: Base) -> tuple[Path, Act]:
    """What a checkpoint's files must be."""
    from lpl.config.run_folder import find_checkpoint, list_checkpoints

    run = base.copy("run")

    def act() -> None:
        list_checkpoints(run)
        find_checkpoint(run, None)

    return max(run.glob("checkpoint-*")) / "manifest.json", act


def of_checkpoint(name: str) -> Callable[[Base], tuple[Path, Act]]:
    """A file of a checkpoint whose manifest agrees with it, by the run that goes on from it."""

    def prepare(base: Base) -> tuple[Path, Act]:
        from lpl.config.run_folder import write_manifest

        run = base.copy("run")
        shutil.rmtree(max(run.glob("checkpoint-*")))
        (run / "finished.json").unlink()
        (checkpoint,) = run.glob("checkpoint-*")

        def act() -> Any:
            again = base.folder / "again"
            shutil.rmtree(again, ignore_errors=True)
            shutil.copytree(run, again)
            (again / checkpoint.name / "manifest.json").unlink()
            write_manifest(again / checkpoint.name)
            argv = [f"--config={base.run / 'config.yaml'}", f"--output_dir={again}", f"--latent_cache_dir={base.cache}"]
            return base.call(["train", *argv])

        return checkpoint / name, act

    return prepare


def drawn(base: Base) -> tuple[Path, Act]:
    """samples.json, by the evaluation that would go on from it."""
    from lpl.config.run_folder import SETTINGS
    from lpl.evaluation.generate import Sampling, check_settings, settings_of, write_settings

    settings = settings_of(Sampling(16), scheduler="model", prompts="x", weights="y")
    write_settings(base.folder, settings)
    return base.folder / SETTINGS, lambda: check_settings(base.folder, settings)


def statistics(base: Base) -> tuple[Path, Act]:
    """Statistics of a reference."""
    import torch

    from lpl.evaluation.images import ImageSet
    from lpl.evaluation.reference import _cached

    make = lambda: ImageSet(torch.zeros(4, 3), torch.zeros(4, 5))  # noqa: E731
    _cached(base.folder, "key", make)
    (file,) = base.folder.iterdir()

    def act() -> None:
        found = _cached(base.folder, "key", make)
        assert found.features.shape[0] == len(found.power)

    return file, act


def sheet(base: Base) -> tuple[Path, Act]:
    """The note in a sheet of pictures, by the report's reader."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from lpl.data.bad_files import BadImageError
    from lpl.data.sheets import KEY, Cell, read_cells

    note = base.folder / "note.json"
    note.write_text(json.dumps([Cell("raw", "a fox", 3, (0, 0, 4, 4))._asdict()]))

    def act() -> None:
        info = PngInfo()
        info.add_itxt(KEY, note.read_bytes().decode("utf-8", "replace"))
        Image.new("RGB", (8, 8)).save(base.folder / "a.png", pnginfo=info)
        with contextlib.suppress(BadImageError):
            hash(tuple(read_cells(base.folder / "a.png")))

    return note, act


KINDS = [
    Kind("metadata.jsonl", JSON, metadata, 16),
    Kind("a caption's .txt", TEXT, captions, 8),
    Kind("prompts.txt", TEXT, prompts(".txt"), 24),
    Kind("prompts.jsonl", JSON, prompts(".jsonl"), 48),
    Kind("--config", YAML, config, 16),
    Kind("config.yaml of a run", YAML, differences, 24),
    Kind("--arms", YAML, arms, 18),
    Kind("a shard's .json", JSON, tar_json, 36),
    Kind("a shard", BYTES, shard, 16),
    Kind("model_index.json", JSON, of_model("model_index.json"), 12),
    Kind("unet/config.json", JSON, of_model("unet/config.json"), 16),
    Kind("vae/config.json", JSON, of_model("vae/config.json"), 12),
    Kind("scheduler_config.json", JSON, of_model("scheduler/scheduler_config.json"), 12),
    Kind("text_encoder/config.json", JSON, of_model("text_encoder/config.json"), 8),
    Kind("tokenizer_config.json", JSON, of_model("tokenizer/tokenizer_config.json"), 8),
    Kind("tokenizer.json", JSON, of_model("tokenizer/tokenizer.json"), 8),
    Kind("weights", TENSORS, of_model("unet/*.safetensors"), 8),
    Kind("text encoder's weights", TENSORS, of_model("text_encoder_2/*.safetensors"), 6),
    Kind("single file", TENSORS, single_file, 48),
    Kind("a transformer's file", TENSORS, transformer, 16),
    Kind("LoRA", TENSORS, lora, 48),
    Kind("cache shard", TENSORS, of_cache("latents/*/*.safetensors"), 3),
    Kind("cache index", BYTES, of_cache("latents/*/index.npz"), 2),
    Kind("cache mark", JSON, of_cache("catalogues/*/complete-*.json"), 4),
    Kind("catalogue", BYTES, of_cache("catalogues/*/*.arrow"), 2),
    Kind("manifest.json", JSON, manifest, 48),
    Kind("state.json", JSON, of_checkpoint("state.json"), 4),
    Kind("optimizer.safetensors", TENSORS, of_checkpoint("optimizer.safetensors"), 2),
    Kind("finished.json", JSON, of_run("finished.json"), 8),
    Kind("validation.jsonl", JSON, of_run("validation.jsonl"), 8),
    Kind("config.yaml in a report", YAML, of_run("config.yaml"), 8),
    Kind("logs", BYTES, of_run("logs/lpl/events*"), 3),
    Kind("eval.json", JSON, result("eval"), 20),
    Kind("check.json", JSON, result("check"), 20),
    Kind("compare.json", JSON, result("compare"), 20),
    Kind("samples.json", JSON, drawn, 36),
    Kind("statistics of a reference", TENSORS, statistics, 24),
    Kind("note of a sheet", JSON, sheet, 36),
]
