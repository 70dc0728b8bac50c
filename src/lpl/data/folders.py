"""Where caches are."""

from __future__ import annotations

import os
from pathlib import Path

from lpl.config import DataConfig


def default_cache_dir() -> Path:
    """The user's cache folder for this package: $XDG_CACHE_HOME/lpl, or ~/.cache/lpl."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lpl"


def cache_dir(config: DataConfig) -> Path:
    """--latent_cache_dir, or the default."""
    return Path(config.latent_cache_dir) if config.latent_cache_dir else default_cache_dir()
