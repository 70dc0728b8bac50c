"""Optimizers by name, with their groups and learning rates: where each comes from, and whether it suits a run.

Adafactor is the one of transformers, without its relative steps and scaling by the parameter's size, so that
--learning_rate means what it means for AdamW. torch's own always multiplies the rate by the parameter's root mean
square, with which a LoRA, whose B starts at zero, would start a thousand times slower.
"""

from __future__ import annotations

import importlib
import inspect
import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from lpl.base.errors import UserError, on_one_line
from lpl.config import OptimConfig, TrainConfig
from lpl.config.files import nearest
from lpl.training.per_parameter import bare, of_optimi, suited
from lpl.training.sharded import join_optimizer, split_optimizer


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
        "transformers.optimization.Adafactor", ("weight_decay",), (("scale_parameter", False), ("relative_step", False))
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
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


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
    """Keywords for the class, except lr: from the flags, for an optimizer with a name, and from --optimizer_args.

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
    """Whether an optimizer (or its class) is schedule-free: it trains one point and offers another for use."""
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
    """What the run's options set in each group: the constructor's keywords, without parameters, rate and state."""
    names = set(inspect.signature(type(bare(optimizer))).parameters) - {"params", "lr"}
    return [{name: value for name, value in group.items() if name in names} for group in optimizer.param_groups]


def label(optimizer: Any) -> str:
    """Package and class, as checkpoints name them."""
    cls = type(bare(optimizer))
    return f"{cls.__module__.split('.')[0]}.{cls.__qualname__}"


def adapted_rate(optimizer: Any) -> Tensor | float | None:
    """The step size that Prodigy has found, d times the rate; None if the rate is the given one."""
    group = optimizer.param_groups[0]
    return group["d"] * group["lr"] if "d_coef" in group else None


def build_optimizer(
    parameters: list[nn.Parameter],
    config: OptimConfig,
    learning_rate: float,
    components: Mapping[str, tuple[list[nn.Parameter], float]] | None = None,
) -> Any:
    """The optimizer that --optimizer names, in up to two groups: biases and weights of norms do not decay.

    Args:
        learning_rate: after --scale_lr.
        components: by name, further parameters with a rate of their own, again in up to two groups each; a group has
            the name as its "component".

    Raises:
        UserError: a package that is not installed, or keywords that the optimizer lacks.
    """
    cls = optimizer_class(config)
    keywords = optimizer_keywords(config, cls)
    if config.is_optimi:
        keywords = of_optimi(config) | keywords
    cls = suited(cls, config)
    groups = parameter_groups(parameters, config.decay_all, keywords, cls)
    for name, (further, rate) in (components or {}).items():
        own = parameter_groups(further, config.decay_all, keywords, cls)
        groups += [group | {"lr": rate, "component": name} for group in own]
    with redirect_stdout(io.StringIO()):  # prodigyopt says at each start that its weight decay is decoupled
        return cls(groups, lr=learning_rate, **keywords)


def build_schedule(optimizer: Any, config: OptimConfig, num_steps: int) -> Any:
    """A schedule in optimizer steps of the run: it is stepped once per optimizer step, on every process alike.

    Raises:
        UserError: malformed --lr_step_rules.
    """
    try:
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            step_rules=config.lr_step_rules,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=num_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"--lr_scheduler {config.lr_scheduler}: {error}") from error


def scaled_learning_rate(config: TrainConfig, num_processes: int) -> float:
    """The peak learning rate, after --scale_lr."""
    return config.learning_rate * _scale(config, num_processes)


def split_components(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig, num_processes: int
) -> tuple[list[nn.Parameter], dict[str, tuple[list[nn.Parameter], float]]]:
    """The parameters that have --learning_rate, and those of components with their own, each with it after --scale_lr.

    A component's parameters have names that begin with its own and a dot.
    """
    scale = _scale(config, num_processes)
    components = {
        part: ([p for name, p in parameters.items() if name.startswith(f"{part}.")], rate * scale)
        for part, rate in config.component_rates.items()
    }
    taken = {id(p) for own, _ in components.values() for p in own}
    return [p for p in parameters.values() if id(p) not in taken], components


def component_rates(optimizer: Any, rates: list[float]) -> dict[str, float]:
    """The learning rates of components, by the names they are logged under; `rates` are those of all groups."""
    groups = zip(optimizer.param_groups, rates, strict=True)
    return {f"learning_rate/{group['component']}": rate for group, rate in groups if "component" in group}


def _scale(config: TrainConfig, num_processes: int) -> int:
    return config.samples_per_step(num_processes) if config.optim.scale_lr else 1


def check_steps(config: OptimConfig, device: torch.device) -> None:
    """Lets the optimizer take two steps on two small tensors, and its state go through a checkpoint.

    Raises:
        UserError: values that the optimizer refuses, one that needs more than gradients, or one whose state is not
            made of numbers and tensors.
    """
    try:
        dtype = getattr(torch, config.weights_dtype)
        parameters = [nn.Parameter(torch.ones(size, device=device, dtype=dtype)) for size in ((64, 64), (64,))]
        optimizer = build_optimizer(parameters, config, config.learning_rate or 1e-4)
        if averages_itself(optimizer):
            optimizer.train()
        for _ in range(2):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
        tensors, rest = split_optimizer(optimizer.state_dict())
        optimizer.load_state_dict(join_optimizer(tensors, rest))
    except FAILURES as error:
        given = f" --optimizer_args {config.optimizer_args}" if config.optimizer_args else ""
        message = on_one_line(error, 300)
        raise UserError(f"--optimizer {config.optimizer_name}{given}: {type(error).__name__}: {message}") from error
