"""The quality benchmark: LPL against the plain objective on photographs, at the demo model's scale. See README.md."""
