"""`lpl eval`: samples of a model against real images, as figures with intervals."""
