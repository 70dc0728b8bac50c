"""The training loop on accelerate: what happens when. What a step computes is in step.py."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from lpl.base.errors import DamagedCacheError, StopRequestedError, TrainingStoppedError
from lpl.base.terminal import percent
from lpl.config import TrainConfig
from lpl.config.files import write_config
from lpl.config.length import on_the_way
from lpl.config.run_folder import BAD_FILES, last_checkpoint
from lpl.data.prepare import Processes, prepare_data
from lpl.diffusion.draws import keyed_seed
from lpl.families import blueprint, kind_of, load_family, plan_configs
from lpl.families.export import LORA_FILE
from lpl.training import saving
from lpl.training.checkpoint import full_disk
from lpl.training.checks import warn_of_decoder, warn_of_steps
from lpl.training.decoder_dtype import with_decoder_dtype
from lpl.training.engine import Batches, build_accelerator, build_objective
from lpl.training.lora_says import LoraSays
from lpl.training.nonfinite import FiniteGuard, spoil
from lpl.training.optimizers import adapted_rate, component_rates, scaled_learning_rate
from lpl.training.output import COMFYUI, KOHYA, claim_output, lora_name, output_of
from lpl.training.per_parameter import FusedBackward
from lpl.training.preflight import Checked, validation_prompts
from lpl.training.rehearsal import Rehearsal
from lpl.training.run_state import RunState
from lpl.training.saving import ALL_WEIGHTS, next_commands, save_result, save_weights, write_beside
from lpl.training.sharded import autocast_dtype, whole
from lpl.training.step import TrainingStep
from lpl.training.stopping import Stop, stoppable
from lpl.training.tracking import Tracker, shown
from lpl.training.validation import HeldOutLoss, Validation
from lpl.training.validation_images import ImageDrawer
from lpl.training.weights import build_trained

logger = logging.getLogger("lpl")

LORA_READERS = KOHYA, "ComfyUI, A1111, Forge and kohya's programs"
DORA_READERS = COMFYUI, "ComfyUI and Forge"
"""How the name of a LoRA's second file ends, and the programs that it is for."""
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(config: TrainConfig, checked: Checked) -> None:
    """Runs or continues the run that the config describes; the result is in config.run.output_dir.

    Raises:
        UserError: bad input that preflight could not see.
        TrainingStoppedError: a loss or gradient that is not finite, or a full disk; the last checkpoint stays.
        StopRequestedError: by a signal or --max_minutes; nothing is lost.
    """
    with stoppable(config.run.max_minutes) as stop, full_disk(Path(config.run.output_dir)):
        trainer = Trainer(config, checked, stop)
        trainer.fit()
        trainer.finish()


class Trainer:
    """One run. Construction loads, caches and resumes; fit trains; finish exports."""

    def __init__(self, config: TrainConfig, checked: Checked, stop: Stop) -> None:
        self.config, self.folder, self.stop = config, Path(config.run.output_dir), stop
        self.for_whom = ALL_WEIGHTS  # which file of the result is for which programs
        run = config.run
        self.accelerator = accelerator = build_accelerator(config)
        set_seed(run.seed)
        self.repository = saving.create_repository(config) if config.logging.push_to_hub else None
        weight_dtype = WEIGHT_DTYPES[accelerator.mixed_precision]
        self.family = family = load_family(config.model, accelerator.device, weight_dtype)
        self.data = prepare_data(
            checked.source,
            checked.regularisation,
            config.data,
            family,
            run.seed,
            self.folder / BAD_FILES,
            Processes(
                accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone, stop.raise_if_asked
            ),
            accelerator.is_local_main_process,
            checked.validation,
        )
        self.prompts = validation_prompts(config.logging)
        for prompt in self.prompts:
            family.prepare_prompt(prompt.text, prompt.negative)
        family.free_encoders()
        if not config.lpl.use_lpl:
            family.vae.to("cpu")  # only validation images need it from now on
        self.batches = Batches(config, self.data, accelerator)
        batches = self.batches
        config = self.config = with_decoder_dtype(config, family, lambda: batches.batch(0, 0).raw_latents, accelerator)
        self.num_steps = self.batches.length.steps
        if checked.num_steps is None:
            warn_of_steps(config, self.num_steps)
        self.trained = build_trained(config, family, accelerator, weight_dtype, self.num_steps)
        self.objective = build_objective(config, family) if config.lpl.use_lpl else None
        if self.objective is not None and config.lpl.lpl_budget is not None:
            logger.info("counting what a step costs, for --lpl_budget %g", config.lpl.lpl_budget)
            rehearsal = Rehearsal(blueprint(checked.model_configs or plan_configs(config.model), config.model))
            self.objective.step_flops = rehearsal.denoiser(config).flops / run.train_batch_size
            self.objective.count(rehearsal.latents(config, 1)[1:])
        self.step_loss = TrainingStep(family, config.diffusion, self.objective, run.seed, autocast_dtype(accelerator))
        self.guard = FiniteGuard(config, self.step_loss.draw)
        self.tracker = Tracker(
            accelerator,
            self.batches.samples_per_step,
            f"--lpl_weight {config.lpl.lpl_weight} --lpl_norm_type {config.lpl.lpl_norm_type}",
            config.lpl.lpl_start + config.lpl.lpl_warmup_steps if config.lpl.lpl_warmup_steps else 0,
        )
        self.validation = self._build_validation()
        self.lora_says = LoraSays(config, self.data, self.num_steps, self.batches.steps_per_epoch)
        self.state = RunState(
            config,
            accelerator,
            self.trained,
            self.objective,
            self.guard,
            self.tracker,
            self.data.digest(),
            self.num_steps,
        )
        self.step = self.state.resume()
        if accelerator.is_main_process:  # only now: a run that cannot begin must not claim the folder
            claim_output(config)
            write_config(config, self.folder, accelerator.num_processes)
        if (warning := self.batches.length.warning()) is not None:
            logger.warning("%s", warning)
        if self.batches.samples_per_step > len(self.data):
            logger.warning(
                "a step takes %d samples of only %d: images repeat in it", self.batches.samples_per_step, len(self.data)
            )
        self._announce()

    def _build_validation(self) -> Validation:
        config, accelerator = self.config, self.accelerator
        run, data = config.run, config.data
        losses, images = None, None
        if data.holds_out:
            losses = HeldOutLoss(accelerator, self.data, self.step_loss, run.train_batch_size)
        if self.prompts:
            count = config.logging.num_validation_images
            images = ImageDrawer(accelerator, self.family, self.prompts, count, run.seed, data.crop_size)
        return Validation(
            config,
            accelerator,
            self.trained.weights,
            losses,
            images,
            self.stop,
            self.batches.steps_per_epoch,
            self.num_steps,
        )

    def _announce(self) -> None:
        count = sum(p.numel() for p in self.trained.parameters.values())
        rate = scaled_learning_rate(self.config, self.accelerator.num_processes)
        precision = self.accelerator.mixed_precision
        logger.info(
            "training %s parameters at a learning rate of %g, mixed precision %s: %s",
            f"{count:,}", rate, precision, self.batches.length,
        )  # fmt: skip
        logger.info("%s", "; ".join(f"{label} {what}" for label, what in on_the_way(self.config, self.num_steps)))
        if self.objective is not None:
            lpl = self.config.lpl
            share = f"measured so that it gets {percent(lpl.lpl_target_share)} of the gradient"
            logger.info(
                "LPL compares decoder features in %s where %s: on about %s of the samples; its weight is %s",
                lpl.lpl_dtype, self.objective.gate, percent(self.objective.p_gate),
                share if lpl.lpl_weight == "auto" else f"{lpl.lpl_weight:g}",
            )  # fmt: skip
        if self.accelerator.device.type == "cuda":
            warn_of_decoder(self.config, torch.cuda.get_device_capability(self.accelerator.device))

    def fit(self) -> None:
        """Trains to the last step."""
        run, log, accelerator = self.config.run, self.config.logging, self.accelerator
        trackers_config = {k: v for k, v in self.config.flat().items() if isinstance(v, (int, float, str, bool))}
        trackers_config.pop("hub_token", None)
        # What a killed run has logged beyond its last checkpoint is logged again: TensorBoard drops the older entries.
        again = {"tensorboard": {"purge_step": self.step + 1}}
        accelerator.init_trackers("lpl", config=trackers_config, init_kwargs=again)
        self.validation.begin(self.step, self.trained.denoiser)
        self.tracker.start(self.step)
        silent = not accelerator.is_local_main_process
        with tqdm(total=self.num_steps, initial=self.step, desc="training", disable=silent) as bar:
            self._stop_if_asked()
            while self.step < self.num_steps:
                try:
                    gradient_norm = self._optimizer_step()
                except DamagedCacheError as error:
                    self._stop_before_damage(error)
                self.step += 1
                bar.update()
                logs = self.step % log.log_every == 0 or self.step in (1, self.num_steps)
                if logs and len(self.tracker.window):  # nothing in it: every step since the last time was skipped
                    rates = self.trained.schedule.get_last_lr()
                    extra = {"learning_rate": rates[0]} | component_rates(self.trained.optimizer, rates)
                    if gradient_norm is not None:
                        extra["gradient_norm"] = float(gradient_norm)
                    if (rate := adapted_rate(self.trained.optimizer)) is not None:
                        extra["adapted_learning_rate"] = float(rate)
                    try:
                        metrics = self.tracker.log(self.step, extra)
                    except TrainingStoppedError as error:
                        raise self._stopped(error) from error
                    bar.set_postfix_str(shown(metrics, self.tracker.totals))
                started = time.perf_counter()
                self.validation.at(self.step, self.trained.denoiser)
                if self.step % run.checkpointing_steps == 0:
                    self.state.save(self.step)
                if run.save_steps is not None and self.step % run.save_steps == 0:
                    self.save_weights()
                self.tracker.pause(time.perf_counter() - started)
                self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if not self.stop.agreed():
            return
        if self.step != self.state.saved_at:
            self.state.save(self.step)
        self.accelerator.end_training()
        choice = self.config.run.resume_from_checkpoint
        same = "the same command" if choice in (None, "latest") else f"without --resume_from_checkpoint {choice} it"
        raise StopRequestedError(f"stopped at step {self.step}: {same} continues")

    def _stop_before_damage(self, error: DamagedCacheError) -> NoReturn:
        """Stops at a cache entry that cannot be used; saves the steps before it, unless other processes would wait."""
        if self.step == self.state.saved_at:
            raise error
        if self.objective is not None:
            self.objective.discard_step()
        if self.accelerator.num_processes == 1:
            self.state.save(self.step)
        self.accelerator.end_training()
        raise TrainingStoppedError(f"{error}; {last_checkpoint(self.folder)}") from error

    def _optimizer_step(self) -> torch.Tensor | None:
        """Does one step; returns the gradient's norm, or None if the step was left out because it was not finite."""
        run, accelerator = self.config.run, self.accelerator
        use_lpl = self.step >= self.config.lpl.lpl_start
        # Whatever randomness is left in the model (dropout) is a function of the step.
        torch.manual_seed(keyed_seed(run.seed, "step", self.step, accelerator.process_index))
        norm, fault, added = torch.zeros(()), None, []
        self.guard.begin()
        for micro_batch in range(run.gradient_accumulation_steps):
            batch = self.batches.batch(self.step, micro_batch)
            with accelerator.accumulate(self.trained.denoiser):
                out = self.step_loss(self.trained.denoiser, batch, accelerator.device, use_lpl, self.step)
                self.guard.watch(batch, out.diffusion_per_sample, out.lpl)
                added.append((out.metrics, out.num_lpl_samples))
                if self.trained.stepping_backward is not None:
                    norm = accelerator.reduce(out.loss.detach())  # in every process, so that all find the same
                    fault = self.guard.fault(norm, self.step + 1, scaled=False)
                    if fault is not None:
                        break
                    norm = self._backward_and_step(self.trained.stepping_backward, out.loss)
                    continue
                accelerator.backward(spoil(out.loss))
                if accelerator.sync_gradients:
                    limit = self.config.optim.max_grad_norm or math.inf
                    norm = whole(accelerator.clip_grad_norm_(self.trained.parameters.values(), limit))
                    fault = self.guard.fault(norm, self.step + 1, accelerator.scaler is not None)
                if fault is None or accelerator.scaler is not None:  # a scaler leaves the step out by itself
                    self.trained.optimizer.step()
                self.trained.optimizer.zero_grad()
        if fault is not None:
            self._leave_out(fault, float(norm))
            return None
        for metrics, num_lpl_samples in added:
            self.tracker.window.add(metrics, num_lpl_samples)
        if not accelerator.optimizer_step_was_skipped:
            self.trained.schedule.step()
        if self.trained.ema is not None:
            self.trained.ema.after_step(self.step + 1, self.trained.parameters.values())
        if self.objective is not None:
            self.objective.end_step(accelerator.reduce if accelerator.num_processes > 1 else None)
        return norm

    def _backward_and_step(self, fused: FusedBackward, loss: torch.Tensor) -> torch.Tensor:
        try:
            norm = fused(self.accelerator.backward, loss, self.step + 1)
        except TrainingStoppedError as error:
            raise self._stopped(error) from error
        self.trained.optimizer.step()  # without gradients; tells accelerate and the schedule of a step
        return norm

    def _leave_out(self, fault: str, norm: float) -> None:
        """Leaves the step out, or stops with a checkpoint of the weights before it."""
        if self.objective is not None:
            self.objective.discard_step()
        why = self.guard.skip(fault, self.step + 1, norm, self.accelerator.process_index)
        if why is not None:
            if self.step != self.state.saved_at:
                self.state.save(self.step, prune=False)
            raise self._stopped(why)

    def _stopped(self, why: str | Exception) -> TrainingStoppedError:
        self.accelerator.end_training()
        return TrainingStoppedError(f"{why}; {last_checkpoint(self.folder)}")

    @property
    def _lora_readers(self) -> str:
        """The programs that read a LoRA's file of diffusers' naming."""
        return "diffusers" if self.config.model.use_dora else kind_of(self.config.model).lora_readers

    def _writer(self, whole_pipeline: bool) -> Callable[[Path], None]:
        """A function that writes the trained weights, as they are, into a folder; all processes call it, one writes."""
        family = self.family
        write = family.export if whole_pipeline else family.save_denoiser

        def call(folder: Path) -> None:
            denoiser = self.trained.whole_model.get()
            if not self.accelerator.is_main_process:
                return
            if self.config.model.rank is None:
                write(denoiser, folder)
                return
            family.lora_says = self.lora_says(self.step)
            family.export_lora(denoiser, folder)
            end, others = DORA_READERS if self.config.model.use_dora else LORA_READERS
            name = lora_name(self.folder, end, None if whole_pipeline else f"{self.step}-{folder.name}")
            renamed = partial(family.kohya_lora, denoiser)
            self.for_whom = write_beside(folder / LORA_FILE, name, renamed, self._lora_readers, others)

        return call

    def save_weights(self) -> None:
        """Writes the weights of this step for inference, raw and averaged."""
        main = self.accelerator.is_main_process
        save_weights(output_of(self.config), self.step, self.trained.weights, self._writer(whole_pipeline=False), main)
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Exports the result, made of the weights that --final_weights names, into the output folder."""
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        main, write = accelerator.is_main_process, self._writer(whole_pipeline=True)
        save_result(output_of(self.config), self.step, self.trained.weights, write, main, self.state.data)
        accelerator.wait_for_everyone()  # what reads the result next finds it, in whichever process
        if main:
            if self.repository is not None:
                saving.push(self.config, self.repository)
            if self.objective is not None and (line := self.tracker.totals.line(self.objective, self.step)) is not None:
                logger.info("%s", line)
            logger.info(
                "done: the result is in %s (%s weights): %s", self.folder, self.trained.weights.final, self.for_whom
            )
            readers = None if self.config.model.rank is None else self._lora_readers
            logger.info("next: %s", next_commands(self.folder, readers, kind_of(self.config.model).comfyui_folder))
        accelerator.end_training()
