"""Sparse arithmetic without a batch x d_sae array; imports nothing of ours."""
