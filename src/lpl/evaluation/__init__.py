"""`lpl eval`: samples of a model against real images, as metrics with intervals."""
