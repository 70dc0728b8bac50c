"""Which samples are held out of training for validation: chosen by what is in the image, not by where it stands."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lpl.base.errors import UserError
from lpl.config import DataConfig
from lpl.data.catalogue import Samples
from lpl.data.sampler import parse_repeats
from lpl.diffusion.draws import keyed_seed

VALIDATION = "validation/"
"""Put before the ids and folders of images of --validation_data_dir."""


class Split(NamedTuple):
    """Training samples and held-out ones; copies of a held-out image are neither."""

    trained: np.ndarray
    """(N,), bool: samples that training may draw."""
    held_out: np.ndarray
    """Numbers of the samples that validation is made with, rising."""

    @property
    def copies(self) -> int:
        """Samples that are left out of training because a held-out image has the same bytes."""
        return len(self.trained) - int(self.trained.sum()) - len(self.held_out)


def split_samples(samples: Samples, config: DataConfig, seed: int) -> Split:
    """Holds out the images of --validation_data_dir, or --validation_samples of the training images.

    Of the different images (by sha256 of their files) among the training images, those are held out whose keyed hash of
    (seed, "held_out", sha256) is lowest. So an image that is added can take the place of one held-out image at most,
    and neither order nor names enter. Every sample with the bytes of a held-out image, regularisation images included,
    is kept out of training.

    Args:
        samples: of all sources; ids and folders of --validation_data_dir begin with VALIDATION.
        config: the options of the data.
        seed: seed of the run.

    Raises:
        UserError: nothing is left to train on.
    """
    if config.validation_data_dir is None and not config.validation_samples:
        return Split(np.ones(len(samples), bool), np.empty(0, np.int64))
    prefixes, digests = samples.prefixes(), samples.digests()
    if config.validation_data_dir is not None:
        held = np.flatnonzero(prefixes == VALIDATION)
        images = {digests[index] for index in held.tolist()}
    else:
        first: dict[bytes, int] = {}
        for index in np.flatnonzero(prefixes == "").tolist():
            first.setdefault(digests[index], index)
        ranked = sorted(first, key=lambda digest: keyed_seed(seed, "held_out", digest.hex()))
        images = set(ranked[: config.validation_samples])
        held = np.array(sorted(first[digest] for digest in images), np.int64)
    trained = np.fromiter((digest not in images for digest in digests), bool, len(digests))
    if not (trained & (prefixes == "")).any():
        raise UserError(
            f"{holding_option(config)}: leaves none of the {int((prefixes == '').sum())} training images (copies "
            "counted) to train on: hold out fewer"
        )
    return Split(trained, held)


def split_repeats(samples: Samples, split: Split, config: DataConfig) -> np.ndarray:
    """How often an epoch draws each sample, (N,); 0 where training may not draw it.

    Raises:
        UserError: --repeats that does not go with the folders of what is left to training.
    """
    groups, codes = samples.groups()
    repeats = np.zeros(len(samples))
    repeats[split.trained] = parse_repeats(config.repeats, groups, codes[split.trained])
    return repeats


def holding_option(config: DataConfig) -> str:
    """What holds samples out, for messages."""
    if config.validation_data_dir is not None:
        return f"--validation_data_dir {config.validation_data_dir}"
    return f"--validation_samples {config.validation_samples}"
