"""What a type checker knows of the results of the public names; checked by mypy, never run."""

from collections.abc import Callable
from typing import Any, assert_type

from torch import Tensor

import lpl
from lpl.diffusion.schedule import Discrete, Flow


def results(objective: lpl.PerceptualObjective, x: Tensor, gate: lpl.Gate, batches: list[dict[str, Any]]) -> None:
    term = assert_type(objective(x, x, x, diffusion_loss=x), lpl.PerceptualTerm)
    assert_type(term.loss, Tensor)
    assert_type(objective.loss_fn(x, x), lpl.LPLOutput)
    assert_type(term.read(), dict[str, float])
    assert_type(lpl.check(objective.loss_fn, objective, batches), lpl.CheckResult)
    assert_type(lpl.probability_of(gate, lambda n: x[:n]), float)
    assert_type(lpl.edm(1.0), Callable[[Tensor, Tensor], tuple[Tensor, Tensor]])


def schedules(discrete: Discrete, flow: Flow) -> list[lpl.Schedule]:
    """Both are what the protocol asks for."""
    return [discrete, flow]
