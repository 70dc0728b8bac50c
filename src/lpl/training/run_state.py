"""What a run continues from: everything that its checkpoints hold, taken out of the run and put back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lpl.base.errors import UserError
from lpl.base.json_files import NULL, REST, SWITCH, TEXT, Kind, Shape, require_shape, whole
from lpl.config import TrainConfig
from lpl.config.run_folder import MEASURED, STATE, find_checkpoint
from lpl.perceptual.objective import PerceptualObjective
from lpl.training.checkpoint import load_checkpoint, prune_checkpoints, reason, recover, save_checkpoint
from lpl.training.nonfinite import FiniteGuard
from lpl.training.optimizers import coefficients
from lpl.training.output import finished_at
from lpl.training.tracking import LPLTotals, Tracker
from lpl.training.weights import Trained

logger = logging.getLogger("lpl")

COUNT = whole(0, 2**53)
TWO = Kind("two numbers", lambda v: isinstance(v, list) and len(v) == 2 and all(map(MEASURED.fits, v)))
KEPT: Shape = {
    "data": TEXT,
    "division": {name: whole(1, 2**31) for name in ("samples", "micro-batches", "processes")},
    "skips": COUNT,
    "tracker": {
        "windows": [{REST: [(MEASURED, TEXT, NULL)]}],
        "logged_at": COUNT,
        "squares": TWO,
        "gated": MEASURED,
        "warned": SWITCH,
        "lpl?": {**dict.fromkeys((f.name for f in fields(LPLTotals)), MEASURED), "since": COUNT},
    },
    "schedule": {"last_epoch": COUNT},
    "auto_weight": ({"fixed": SWITCH, "measured": COUNT, "weight": MEASURED, "squares": (TWO, NULL)}, NULL),
    "budget?": ({"fixed": SWITCH, "measured": COUNT, "sums": ([[MEASURED]], NULL), "reach": [[MEASURED]]}, NULL),
    "scaler": ({}, NULL),
}
"""What a run keeps in state.json."""


@dataclass
class RunState:
    """The parts of a run that change, and what they are checked against when it is continued.

    Attributes:
        data: digest of the samples.
        num_steps: optimizer steps of the run.
        saved_at: the step of the last checkpoint of this run; 0: none.
    """

    config: TrainConfig
    accelerator: Accelerator
    trained: Trained
    objective: PerceptualObjective | None
    guard: FiniteGuard
    tracker: Tracker
    data: str
    num_steps: int
    saved_at: int = 0

    @property
    def folder(self) -> Path:
        """The run's output folder."""
        return Path(self.config.run.output_dir)

    def save(self, step: int, prune: bool = True) -> None:
        """Writes a checkpoint of a step; prune: --checkpoints_total_limit applies. Every process must call it."""
        auto = self.objective.auto if self.objective is not None else None
        budget = self.objective.budget if self.objective is not None else None
        scaler = self.accelerator.scaler
        numbers: dict[str, Any] = {
            "data": self.data,
            "threads": torch.get_num_threads(),
            "division": self._division(),
            "skips": self.guard.skips,
            "tracker": self.tracker.state_dict(),
            "schedule": self.trained.schedule.state_dict(),
            "auto_weight": auto.state_dict() if auto is not None else None,
            "budget": budget.state_dict() if budget is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        save_checkpoint(
            self.folder,
            step,
            self.trained.parameters,
            self.trained.optimizer,
            self.trained.ema,
            numbers,
            self.config.run.checkpoints_total_limit if prune else None,
            self.accelerator.is_main_process,
        )
        self.saved_at = step
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Loads the checkpoint that this run goes on from; returns its step, 0 without one.

        Raises:
            UserError: a checkpoint that is damaged, of another model, or of another run than the options describe.
        """
        if self.accelerator.is_main_process:
            recover(self.folder)
        self.accelerator.wait_for_everyone()
        choice = self.config.run.resume_from_checkpoint
        path = find_checkpoint(self.folder, choice)
        if path is None:
            if finished_at(self.folder) is not None:
                logger.warning("%s: the finished run left no checkpoint, so training starts over", self.folder)
            return 0
        optimizer = self.trained.optimizer
        options = coefficients(optimizer)
        state = load_checkpoint(path, self.trained.parameters, optimizer, self.trained.ema)
        require_shape(state, KEPT, str(path / STATE), "resume from another checkpoint")
        step = int(state["step"])
        self._check(path, state)
        try:
            self._put(path, state, step, options)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path / STATE}: is not what was written ({reason(error)})") from error
        if self.accelerator.is_main_process and choice in (None, "latest"):
            # A kill may have come between a checkpoint and the removal of the one before it.
            prune_checkpoints(self.folder, path, self.config.run.checkpoints_total_limit)
        logger.info("continuing from %s at step %d of %d", path, step, self.num_steps)
        return step

    def _put(self, path: Path, state: dict[str, Any], step: int, options: list[dict[str, Any]]) -> None:
        """Restores what a checkpoint has beside parameters, moments and average.

        Args:
            options: the optimizer's coefficients before its state was loaded, which are this run's.
        """
        schedule, optimizer = self.trained.schedule, self.trained.optimizer
        rates, own = list(schedule.base_lrs), schedule.state_dict()
        schedule.load_state_dict({key: value for key, value in state["schedule"].items() if key in own})
        # Rates and coefficients are this run's; the checkpoint may be another run's.
        schedule.base_lrs = rates
        current = [rate * f(schedule.last_epoch) for rate, f in zip(rates, schedule.lr_lambdas, strict=True)]
        schedule._last_lr = current
        for group, kept, rate in zip(optimizer.param_groups, options, current, strict=True):
            group |= kept | {"lr": rate}
        if self.objective is not None and self.objective.auto is not None and state["auto_weight"] is not None:
            self.objective.auto.load_state_dict(state["auto_weight"])
        if self.objective is not None and self.objective.budget is not None and state.get("budget") is not None:
            self.objective.budget.load_state_dict(state["budget"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self._is_own(path):
            self._tell_threads(path, state.get("threads"))
            self.saved_at, self.guard.skips = step, state["skips"]
            self.tracker.load_state_dict(state["tracker"])

    def _tell_threads(self, path: Path, before: int | None) -> None:
        """Warns if the number of threads changed: on a CPU, sums are taken in as many parts as there are threads."""
        now = torch.get_num_threads()
        if self.accelerator.device.type == "cpu" and before not in (None, now):
            logger.warning(
                "%s: was written with %d threads, now there are %d: what follows equals the run so far only up to the "
                "rounding of floats (OMP_NUM_THREADS=%d makes it bit for bit the same)", path, before, now, before,
            )  # fmt: skip

    def _division(self) -> dict[str, int]:
        """How a step's samples are divided."""
        run = self.config.run
        return {
            "samples": run.train_batch_size,
            "micro-batches": run.gradient_accumulation_steps,
            "processes": self.accelerator.num_processes,
        }

    def _check(self, path: Path, state: dict[str, Any]) -> None:
        if state["step"] > self.num_steps:
            raise UserError(
                f"{path}: is at step {state['step']}, beyond the run's {self.num_steps}: raise --max_train_steps"
            )
        if not self._is_own(path):
            return
        changed = []
        if state["data"] != self.data:
            changed.append(
                "was trained on other images or captions than --train_data_dir or --dataset_name now holds, or others "
                "were held out"
            )
        now = self._division()
        before = {name: state["division"][name] for name in now}
        told = [" x ".join(f"{count} {name}" for name, count in each.items()) for each in (before, now)]
        if _product(before) != _product(now):
            changed.append(f"was trained with {_product(before)} samples a step ({told[0]}), not {_product(now)}")
        elif before != now and (by := self._depends_on_division()):
            changed.append(f"was trained with {told[0]}, not {told[1]}, which {by} depends on")
        if changed and not self.config.run.allow_changes:
            raise UserError(
                f"{path}: {', '.join(changed)}; restore that, or choose another --output_dir and name this checkpoint "
                "with --resume_from_checkpoint, or continue all the same with --allow_changes"
            )
        if changed:
            logger.warning("--allow_changes: %s %s", path, ", ".join(changed))

    def _depends_on_division(self) -> str | None:
        """What makes the trajectory depend on the division by more than the order of additions."""
        lpl, model = self.config.lpl, self.config.model
        if lpl.use_lpl and lpl.lpl_reduction == "gated":
            return "--lpl_reduction gated"
        if lpl.use_lpl and lpl.lpl_max_samples is not None:
            return "--lpl_max_samples"
        if lpl.use_lpl and lpl.lpl_norm_type == "batch":
            return "--lpl_norm_type batch"
        return "--lora_dropout" if model.rank is not None and model.lora_dropout else None

    def _is_own(self, path: Path) -> bool:
        """Whether a checkpoint is this run's, not another's that it starts from."""
        return path.resolve().parent == self.folder.resolve()


def _product(division: dict[str, int]) -> int:
    samples, micro_batches, processes = division.values()
    return samples * micro_batches * processes
