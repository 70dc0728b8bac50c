"""`lpl check`: loads the model, measures, and writes check.json with its pictures and a page."""

from __future__ import annotations

import logging
import math
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lpl import __version__
from lpl.analysis.check import cost, levels, precision
from lpl.analysis.check.images import Encoded, read_pictures
from lpl.analysis.check.maps import draw_estimates, draw_maps, layer_maps
from lpl.analysis.check.suggest import suggestion
from lpl.analysis.check.table import faults_of, table, verdict_of, warnings_of
from lpl.base.errors import UserError
from lpl.base.files import ELSEWHERE, alone_in, write_atomically, writing
from lpl.base.json_files import as_json
from lpl.base.output_folder import Names, OutputFolder, kind_of
from lpl.base.terminal import progress
from lpl.config.commands import FEWEST, CheckConfig, ReportConfig
from lpl.config.environment import environment
from lpl.config.run_folder import CHECK_FILE, CHECK_REPORT, ESTIMATES, MAPS, PAGE, RECONSTRUCTION
from lpl.data.crops import to_float
from lpl.data.sheets import png_of, printable
from lpl.diffusion.draws import bin_edges
from lpl.families import load_family, plan_configs
from lpl.training.decoder_dtype import with_decoder_dtype
from lpl.training.engine import build_accelerator, build_objective
from lpl.training.offloaded import offload_to_host
from lpl.training.preflight import Checked, check_data, processes
from lpl.training.quantized import quantize
from lpl.training.step import TrainingStep

logger = logging.getLogger("lpl")

PRECISION_IMAGES = 4
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def run_check(options: CheckConfig) -> None:
    """Measures, writes the report with its page and prints its table.

    Raises:
        UserError: bad input; or, after the report is written, a model that no run should start with.
    """
    if processes() > 1:
        raise UserError("lpl check runs in one process: start it without a launcher")
    folder = Path(options.train.run.output_dir) / CHECK_REPORT
    checked = check_data(options.train, folder, weights=True)
    output = OutputFolder(options.train.run.output_dir, "lpl check", CHECK_REPORT)
    names = Names(dict.fromkeys((CHECK_FILE, f"{MAPS}/", RECONSTRUCTION, ESTIMATES, PAGE)))
    is_old = lambda _: kind_of(folder / CHECK_FILE) == "check"  # noqa: E731
    output.check(names, is_old)
    with alone_in(folder):
        output.check(names, is_old)
        with writing(f"--output_dir {output.given}: {folder}", ELSEWHERE):
            output.claim(names, is_old)
            for old in (folder / CHECK_FILE, *(folder / MAPS).glob("*-t????.png")):
                old.unlink(missing_ok=True)
            for name in (RECONSTRUCTION, ESTIMATES, PAGE):
                (folder / name).unlink(missing_ok=True)
            found = Check(checked, options.num_images, folder).run()
            write_atomically(folder / CHECK_FILE, as_json(_plain(found)))
        from lpl.report.page import write_report

        page = write_report(ReportConfig((str(folder),)), announce=False)
    print(table(found))
    print(f"written      {folder / CHECK_FILE} and its pictures\npage         {page}: open it in a browser")
    if found["faults"]:
        raise UserError(found["faults"][0])


class Check:
    """One check.

    Args:
        checked: the options and the data.
        num_images: how many images to measure on.
        folder: where pictures are written.
    """

    def __init__(self, checked: Checked, num_images: int, folder: Path) -> None:
        self.started, self.folder, self.refused = time.perf_counter(), folder, list[str]()
        self.accelerator = build_accelerator(checked.config)
        self.device = self.accelerator.device
        mixed: Any = self.accelerator.mixed_precision
        self.config = config = checked.config.changed(mixed_precision=mixed)
        self.configs = checked.model_configs or plan_configs(config.model)
        self.source, self.num_images = checked.source, num_images
        self.family = load_family(config.model, self.device, torch.float32)
        self.no_float32 = cost.no_float32(self.family.denoiser, self.device, config)
        if self.no_float32 is not None:
            self.refused.append(f"the denoiser in other precisions than {mixed}: {self.no_float32}")
        if checked.regularisation is not None:
            self.refused.append("--reg_data_dir: measured on the training images alone")
        if config.lpl.lpl_crop is not None:
            self.refused.append(f"--lpl_crop {config.lpl.lpl_crop}: measured on whole images")
        if config.lpl.lpl_random_depth:
            self.refused.append("--lpl_random_depth: measured at full depth")

    def run(self) -> dict[str, Any]:
        """The content of check.json."""
        config, family = self.config, self.family
        pictures, unusable = read_pictures(config, self.source, self.num_images, family.latent_stride)
        self.refused += unusable
        if len(pictures) < FEWEST:
            self.refused.append(f"only {len(pictures)} images: {FEWEST} are the least for reliable figures")
        found: dict[str, Any] = {
            "lpl": __version__,
            "kind": "check",
            "environment": environment(),
            "options": {k: v for k, v in config.flat().items() if k != "hub_token"} | {"num_images": self.num_images},
            "refused": self.refused,
            "device": str(self.device),
            "num_images": len(pictures),
        }
        calls: dict[int, precision.Calls] = {}
        with precision.recording(family.text_encoders, calls, PRECISION_IMAGES):
            encoded = Encoded.of(config, family, pictures)
            first = encoded.mean[0].to(self.device)
            config = self.config = with_decoder_dtype(config, family, lambda: first, self.accelerator)
            found["options"]["lpl_dtype"] = config.lpl.lpl_dtype
            self.objective = build_objective(config, family)
            self.step = TrainingStep(
                family, config.diffusion, self.objective, config.run.seed, HALF.get(str(config.run.mixed_precision))
            )
            components, frozen = self._text_precision(calls), set(calls)
            family.free_encoders()
            denoiser = family.denoiser.eval().requires_grad_(False)
            if self.no_float32 is not None:
                torch.nn.Module.to(denoiser, self.step.autocast)
            if config.model.quantize_base is not None:
                quantize(denoiser, config.model.quantize_base, self.device, partial(progress, desc="quantizing"))
            if self.no_float32 is not None and config.model.offload_blocks is not None:
                offload_to_host(denoiser, config.model.offload_blocks, self.device)
            self.denoiser = denoiser.to(self.device)
            by_dtype = self._denoiser_precision(encoded)
        components = {
            **self._vae_precision(encoded),
            "denoiser": by_dtype,
            **self._text_precision({n: own for n, own in calls.items() if n not in frozen}),
            **components,
        }
        found |= {"components": components, "walk_equals_decode": precision.walk_difference(family.vae, first)}
        found["faults"] = faults_of(found)
        if not any("float32" in fault for fault in found["faults"]):
            found |= self._measure(encoded)
        else:
            self.refused.append("all other measurements: a component is not finite even in float32")
        found["warnings"] = warnings_of(found, config, self.source.size)
        found["outcome"], found["verdict"] = verdict_of(found, config)
        found["seconds"] = time.perf_counter() - self.started
        return found

    def _text_precision(self, calls: dict[int, precision.Calls]) -> dict[str, Any]:
        return {
            f"text_encoder_{number + 1}" if number else "text_encoder": precision.compare(
                self.family.text_encoders[number], precision.replay(own)
            )
            for number, own in sorted(calls.items())
        }

    def _denoiser_precision(self, encoded: Encoded) -> dict[str, Any]:
        count = min(PRECISION_IMAGES, len(encoded))
        schedule = self.step.schedule

        def run(denoiser: Any, dtype: torch.dtype) -> list[torch.Tensor]:
            autocast = None if dtype == torch.float32 else dtype
            step = TrainingStep(self.family, self.config.diffusion, None, self.config.run.seed, autocast)
            outputs = []
            for n in range(count):
                level = schedule.at([schedule.num_timesteps * (2 * n + 1) // (2 * count)])
                batch = encoded.batch([n], 0)
                outputs.append(levels.estimate(step, denoiser, batch, level, self.device).model_output)
            return outputs

        own, why = self.step.autocast, self.no_float32
        only = None if own is None or why is None else (own, why)
        return precision.compare(self.denoiser, run, cast=False, only=only)

    def _vae_precision(self, encoded: Encoded) -> dict[str, Any]:
        shown = range(min(PRECISION_IMAGES, len(encoded)))
        pixels = [to_float(encoded.pictures[n].pixels)[None] for n in shown]
        latents = [encoded.mean[n] for n in shown]

        def encode(vae: Any, dtype: torch.dtype) -> list[torch.Tensor]:
            return [vae.encode(x.to(self.device, dtype)).latent_dist.mean for x in pixels]

        def decode(vae: Any, dtype: torch.dtype) -> list[torch.Tensor]:
            return [vae.decode(x.to(self.device, dtype)).sample for x in latents]

        vae = self.family.vae
        return {"vae_encoder": precision.compare(vae, encode), "vae_decoder": precision.compare(vae, decode)}

    def _measure(self, encoded: Encoded) -> dict[str, Any]:
        config, family, step = self.config, self.family, self.step
        losses = precision.reconstruct(family.vae, encoded, self.device)
        self._save(RECONSTRUCTION, precision.draw_losses(encoded, losses))
        measured = levels.measure(step, self.denoiser, encoded, self.device)
        shown = _most_detailed(encoded, losses.typical)
        needs = cost.count(config, self.configs, self.device)
        found = {
            "reconstruction": {
                "psnr_mean": sum(losses.psnr) / len(losses.psnr),
                "psnr_min": min(losses.psnr),
                "file": RECONSTRUCTION,
                "images": [{"name": p.name, "psnr": v} for p, v in zip(encoded.pictures, losses.psnr, strict=True)],
            },
            "gate": str(self.objective.gate),
            "p_gate": self.objective.p_gate,
            "layers": levels.layer_rows(measured, self.objective.loss_fn),
            "gradients": levels.gradient_rows(measured),
            "suggestion": suggestion(measured, self.objective.gate, config),
            "estimates": {"name": encoded.pictures[shown].name, "file": ESTIMATES},
            "maps": self._maps(encoded, shown, losses.decoded[shown]),
        }
        seconds, why = cost.measure_step(config, step, self.denoiser, encoded, self.device, needs)
        if why is not None:
            self.refused.append(why)
        lpl_seconds = sorted(measured.lpl_seconds)[len(measured.lpl_seconds) // 2]
        return found | {"step": cost.step_row(needs, config, seconds, lpl_seconds)}

    @torch.no_grad()
    def _maps(self, encoded: Encoded, shown: int, reconstructed: torch.Tensor) -> list[dict[str, Any]]:
        """Draws a typical picture's estimates, and its maps at a timestep inside the gate and, if any, outside."""
        gate, schedule = self.objective.gate.table, self.step.schedule
        picture = encoded.pictures[shown]
        name = printable(picture.id)
        decode, space = self.family.vae.decode, self.step.latent_space
        images = [("original", to_float(picture.pixels)), ("through the VAE", reconstructed)]
        rows = []
        within, without = (part.nonzero().flatten() for part in (gate, ~gate))
        mapped = [int(part[len(part) // 2]) for part in (within, without) if len(part)]
        edges = bin_edges(schedule.num_timesteps)
        centres = [(low + high) // 2 for low, high in pairwise(edges)]
        loss_fn = self.objective.loss_fn.uncropped()
        for t in sorted({*centres, *mapped}):
            seen = levels.estimate(self.step, self.denoiser, encoded.batch([shown], 0), schedule.at([t]), self.device)
            if self.step.prediction_type == "epsilon" and float(seen.alpha) == 0:
                continue
            pred = seen.x0(self.step.prediction_type)
            if t in centres:
                inside = ", gate" if gate[t] else ""
                images.append((f"t = {t}{inside}", decode(space.to_raw(pred)).sample[0].cpu()))
            if t in mapped:
                for maps in layer_maps(loss_fn, pred, seen.latents):
                    file = f"{MAPS}/{maps.tap}-t{t:04d}.png"
                    self._save(file, draw_maps(maps, t, name))
                    rows.append({"tap": maps.tap, "t": t, "in_gate": bool(gate[t]), "name": picture.name, "file": file})
        self._save(ESTIMATES, draw_estimates(images, name))
        return rows

    def _save(self, name: str, picture: Image.Image) -> None:
        write_atomically(self.folder / name, png_of(picture))


def _most_detailed(encoded: Encoded, typical: list[int]) -> int:
    """Among the half of the pictures with the most typical PSNR, the one with most contrast between pixels."""

    def detail(number: int) -> float:
        pixels = encoded.pictures[number].pixels.float()
        return float(pixels.diff(dim=1).abs().mean() + pixels.diff(dim=2).abs().mean())

    return max(typical[: -(-len(typical) // 2)], key=detail)


def _plain(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
