"""Dictionaries initialized in the active subspace: the second half of the paper."""
