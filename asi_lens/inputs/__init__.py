"""Weights and text: where they come from, and the model that both meet in."""
