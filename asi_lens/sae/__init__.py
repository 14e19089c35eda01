"""The paper's second half: dictionaries that start in the active subspace."""
