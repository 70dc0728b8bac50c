"""`lpl train` and `lpl cache`, from options to the end; nothing heavy is imported before they are called."""

from __future__ import annotations

import logging
from pathlib import Path

from lpl.config import TrainConfig

logger = logging.getLogger("lpl")


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


def fill_cache(config: TrainConfig) -> None:
    """Encodes what the caches lack of a run's images and captions; a run with these options then encodes nothing.

    Raises:
        UserError: bad options, model or images.
        StopRequestedError: by a signal or --max_minutes; what is encoded stays.
    """
    import torch

    from lpl.base.output_folder import Names, OutputFolder
    from lpl.config.run_folder import BAD_FILES
    from lpl.data.bad_files import is_list
    from lpl.data.lock import cache_dir, in_use
    from lpl.data.prepare import Processes, prepare_data
    from lpl.data.sources import open_regularisation, open_source, open_validation
    from lpl.families import load_family
    from lpl.training.engine import build_accelerator
    from lpl.training.preflight import check_model, check_sizes
    from lpl.training.stopping import stoppable

    config, configs = check_model(config)
    if configs:
        check_sizes(config, configs)
    source = open_source(config.data, config.model.cache_dir)
    regularisation, validation = open_regularisation(config.data), open_validation(config.data)
    output = OutputFolder(config.run.output_dir, "lpl train")
    output.check(Names({BAD_FILES: is_list}))
    accelerator = build_accelerator(config)
    with in_use(cache_dir(config.data)), stoppable(config.run.max_minutes) as stop:
        family = load_family(config.model, accelerator.device, torch.float32, encoders_only=True)
        rank, size = accelerator.process_index, accelerator.num_processes
        data = prepare_data(
            source,
            regularisation,
            config.data,
            family,
            config.run.seed,
            Path(config.run.output_dir) / BAD_FILES,
            Processes(rank, size, accelerator.wait_for_everyone, stop.raise_if_asked),
            accelerator.is_local_main_process,
            validation,
        )
    logger.info("%d samples are cached in %s", len(data), data.caches.folder)
    accelerator.end_training()
