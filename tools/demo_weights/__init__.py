"""How the demo's shipped weights were trained."""
