"""The training loop on accelerate: what happens when. What a step computes is in step.py."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object, set_seed
from tqdm.auto import tqdm

from lpl.config import TrainConfig
from lpl.config_io import write_config
from lpl.data.bad_files import FILE as BAD_FILES
from lpl.data.dataset import Batch
from lpl.data.prepare import Processes, prepare_data
from lpl.data.sampler import BatchOrder, share
from lpl.diffusion.draws import keyed_seed
from lpl.diffusion.strata import strata
from lpl.errors import TrainingStoppedError, UserError
from lpl.families import load_family
from lpl.training import hub
from lpl.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from lpl.training.ema import Average
from lpl.training.engine import build_accelerator, build_objective
from lpl.training.lora import add_lora
from lpl.training.optim import build_optimizer, build_schedule, scaled_learning_rate
from lpl.training.optimizers import adapted_rate, bare, coefficients
from lpl.training.preflight import FINISHED, Checked, finished_at
from lpl.training.saving import save_weights
from lpl.training.step import TrainingStep
from lpl.training.tracking import FiniteGuard, Tracker
from lpl.training.validation import publish_images
from lpl.training.weights import Weights

logger = logging.getLogger("lpl")
T = TypeVar("T")

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def train(config: TrainConfig, checked: Checked) -> None:
    """Runs or continues the run that the config describes; the result is in config.run.output_dir.

    Raises:
        UserError: bad input that preflight could not see.
        TrainingStoppedError: a loss or gradient that is not finite; the last checkpoint stays.
    """
    trainer = Trainer(config, checked)
    trainer.fit()
    trainer.finish()


class Trainer:
    """One run. Construction loads, caches and resumes; fit trains; finish exports."""

    def __init__(self, config: TrainConfig, checked: Checked) -> None:
        self.config, self.folder = config, Path(config.run.output_dir)
        run = config.run
        self.accelerator = accelerator = build_accelerator(config)
        set_seed(run.seed)
        self.repository = hub.create_repository(config) if config.logging.push_to_hub else None
        weight_dtype = WEIGHT_DTYPES[accelerator.mixed_precision]
        self.family = family = load_family(config.model, accelerator.device, weight_dtype)
        self.data = prepare_data(
            checked.source,
            checked.regularisation,
            config.data,
            family,
            run.seed,
            self.folder / BAD_FILES,
            Processes(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
            accelerator.is_local_main_process,
        )
        if config.logging.validation_prompt is not None:
            family.prepare_prompt(config.logging.validation_prompt)
        family.free_encoders()
        self.samples_per_step = run.train_batch_size * run.gradient_accumulation_steps * accelerator.num_processes
        self.order = BatchOrder(run.seed, self.data.buckets, self.data.repeats, self.samples_per_step)
        self.steps_per_epoch = self.order.epoch_size / self.samples_per_step
        self.num_steps = config.num_steps(self.order.epoch_size, accelerator.num_processes)
        self._build_model(weight_dtype)
        self.objective = build_objective(config, family) if config.lpl.use_lpl else None
        self.step_loss = TrainingStep(family, config.diffusion, self.objective, run.seed)
        self.guard = FiniteGuard()
        self.tracker = Tracker(
            accelerator,
            self.samples_per_step,
            f"--lpl_weight {config.lpl.lpl_weight} --lpl_norm_type {config.lpl.lpl_norm_type}",
            config.lpl.lpl_start + config.lpl.lpl_warmup_steps if config.lpl.lpl_warmup_steps else 0,
        )
        self.step = 0
        self._resume()
        if accelerator.is_main_process:  # only now: a run that could not begin lays no claim to the folder
            write_config(config, self.folder)
        if self.samples_per_step > len(self.data):
            logger.warning(
                "a step takes %d samples of only %d: images repeat in it", self.samples_per_step, len(self.data)
            )
        self._announce()

    def _build_model(self, weight_dtype: torch.dtype) -> None:
        config, denoiser = self.config, self.family.denoiser
        if config.model.rank is not None:
            if weight_dtype != torch.float32:
                denoiser.to(dtype=weight_dtype)
            add_lora(denoiser, config.model, self.family.lora_targets, config.run.seed)
        else:
            denoiser.requires_grad_(True)
        if config.run.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        denoiser.to(self.accelerator.device).train()
        self.parameters = {n: p for n, p in denoiser.named_parameters() if p.requires_grad}
        trained = list(self.parameters.values())
        rate = scaled_learning_rate(config, self.accelerator.num_processes)
        optimizer = build_optimizer(trained, config.optim, rate)
        # Not prepared by accelerate, which would step it once per process.
        self.schedule = build_schedule(optimizer, config.optim, self.num_steps)
        self.ema = Average(trained, config.optim) if config.optim.use_ema else None
        if config.run.compile_denoiser:
            denoiser.compile()  # in place: no wrapper that would be seen in the names of parameters
        self.denoiser, self.optimizer = self.accelerator.prepare(denoiser, optimizer)
        self.optimizer.train()  # says something to schedule-free optimizers only
        self.weights = Weights(self.parameters, self.optimizer, self.ema, config.optim.final_weights)

    def _resume(self) -> None:
        path = find_checkpoint(self.folder, self.config.run.resume_from_checkpoint)
        if path is None:
            if finished_at(self.folder) is not None:
                logger.warning("%s: the finished run left no checkpoint, so training starts over", self.folder)
            return
        rates, options = list(self.schedule.base_lrs), coefficients(bare(self.optimizer))
        state = load_checkpoint(path, self.parameters, self.optimizer, self.ema)
        self.step = state["step"]
        self._check_resumed(path, state)
        self.schedule.load_state_dict(state["schedule"])
        # Rates and coefficients are this run's; the checkpoint may be another's.
        self.schedule.base_lrs = rates
        current = [rate * f(self.schedule.last_epoch) for rate, f in zip(rates, self.schedule.lr_lambdas, strict=True)]
        self.schedule._last_lr = current
        for group, own, rate in zip(self.optimizer.param_groups, options, current, strict=True):
            group |= own | {"lr": rate}
        if self.objective is not None and self.objective.auto is not None and state["auto_weight"] is not None:
            self.objective.auto.load_state_dict(state["auto_weight"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        logger.info("continuing from %s at step %d of %d", path, self.step, self.num_steps)

    def _check_resumed(self, path: Path, state: dict[str, Any]) -> None:
        if self.step > self.num_steps:
            raise UserError(
                f"{path}: is at step {self.step}, beyond the run's {self.num_steps}: raise --max_train_steps"
            )
        if path.resolve().parent != self.folder.resolve():
            return
        if state["data"] != self._data_hash():
            raise UserError(
                f"{path}: was trained on other images or captions than --train_data_dir or --dataset_name now holds; "
                "restore them, or choose another --output_dir and name this checkpoint with --resume_from_checkpoint"
            )

    def _data_hash(self) -> str:
        return self.data.samples.digest()

    def _announce(self) -> None:
        count = sum(p.numel() for p in self.parameters.values())
        rate = scaled_learning_rate(self.config, self.accelerator.num_processes)
        logger.info(
            "training %s parameters on %d samples: %d steps of %d samples, learning rate %g, %s",
            f"{count:,}", len(self.data), self.num_steps, self.samples_per_step,
            rate, f"mixed precision {self.accelerator.mixed_precision}",
        )  # fmt: skip
        if self.objective is not None:
            loss = self.objective.loss_fn
            logger.info(
                "LPL: weight %s, gate %s (passed with probability %.3g), decoder in %s outside autocast, TF32 %s, "
                "taps %s",
                self.config.lpl.lpl_weight, self.objective.gate, self.objective.p_gate,
                str(loss.dtype).removeprefix("torch."), "on" if self.config.run.allow_tf32 else "off",
                ", ".join(f"{t.name} ({t.channels} channels, stride {t.stride})" for t in loss.taps),
            )  # fmt: skip

    def fit(self) -> None:
        """Trains to the last step."""
        run, log, accelerator = self.config.run, self.config.logging, self.accelerator
        trackers_config = {k: v for k, v in self.config.flat().items() if isinstance(v, (int, float, str, bool))}
        trackers_config.pop("hub_token", None)
        accelerator.init_trackers("lpl", config=trackers_config)
        self.tracker.start(self.step)
        silent = not accelerator.is_local_main_process
        with tqdm(total=self.num_steps, initial=self.step, desc="training", disable=silent) as bar:
            while self.step < self.num_steps:
                gradient_norm = self._optimizer_step()
                self.step += 1
                bar.update()
                if self.step % log.log_every == 0 or self.step in (1, self.num_steps):
                    self._require_finite()
                    extra = {"learning_rate": self.schedule.get_last_lr()[0], "gradient_norm": float(gradient_norm)}
                    if (rate := adapted_rate(self.optimizer)) is not None:
                        extra["adapted_learning_rate"] = float(rate)
                    metrics = self.tracker.log(self.step, extra)
                    shown = {"loss": "train_loss", "lpl": "lpl/weighted_loss", "share": "lpl/gradient_share"}
                    bar.set_postfix({k: f"{metrics[name]:.3g}" for k, name in shown.items() if name in metrics})
                started = time.perf_counter()
                if self._validates():
                    self.validate()
                if self.step % run.checkpointing_steps == 0:
                    self.save()
                if run.save_steps is not None and self.step % run.save_steps == 0:
                    self.save_weights()
                self.tracker.pause(time.perf_counter() - started)

    def _optimizer_step(self) -> torch.Tensor:
        run, accelerator = self.config.run, self.accelerator
        use_lpl = self.step >= self.config.lpl.lpl_start
        # Whatever randomness is left in the model (dropout) is a function of the step.
        torch.manual_seed(keyed_seed(run.seed, "step", self.step, accelerator.process_index))
        norm = torch.zeros(())
        for micro_batch in range(run.gradient_accumulation_steps):
            batch = self._stratified(self.data.batch(self._draws(self.step, micro_batch)), micro_batch)
            with accelerator.accumulate(self.denoiser):
                out = self.step_loss(self.denoiser, batch, accelerator.device, use_lpl, self.step)
                self.guard.watch(
                    self.step * run.gradient_accumulation_steps + micro_batch, out.diffusion_per_sample, out.lpl
                )
                self.tracker.window.add(out.metrics, out.num_lpl_samples)
                accelerator.backward(out.loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters.values(), self.config.optim.max_grad_norm)
                    if accelerator.scaler is None:
                        self.guard.watch_gradient(self.step, norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        if self.ema is not None:
            self.ema.after_step(self.step + 1, self.parameters.values())
        if self.objective is not None:
            self.objective.end_step(accelerator.reduce if accelerator.num_processes > 1 else None)
        return norm

    def _draws(self, step: int, micro_batch: int) -> list[tuple[int, int]]:
        return list(self._share(self.order.batch(step), micro_batch))

    def _stratified(self, batch: Batch, micro_batch: int) -> Batch:
        if self.config.diffusion.timestep_sampling == "independent":
            return batch
        numbers = strata(self.samples_per_step, self.config.run.seed, self.step)
        return replace(batch, strata=(self._share(numbers, micro_batch), self.samples_per_step))

    def _share(self, batch: Sequence[T], micro_batch: int) -> Sequence[T]:
        run, accelerator = self.config.run, self.accelerator
        return share(
            batch,
            micro_batch,
            accelerator.process_index,
            run.train_batch_size,
            run.gradient_accumulation_steps,
            accelerator.num_processes,
        )

    def _require_finite(self) -> None:
        mine: list[str] = []
        if (found := self.guard.first()) is not None:
            accumulation = self.config.run.gradient_accumulation_steps
            step, micro_batch = divmod(found.micro_step, accumulation)
            indices = [index for index, _ in self._draws(step, micro_batch)]
            culprits = found.samples or range(len(indices))
            ids = ", ".join(self.data.samples[indices[i]].id for i in culprits)
            terms = " and ".join(["the diffusion loss"] * bool(found.samples) + ["LPL"] * found.lpl)
            verb = "were" if found.samples and found.lpl else "was"
            hint = "; --lpl_dtype bfloat16 or float32 does not overflow" * (
                found.lpl and self.config.lpl.lpl_dtype == "float16"
            )
            mine = [f"{terms} {verb} not finite at step {step + 1} (samples {ids}){hint}"]
        elif (step_of_gradient := self.guard.first_gradient()) is not None:
            mine = [f"the gradient was not finite at step {step_of_gradient + 1}, though the loss was"]
        reports = gather_object(mine)
        if reports:
            last = find_checkpoint(self.folder, None)
            kept = f"{last} is the last checkpoint" if last else "no checkpoint was written yet"
            raise TrainingStoppedError(f"{reports[0]}; {kept}")

    def _validates(self) -> bool:
        log = self.config.logging
        if log.validation_prompt is None:
            return False
        if self.step == self.num_steps:
            return True
        if log.validation_steps is not None:
            return self.step % log.validation_steps == 0
        every = max(1, round(log.validation_epochs * self.steps_per_epoch))
        return self.step % every == 0

    def validate(self) -> None:
        """Makes validation images with the weights that the result is made of; leaves training as it was."""
        self._require_finite()
        log, accelerator = self.config.logging, self.accelerator
        if accelerator.is_main_process:
            denoiser, prompt = self._bare_denoiser(), str(log.validation_prompt)
            denoiser.eval()
            # Another batch size without gradients: compiling once more for it would not pay.
            with self.weights.use(self.weights.final), torch.compiler.set_stance("force_eager"):
                images = self.family.generate(
                    denoiser, prompt, log.num_validation_images, self.config.run.seed, self.config.data.crop_size
                )
            denoiser.train()
            publish_images(accelerator, images, prompt, self.folder / "samples", self.step)
        accelerator.wait_for_everyone()

    def save(self) -> None:
        """Writes a checkpoint of this step."""
        self._require_finite()
        if self.accelerator.is_main_process:
            auto = self.objective.auto if self.objective is not None else None
            scaler = self.accelerator.scaler
            state: dict[str, Any] = {
                "data": self._data_hash(),
                "schedule": self.schedule.state_dict(),
                "auto_weight": auto.state_dict() if auto is not None else None,
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            limit = self.config.run.checkpoints_total_limit
            save_checkpoint(self.folder, self.step, self.parameters, self.optimizer, self.ema, state, limit)
        self.accelerator.wait_for_everyone()

    def _bare_denoiser(self) -> Any:
        return self.accelerator.unwrap_model(self.denoiser, keep_torch_compile=False)

    def save_weights(self) -> None:
        """Writes the weights of this step for inference, raw and averaged."""
        self._require_finite()
        if self.accelerator.is_main_process:
            denoiser, family = self._bare_denoiser(), self.family
            write = family.save_denoiser if self.config.model.rank is None else family.export_lora
            save_weights(self.folder, self.step, self.weights, lambda folder: write(denoiser, folder))
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Exports the result, made of the weights that --final_weights names, into the output folder."""
        accelerator, family = self.accelerator, self.family
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.weights.put(self.weights.final)
            denoiser = self._bare_denoiser()
            temporary = self.folder / ".tmp-result"
            shutil.rmtree(temporary, ignore_errors=True)
            if self.config.model.rank is None:
                family.export(denoiser, temporary)
            else:
                family.export_lora(denoiser, temporary)
            for part in temporary.iterdir():
                target = self.folder / part.name
                if target.is_dir():
                    shutil.rmtree(target)
                part.replace(target)
            temporary.rmdir()
            marker = self.folder / f".tmp-{FINISHED}"
            marker.write_text(json.dumps({"step": self.step, "weights": self.weights.final}))
            marker.replace(self.folder / FINISHED)
            if self.repository is not None:
                hub.push(self.config, self.repository)
            logger.info("done: the result is in %s (%s weights)", self.folder, self.weights.final)
        accelerator.end_training()
