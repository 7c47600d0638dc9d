"""Moves small tensors between devices. Variables may lie on several devices.

Gradients stay on their device. Only results of reductions, and factors of gradients,
move. TensorFlow moves tensors itself.
"""

import keras
import numpy as np
from keras import ops

_BACKEND = keras.backend.backend()

if _BACKEND == "jax":
    import jax

    def device_of(tensor):
        """Returns a hashable value that is equal for tensors on the same device."""
        if isinstance(tensor, jax.core.Tracer):  # The compiler places the tensor.
            return None
        return frozenset(tensor.sharding.device_set)

    def to_device_of(tensor, other):
        """Moves a tensor to the device of another, if each is on a single device."""
        if isinstance(tensor, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
            return tensor
        are_on_one_device_each = (
            len(tensor.sharding.device_set) == len(other.sharding.device_set) == 1
        )
        if not are_on_one_device_each or tensor.sharding == other.sharding:
            return tensor
        return jax.device_put(tensor, other.sharding)

elif _BACKEND == "torch":
    import torch

    def device_of(tensor):
        return tensor.device

    def to_device_of(tensor, other):
        return tensor if tensor.device == other.device else tensor.to(other.device)

else:

    def device_of(tensor):
        return getattr(tensor, "device", None)  # Variables have no device.

    def to_device_of(tensor, other):
        return tensor


def constant_on_device_of(values, dtype, other):
    """Converts a list of numbers to a vector on the device of a tensor."""
    if _BACKEND == "torch":
        # Keras converts lists slowly, and PyTorch's compiler cannot trace NumPy arrays.
        return torch.tensor(values, dtype=getattr(torch, dtype), device=other.device)
    return to_device_of(ops.convert_to_tensor(np.array(values, dtype)), other)
