"""Low-rank sparse attention: what `sae` is for activations, for attention layers."""
