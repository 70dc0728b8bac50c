"""Metadata in a LoRA's files about its training, under the keys of kohya's programs, which others show too."""

from __future__ import annotations

import json
import time
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np

from lpl.config import TrainConfig
from lpl.data.dataset import TrainingData
from lpl.data.prepare import REGULARISATION

MOST_TAGS = 1000
"""Most tags of a folder in the file, the most frequent ones: programs read all of them with every LoRA."""


class LoraSays:
    """Makes the metadata of a run's LoRA at a step; what depends on the images is counted once, when first asked for.

    A caption's tags are what its commas separate, as kohya's programs count them. Only last parts of paths are written.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, num_steps: int, steps_per_epoch: float) -> None:
        self._config, self._data = config, data
        self._num_steps, self._steps_per_epoch = num_steps, steps_per_epoch
        self._started = time.time()

    def __call__(self, step: int) -> dict[str, str]:
        """The metadata of a LoRA after `step` optimizer steps."""
        config, side = self._config, self._config.data.crop_size
        model, run, optim, diffusion = config.model, config.run, config.optim, config.diffusion
        found = {
            "ss_resolution": f"({side}, {side})",
            "ss_steps": step,
            "ss_max_train_steps": self._num_steps,
            "ss_num_batches_per_epoch": round(self._steps_per_epoch * run.gradient_accumulation_steps),
            "ss_epoch": int(step / self._steps_per_epoch),
            "ss_num_epochs": -(-self._num_steps // max(1, round(self._steps_per_epoch))),
            "ss_batch_size_per_device": run.train_batch_size,
            "ss_gradient_accumulation_steps": run.gradient_accumulation_steps,
            "ss_learning_rate": config.learning_rate,
            "ss_lr_scheduler": optim.lr_scheduler,
            "ss_optimizer": optim.optimizer_name,
            "ss_mixed_precision": run.mixed_precision or "no",
            "ss_seed": run.seed,
            # kohya's counts from the last layer, which is 1.
            "ss_clip_skip": None if model.clip_skip is None else model.clip_skip + 1,
            "ss_min_snr_gamma": diffusion.snr_gamma,
            "ss_noise_offset": diffusion.noise_offset or None,
            "ss_network_dropout": model.lora_dropout or None,
            "ss_caption_dropout_rate": config.data.proportion_empty_prompts,
            "ss_shuffle_caption": config.data.shuffle_caption,
            "ss_random_crop": not config.data.center_crop,
            "ss_flip_aug": config.data.random_flip,
            "ss_enable_bucket": config.data.buckets,
            "ss_training_started_at": f"{self._started:.3f}",
            "ss_training_finished_at": f"{time.time():.3f}",
        }
        said = {"modelspec.resolution": f"{side}x{side}"}
        if config.data.caption_prefix:
            said["modelspec.trigger_phrase"] = config.data.caption_prefix
        return {key: str(value) for key, value in found.items()} | self._of_images | said | config.metadata.said()

    @cached_property
    def _of_images(self) -> dict[str, str]:
        data, trained = self._data, self._data.split.trained
        is_extra = data.samples.prefixes() == REGULARISATION
        groups, codes = data.samples.groups()
        folders, tags = {}, {}
        for code, counts in self._tags(trained & ~is_extra).items():
            own = trained & (codes == code)
            name = self._name(groups[code])
            folders[name] = {"n_repeats": round(float(data.repeats[own].mean()), 3), "img_count": int(own.sum())}
            tags[name] = dict(counts.most_common(MOST_TAGS))
        sizes = np.bincount(data.buckets[trained], minlength=len(data.views.buckets.sizes))
        buckets = {
            str(n): {"resolution": [width, height], "count": int(sizes[n])}
            for n, (height, width) in enumerate(data.views.buckets.sizes)
            if sizes[n]
        }
        return {
            "ss_num_train_images": str(int((trained & ~is_extra).sum())),
            "ss_num_reg_images": str(int((trained & is_extra).sum())),
            "ss_dataset_dirs": json.dumps(folders),
            "ss_tag_frequency": json.dumps(tags, ensure_ascii=False),
            "ss_bucket_info": json.dumps({"buckets": buckets}),
        }

    def _tags(self, chosen: np.ndarray) -> dict[int, Counter[str]]:
        """How often each tag is in the captions of the chosen samples, by the number of their group."""
        _, codes = self._data.samples.groups()
        found: dict[int, Counter[str]] = {int(code): Counter() for code in np.unique(codes[chosen])}
        for index, captions in enumerate(self._data.samples.captions()):
            if chosen[index]:
                tags = (tag.strip() for caption in captions for tag in caption.split(","))
                found[int(codes[index])].update(tag for tag in tags if tag)
        return found

    def _name(self, group: str) -> str:
        """A folder's name as programs show it; for images in no folder, the data set's."""
        data = self._config.data
        whole = data.train_data_dir or data.dataset_name or data.webdataset or "images"
        return group or Path(whole).expanduser().resolve().name
