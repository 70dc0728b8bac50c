"""Every option of `lpl train`: frozen groups whose field names are the flags and the YAML keys.

No heavy imports here: `lpl --help` and every check of a flag run before torch loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from typing import Any

from lpl.base.errors import require
from lpl.config.checks import Facts, facts_of
from lpl.config.data import DataConfig
from lpl.config.describing import MetadataConfig
from lpl.config.loss import DiffusionConfig, LPLConfig
from lpl.config.optim import OPTIMIZERS, OptimConfig
from lpl.config.run import LoggingConfig, ModelConfig, RunConfig

__all__ = [
    "OPTIMIZERS",
    "DataConfig",
    "DiffusionConfig",
    "Facts",
    "LPLConfig",
    "LoggingConfig",
    "MetadataConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "check_model_options",
    "declared",
    "idle_options",
]


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune a latent diffusion model with the Latent Perceptual Loss."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    lpl: LPLConfig = field(default_factory=LPLConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    metadata: MetadataConfig = field(default_factory=MetadataConfig)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate before --scale_lr."""
        if self.optim.learning_rate is not None:
            return self.optim.learning_rate
        if self.optim.optimizer_name == "prodigy":
            return 1.0
        return 1e-5 if self.model.rank is None else 1e-4

    @property
    def component_rates(self) -> dict[str, float]:
        """Peak learning rates, before --scale_lr, of what is trained beside the denoiser."""
        if not self.model.train_text_encoder:
            return {}
        first = self.optim.text_encoder_lr
        first = self.learning_rate if first is None else first
        second = self.optim.text_encoder_2_lr
        return {"text_encoder": first, "text_encoder_2": first if second is None else second}

    @property
    def lpl_checkpointing(self) -> bool:
        """Whether LPL recomputes the decoder in its backward pass."""
        choice = self.lpl.lpl_checkpointing
        return self.run.gradient_checkpointing if choice == "auto" else choice == "true"

    def num_steps(self, draws: int, processes: int, repeats: float = 1.0) -> int:
        """Optimizer steps of the run: --max_train_steps, or those that --draws_per_image or --num_train_epochs take.

        Args:
            draws: of an epoch.
            repeats: how often an epoch draws a training image on average.
        """
        run, most = self.run, self.run.max_train_steps
        if run.draws_per_image is None and most is not None:
            return most
        epochs = run.num_train_epochs if run.draws_per_image is None else run.draws_per_image / repeats
        steps = max(1, int(-(-epochs * draws // self.samples_per_step(processes))))
        return steps if most is None else min(steps, most)

    @property
    def length_needs_data(self) -> bool:
        """Whether the number of steps depends on the number of images."""
        return self.run.max_train_steps is None or self.run.draws_per_image is not None

    def samples_per_step(self, processes: int) -> int:
        """Samples of an optimizer step, over all processes."""
        return self.run.train_batch_size * self.run.gradient_accumulation_steps * processes

    def flat(self) -> dict[str, Any]:
        """Every option by its flag's name."""
        return {f.name: getattr(group, f.name) for group in self.groups() for f in fields(group)}

    def changed(self, **values: Any) -> TrainConfig:
        """The options with some values changed, each given by its flag's name."""
        groups = {}
        for f in fields(self):
            group = getattr(self, f.name)
            own = {name: values.pop(name) for name in vars(group) if name in values}
            if own:
                groups[f.name] = replace(group, **own)
        assert not values
        return replace(self, **groups)

    def groups(self) -> list[Any]:
        """The groups of options, in order."""
        return [getattr(self, f.name) for f in fields(self)]


@cache
def declared(command: Any = TrainConfig) -> dict[str, Facts]:
    """What is known of every option of a command, by its flag's name."""
    groups: dict[str, Any] = {f.name: f.default_factory for f in fields(command) if f.default_factory is not MISSING}
    own = {name: facts for name, facts in facts_of(command).items() if name not in groups}
    return {name: facts for group in groups.values() for name, facts in declared(group).items()} | own


def takes_train(command: Any) -> bool:
    """Whether a command takes the options of `lpl train`, and so --config."""
    return declared(command).keys() >= declared().keys()


def check_model_options(config: TrainConfig, family: str, is_flow: bool, known: frozenset[str]) -> None:
    """Refuses options that do not act with the model: with its noise schedule, or with anything of its family.

    Args:
        family: its name.
        is_flow: whether it is trained by flow matching.
        known: the options that this model has, of those that only some models have.

    Raises:
        UserError: all of them, by name.
    """
    kind, given = ("flow", "discrete")[not is_flow], config.flat()
    odd = [f"--{name} {given[name]}" for name, facts in declared().items() if not facts.fits(given[name], kind)]
    words = {"flow": "is trained by flow matching", "discrete": "has a discrete schedule, no flow matching"}[kind]
    require(not odd, f"{', '.join(odd)}: the model {words}: drop {'it' if len(odd) == 1 else 'them'}")
    own = {name: facts for name, facts in declared().items() if facts.by_model and name not in known}
    odd = [f"--{name} {given[name]}" for name, facts in own.items() if given[name] != facts.default]
    require(not odd, f"{', '.join(odd)}: no model of {family} has that: drop {'it' if len(odd) == 1 else 'them'}")


def idle_options(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Options that were given and cannot act in this run, each with what it needs, in words."""
    given = config.flat()
    for name, facts in declared().items():
        # lr_warmup_steps 0 asks for nothing, and is what users of the constant schedule write.
        if facts.needs is not None and given[name] not in (facts.default, 0) and not facts.needs.are_met(config):
            yield name, facts.needs.words
