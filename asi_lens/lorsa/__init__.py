"""Low-rank sparse attention (Lorsa): sparse dictionaries of attention layers, as `sae` has of activations."""
