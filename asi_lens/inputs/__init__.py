"""Weights and text: downloads, files and hub names; models, tokens, and forward passes with hooks."""
