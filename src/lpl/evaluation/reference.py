"""Real images, and the same encoded and decoded by the model's VAE: what samples are compared with."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lpl.base.errors import UserError, on_one_line, require
from lpl.base.files import write_output
from lpl.data.crops import to_float
from lpl.data.lock import default_cache_dir
from lpl.evaluation.features import Extractor
from lpl.evaluation.images import BATCH, ImageSet, list_pictures, measure, pictures_digest, read_pictures
from lpl.families.base import config_settings, weights_hash

logger = logging.getLogger("lpl")

LARGE = 256
"""Images with longer sides go through the VAE one by one, to save memory."""

VERSION = "2"
"""Version of the statistics; files of other versions stay in the cache and are not read."""


class Reference:
    """Statistics of real images and, with a VAE, of their reconstructions.

    Args:
        real: the images.
        reconstructed: the same after the VAE; None: no VAE was given.
        size: pixels of their sides.
        extractor: the network their features are of.
        digest: a hash of the images' files; empty if they are no files.
    """

    def __init__(
        self, real: ImageSet, reconstructed: ImageSet | None, size: int, extractor: Extractor, digest: str = ""
    ) -> None:
        self.digest = digest
        self.real, self.reconstructed, self.size, self.extractor = real, reconstructed, size, extractor
        self.floors: dict[Any, list[float]] = {}
        """Metrics of the floor that have been computed, by metric and what they depend on."""

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        size: int,
        extractor: Extractor,
        vae: Any = None,
        *,
        cache_dir: str | Path | None = None,
        flag: str = "--reference_dir",
        show: bool = False,
    ) -> Reference:
        """Reads the images of a folder, or what has been computed of the same images before.

        The statistics are kept under a hash of the images' bytes, their order, the size, the network and the VAE.

        Args:
            folder: searched with its subfolders.
            size: every image's centre, resized to cover a square with this many pixels a side (Lanczos).
            extractor: the network.
            vae: a diffusers VAE for images (in the precision it is to be measured in), or None.
            cache_dir: where statistics are kept; None: the user's cache.
            flag: what errors call the folder.
            show: progress bars.

        Raises:
            UserError: no images, or files that cannot be read.
        """
        files = list_pictures(Path(folder), flag)
        digest = pictures_digest(files, flag)

        base = Path(cache_dir) if cache_dir is not None else default_cache_dir() / "evaluation"
        key = f"{VERSION} {extractor.key} {size} {digest}"
        real = _cached(base, key, lambda: measure(read_pictures(files, size, flag), extractor, len(files), show))
        reconstructed = None
        if vae is not None:
            settings = f"{type(vae).__name__} {next(vae.parameters()).dtype} {config_settings(vae.config)}"
            key += f" {weights_hash(vae, settings=settings)}"
            decoded = _reconstructed(read_pictures(files, size, flag), vae)
            reconstructed = _cached(base, key, lambda: measure(decoded, extractor, len(files), show))
        return cls(real, reconstructed, size, extractor, digest)

    def target(self, against: str) -> ImageSet:
        """What samples are compared with: "images" or their "reconstructions".

        Raises:
            ValueError: reconstructions without a VAE.
        """
        if against == "images":
            return self.real
        if self.reconstructed is None:
            raise ValueError("no VAE was given, so there are no reconstructions to compare with")
        return self.reconstructed

    def floor(self, against: str) -> tuple[ImageSet, ImageSet] | None:
        """The two sets whose distance is the best achievable score; None where there is no VAE.

        Against images, the reconstructions and the images; against reconstructions, every other one of them and the
        rest.
        """
        if self.reconstructed is None:
            return None
        if against == "images":
            return self.reconstructed, self.real
        return self.reconstructed.part(slice(0, None, 2)), self.reconstructed.part(slice(1, None, 2))


def reconstruct(images: Tensor, vae: Any) -> Tensor:
    """Images (B, 3, H, W), uint8, encoded to the posterior's mode, decoded and rounded to 8 bits.

    Raises:
        UserError: a VAE that does not encode single images to latents, or that returns them in another size.
    """
    parameter = next(vae.parameters())
    with torch.no_grad():
        encoded = vae.encode(to_float(images).to(parameter.device, parameter.dtype))
        if hasattr(encoded, "latent_dist"):
            latents = encoded.latent_dist.mode()
        elif hasattr(encoded, "latent"):
            latents = encoded.latent
        else:
            raise UserError(f"the VAE is a {type(vae).__name__}, whose floor cannot be measured: use --no_floor")
        decoded = vae.decode(latents).sample
    require(
        decoded.shape[-2:] == images.shape[-2:],
        f"--resolution {images.shape[-1]}: the VAE gives such images back with {decoded.shape[-1]} pixels; give a "
        "multiple of its pixels per latent, or --no_floor",
    )
    return ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def _reconstructed(images: Iterator[Tensor], vae: Any) -> Iterator[Tensor]:
    for batch in images:
        for part in batch.split(1 if batch.shape[-1] > LARGE else BATCH):
            yield reconstruct(part, vae)


def _cached(base: Path, key: str, compute: Any) -> ImageSet:
    file = base / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"
    if file.is_file():
        try:
            found = load(file.read_bytes())
            if not torch.equal(found["proof"], _proof(key, found["features"], found["power"])):
                raise OSError("it does not match its checksum")
            return ImageSet(found["features"], found["power"])
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("%s cannot be read (%s) and is made again", file, on_one_line(error))
    made = compute()
    proof = _proof(key, made.features, made.power)
    content = save({"features": made.features, "power": made.power, "proof": proof})
    write_output(file, content, f"--reference_cache_dir {base}")
    return made


def _proof(key: str, *tensors: Tensor) -> Tensor:
    """A checksum of what is kept under a key, (16,), uint8."""
    found = xxhash.xxh3_128(key.encode())
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(found.digest()), dtype=torch.uint8)
