"""Turns what libraries raise for configs and weights that do not fit each other into one-line errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.loaders.single_file_utils import SingleFileComponentError
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

from lpl.base.errors import UserError, on_one_line

LOADING_ERRORS = (
    OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError, AssertionError,
    ImportError, SafetensorError, SingleFileComponentError,
)  # fmt: skip
"""What the libraries raise for configs and weights that do not fit each other."""


@contextmanager
def named(flag: str, name: str) -> Iterator[None]:
    """Turns what loading raises into one line that names the flag."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, LOADING_ERRORS):  # tokenizers raises plain Exception
            raise
        said = on_one_line(error, 400)
        if isinstance(error, NotImplementedError):  # raised on moving a network that lacks weights
            said = f"lacks weights of a network that its configs describe ({said.partition('.')[0]})"
        elif isinstance(error.__context__, LocalEntryNotFoundError) and not Path(name).exists():
            said = "no such folder, and the Hub cannot be reached"
        elif name.endswith(".safetensors") and "outgoing traffic" in said:
            said = "its configs are not in the Hub's cache, and the Hub is off: give a folder by --single_file_config"
        raise UserError(f"{flag} {name}: {said}") from error
