"""LPL's defaults, for the library and the command line alike; nothing heavy is imported here.

From what was measured (docs/results.md): they help a little without guidance, and make no difference to the Fréchet
distance with it. `channel` helps one small model more without guidance, and takes a second one away in other features.
"""

from typing import Final

NORM_TYPE: Final = "own"
SIGMA_THRESHOLD = 3.0
"""The gate: noise/signal, sigma / alpha, at most this; for flow matching sigma / (1 - sigma), so sigma <= 0.75."""
TARGET_SHARE = 0.5
"""For the weight "auto": LPL's share of the gradient at the model's output; LPL is then about a third of the loss."""
LOW_SHARE, HIGH_SHARE = 0.05, 0.80
"""Shares of the gradient below which LPL idles, and above which it dominates."""
WALK_TOLERANCE = 2e-2
"""Largest allowed difference of LPL's walk from vae.decode, for images that span 2; TF32 on a GPU stays below it."""
