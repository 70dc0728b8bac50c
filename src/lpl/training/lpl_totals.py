"""What LPL did over a run, for the line that the run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lpl.perceptual.objective import PerceptualObjective, gradient_share


@dataclass
class LPLTotals:
    """Sums over the steps in which LPL was computed; they belong in the checkpoint.

    Attributes:
        steps: optimizer steps with LPL.
        samples: samples in them.
        gated: samples of these that passed the gate.
        measured: steps of which the gradients below were measured.
        lpl_square, diffusion_square: mean squared gradients at the model's output, summed over those steps.
        since: the step that counting begins after; 0 unless --lpl_start, or a checkpoint without sums, puts it off.
    """

    steps: float = 0.0
    samples: float = 0.0
    gated: float = 0.0
    measured: float = 0.0
    lpl_square: float = 0.0
    diffusion_square: float = 0.0
    since: int = 0

    def add(self, metrics: Mapping[str, float], step: int, steps: float, samples_per_step: int) -> None:
        """Adds what was logged at a step, of so many steps with LPL before it.

        Args:
            metrics: means over these steps.
            step: the step of the log.
            steps: how many of the steps since the last log had LPL.
            samples_per_step: of all processes.
        """
        if not self.steps:
            self.since = step - round(steps)
        self.steps += steps
        self.samples += steps * samples_per_step
        self.gated += metrics["lpl/application_ratio"] * steps * samples_per_step
        if "diffusion/gradient_square" in metrics:
            self.measured += steps
            self.lpl_square += metrics["lpl/gradient_square"] * steps
            self.diffusion_square += metrics["diffusion/gradient_square"] * steps

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return asdict(self)

    def line(self, objective: PerceptualObjective, steps: int) -> str | None:
        """One sentence on what LPL did in a run of so many steps, or why nothing; None: nothing is known of it.

        The share is that of the root mean square gradients over all steps with LPL, as the meter of a step has it.
        """
        nothing = "LPL acted on no sample: "
        if objective.lpl_start >= steps:
            return f"{nothing}--lpl_start {objective.lpl_start} is not reached in {steps} steps; start earlier"
        if not self.steps:
            return None
        if objective.auto is None and float(objective.weight) == 0:
            return f"{nothing}--lpl_weight is 0; give a number above 0, or auto"
        if not self.gated:
            return (
                f"{nothing}none of {self.samples:,.0f} passed the gate {objective.gate}, though "
                f"{objective.p_gate:.2%} do on average; give a wider gate, or train longer"
            )
        if self.measured and not self.lpl_square:
            if objective.auto is not None:
                return f"{nothing}the run ended before --lpl_weight auto had a weight; train longer, or give a number"
            return f"{nothing}its gradient was 0 for all that passed the gate; look at masks and sample weights"
        since = f" since step {self.since}" if self.since else ""
        reached = f"{_percent(self.gated / self.samples)} of the samples{since}"
        weight = f"weight {float(objective.weight_at(steps - 1)):.3g}"
        if not self.measured:
            return f"LPL acted on {reached}, {weight}; its share of the gradient was not measured"
        share = gradient_share(self.lpl_square, self.diffusion_square)
        return f"LPL had {_percent(share)} of the gradient on {reached}, {weight}"


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %" if part >= 0.01 else f"{100 * part:.2g} %"
