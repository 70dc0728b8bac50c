"""The embedded default: photographs, a small SDXL with its shipped weights, and how they were trained."""
