"""Sparse autoencoders: dictionary, initialization, training, evaluation, formats."""
