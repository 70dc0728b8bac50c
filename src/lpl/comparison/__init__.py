"""`lpl compare`: the same run under several sets of options, paired by seed, and whether that made a difference."""
