"""Kernels of a TopK training step for NVIDIA cards, in Triton. `card` and `plan` say where they run."""
