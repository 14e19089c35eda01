"""A run of anything that learns by steps: options, loop, log, checkpoints, ranks."""
