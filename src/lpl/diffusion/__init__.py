"""The diffusion process: pure functions that know nothing of models or trainers."""
