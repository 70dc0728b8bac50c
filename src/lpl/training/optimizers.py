"""Optimizers by name: where each class comes from, what the flags give it, and whether it suits a run.

Adafactor is the one of transformers, without its relative steps and scaling by the parameter's size, so that
--learning_rate means what it means for AdamW. torch's own always multiplies the rate by the parameter's root mean
square, with which a LoRA, whose B starts at zero, would start a thousand times slower.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lpl.base.errors import UserError
from lpl.config import OptimConfig
from lpl.config.files import nearest


class Known(NamedTuple):
    """An optimizer with a name of its own."""

    path: str
    """Module and class."""
    flags: tuple[str, ...] = ("betas", "eps", "weight_decay")
    """Keywords that the --adam_ flags set."""
    keywords: tuple[tuple[str, Any], ...] = ()
    """Keywords in which it differs from its package's defaults."""


KNOWN = {
    "adamw": Known("torch.optim.AdamW"),
    "adamw8bit": Known("bitsandbytes.optim.AdamW8bit"),
    "adafactor": Known(
        "transformers.optimization.Adafactor",
        ("weight_decay",),
        (("scale_parameter", False), ("relative_step", False)),
    ),
    "prodigy": Known("prodigyopt.Prodigy"),
    "schedulefree_adamw": Known("schedulefree.AdamWScheduleFree"),
}
FLAGS = {
    "lr": "--learning_rate",
    "betas": "--adam_beta1 and --adam_beta2",
    "eps": "--adam_epsilon",
    "weight_decay": "--adam_weight_decay",
    "warmup_steps": "--lr_warmup_steps",
}
"""The flag that sets a keyword."""
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def optimizer_class(config: OptimConfig) -> Any:
    """The class that --optimizer names.

    Raises:
        UserError: a package that is not installed, or no optimizer of that name in it.
    """
    name = config.optimizer_name
    known = KNOWN.get(name)
    flag = "--use_8bit_adam" if config.use_8bit_adam else f"--optimizer {name}"
    module_name, _, class_name = (name if known is None else known.path).rpartition(".")
    package = module_name.split(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if known is not None:
            raise UserError(f"{flag} needs {package}: pip install 'latent-perceptual-loss[optim]'") from error
        raise UserError(
            f"{flag}: cannot import {module_name} ({error}); is the package {package} installed?"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise UserError(f"{flag}: {module_name} has no {class_name}{nearest(class_name, dir(module))}")
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"{flag}: {class_name} is no torch.optim.Optimizer")
    return found


def optimizer_keywords(config: OptimConfig, cls: Any) -> dict[str, Any]:
    """Keywords for the class, but for lr: of the flags, for an optimizer with a name, and of --optimizer_args.

    Raises:
        UserError: a keyword that the class lacks, or one that a flag sets.
    """
    known = KNOWN.get(config.optimizer_name, Known("", ()))
    values = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    of_flags = {name: values[name] for name in known.flags}
    if config.optimizer_name == "schedulefree_adamw":
        of_flags["warmup_steps"] = config.warmup_steps
    given, parameters = config.optimizer_keywords, inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in given:
        if name in of_flags or name == "lr":
            raise UserError(f"--optimizer_args {name}: {FLAGS[name]} sets that")
        if name == "params" or (name not in parameters and not takes_any):
            known_names = [p for p in parameters if p not in ("self", "params", "lr", *of_flags)]
            raise UserError(
                f"--optimizer_args {name}: {cls.__name__} takes no such keyword{nearest(name, known_names)}; "
                f"it takes {', '.join(known_names)}"
            )
    return of_flags | dict(known.keywords) | given


def check_class(config: OptimConfig) -> None:
    """Imports the optimizer and looks at its keywords, before anything heavy loads.

    Raises:
        UserError: as optimizer_class and optimizer_keywords; a schedule-free one together with EMA or a schedule.
    """
    cls = optimizer_class(config)
    optimizer_keywords(config, cls)
    if averages_itself(cls):
        config.require_schedule_free()


def averages_itself(optimizer: Any) -> bool:
    """Whether an optimizer (or its class) is schedule-free: it trains one point and means another to be used."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def parameter_groups(
    parameters: list[nn.Parameter], decay_all: bool, keywords: dict[str, Any], cls: Any
) -> list[dict[str, Any]]:
    """The parameters, and apart from them those that shall not decay: biases and weights of norms (one dimension)."""
    takes_decay = "weight_decay" in keywords or "weight_decay" in inspect.signature(cls).parameters
    decayed = [p for p in parameters if decay_all or p.ndim > 1 or not takes_decay]
    kept = [p for p in parameters if not (decay_all or p.ndim > 1 or not takes_decay)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def coefficients(optimizer: Any) -> list[dict[str, Any]]:
    """Of each group, what the run decides: the constructor's keywords, without parameters, rate and what steps keep."""
    names = set(inspect.signature(type(optimizer)).parameters) - {"params", "lr"}
    return [{name: value for name, value in group.items() if name in names} for group in optimizer.param_groups]


def label(optimizer: Any) -> str:
    """Package and class, as checkpoints name them."""
    cls = type(optimizer)
    return f"{cls.__module__.split('.')[0]}.{cls.__qualname__}"


def bare(optimizer: Any) -> Any:
    """The optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def adapted_rate(optimizer: Any) -> Tensor | float | None:
    """The step size that Prodigy has found, d times the rate; None where the rate is what was asked for."""
    group = optimizer.param_groups[0]
    return group["d"] * group["lr"] if "d_coef" in group else None
