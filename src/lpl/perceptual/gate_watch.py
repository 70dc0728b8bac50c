"""Warns, once each, where no sample passes the gate, or another share than p_gate says."""

from __future__ import annotations

import logging

from lpl.perceptual.gate import Gate
from lpl.perceptual.noise_levels import source_of

logger = logging.getLogger(__name__)

IDLE_SAMPLES = 100
"""Where p_gate says that so many samples should have passed and none has, there is a warning."""
COUNTED_SAMPLES = 1000
"""Samples after which the share that passed is compared with p_gate, once."""
DEVIATIONS = 6
"""Standard deviations of that share beyond which chance does not explain the difference."""


class GateWatch:
    """Counts samples, and warns where the share that has passed does not fit the probability.

    Args:
        p_gate: the probability of passing.
        held: whether to warn of a differing share, too: whether LPL's weight depends on p_gate.
    """

    def __init__(self, gate: Gate, p_gate: float, held: bool) -> None:
        self.gate, self.p_gate, self.held = gate, p_gate, held
        self._seen = self._passed = 0

    def __call__(self, size: int, gated: int) -> None:
        """Counts a micro-batch and its samples that passed."""
        before, self._seen, self._passed = self._seen, self._seen + size, self._passed + gated
        p = self.p_gate
        if not self._passed and before * p < IDLE_SAMPLES <= self._seen * p:
            logger.warning(
                "LPL has applied to none of %d samples, though its gate %s should pass %.3g %% of them: are these the "
                "%s that made noisy_latents, and is p_gate that of your draws?",
                self._seen, self.gate, 100 * p, source_of(self.gate),
            )  # fmt: skip
        elif self.held and self._passed and before < COUNTED_SAMPLES <= self._seen:
            found = self._passed / self._seen
            if abs(found - p) > DEVIATIONS * (p * (1 - p) / self._seen) ** 0.5:
                logger.warning(
                    "%.3g %% of %d samples passed the gate %s, where p_gate says %.3g %%: LPL acts with %.2g of its "
                    "weight; pass p_gate=, a Distribution or a function that draws as your loop does, or %.3g",
                    100 * found, self._seen, self.gate, 100 * p, found / p, found,
                )  # fmt: skip
