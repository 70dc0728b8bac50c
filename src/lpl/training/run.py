"""`lpl train`, from options that are checked to the end; nothing heavy is imported before."""

from __future__ import annotations

from lpl.config import TrainConfig


def run_train(config: TrainConfig) -> None:
    """Checks everything that is cheap to check, then trains."""
    from lpl.training.preflight import alone, preflight

    checked = preflight(config)
    config = checked.config
    if checked.has_ended:
        print(f"nothing to do: {config.run.output_dir} holds this run, finished at step {checked.finished_step}")
    else:
        with alone(checked):
            from lpl.training.trainer import train

            train(config, checked)
