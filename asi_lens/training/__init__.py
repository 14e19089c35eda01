"""Training runs of any model that learns in steps: options, loop, log, checkpoints, ranks."""
