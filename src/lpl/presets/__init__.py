"""Files shipped as starting points: options for --config, and configurations for `accelerate launch`."""

from __future__ import annotations

from importlib.resources import files

from lpl.base.errors import UserError


def presets() -> list[str]:
    """Names of the presets for --config."""
    return _names("lpl.presets")


def preset_text(name: str) -> str:
    """The text of a preset.

    Raises:
        UserError: no such preset.
    """
    for folder in ("lpl.presets", "lpl.presets.accelerate"):
        if name in _names(folder):
            return (files(folder) / f"{name}.yaml").read_text(encoding="utf-8")
    raise UserError(f"presets {name}: there is none of that name; `lpl presets` lists them")


def list_presets() -> str:
    """All presets, with the first line of each."""
    lines = []
    for folder, flag in (("lpl.presets", "lpl train --config NAME"), ("lpl.presets.accelerate", "accelerate launch")):
        lines.append(f"{flag}:")
        lines += [f"  {name:16} {preset_text(name).splitlines()[0].lstrip('# ')}" for name in _names(folder)]
    return "\n".join([*lines, "`lpl presets NAME` prints one: `lpl presets fsdp2 > fsdp2.yaml`, then", LAUNCH])


LAUNCH = "`accelerate launch --config_file fsdp2.yaml --num_processes 4 -m lpl train ...`"


def _names(folder: str) -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in files(folder).iterdir() if p.name.endswith(".yaml"))
