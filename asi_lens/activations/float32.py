"""The name under which rooms after `inputs` know `inputs.float32`."""

from asi_lens.inputs.float32 import in_float32, loss_dtype

__all__ = ["in_float32", "loss_dtype"]
