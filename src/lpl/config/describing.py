"""Options: the metadata in the files of a result."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from lpl.config.checks import Facts, Options, option

PREFIX = "metadata_"


@dataclass(frozen=True)
class MetadataConfig(Options):
    """Metadata: what the files of the result say, which ComfyUI, A1111, Forge and model sites show."""

    USUALLY: ClassVar[Facts] = Facts(free=True)

    metadata_author: str | None = None
    """Who made it."""
    metadata_description: str | None = option(None, elsewhere=("training_comment",))
    """What it is."""
    metadata_license: str | None = None
    """Its licence, best an SPDX identifier such as CC-BY-4.0."""
    metadata_tags: str | None = None
    """Tags, separated by commas."""
    metadata_trigger_phrase: str | None = None
    """The words of a prompt that it answers to; unset: --caption_prefix."""
    metadata_title: str | None = None
    """Its title; unset: the name of its file."""

    def said(self) -> dict[str, str]:
        """What was given, under the keys of Stability AI's model specification 1.0.0."""
        given = {f.name.removeprefix(PREFIX): getattr(self, f.name) for f in fields(self)}
        return {f"modelspec.{name}": text for name, text in given.items() if text is not None}
