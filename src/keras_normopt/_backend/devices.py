"""Where tensors live: variables may lie on several devices, and norms span them.

Whole gradients stay where they are. Only what they were reduced to, or is multiplied
with them, moves. TensorFlow moves tensors by itself.
"""

import keras

_BACKEND = keras.backend.backend()

if _BACKEND == "jax":
    import jax

    def device_of(tensor):
        """Something hashable that is the same for tensors that live together."""
        if isinstance(tensor, jax.core.Tracer):  # The compiler decides.
            return None
        return frozenset(tensor.sharding.device_set)

    def near(tensor, other):
        """A tensor, moved to the device of another one if they are on one each."""
        if isinstance(tensor, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
            return tensor
        one_each = (
            len(tensor.sharding.device_set) == len(other.sharding.device_set) == 1
        )
        if not one_each or tensor.sharding == other.sharding:
            return tensor
        return jax.device_put(tensor, other.sharding)

elif _BACKEND == "torch":

    def device_of(tensor):
        return tensor.device

    def near(tensor, other):
        return tensor if tensor.device == other.device else tensor.to(other.device)

else:

    def device_of(tensor):
        return getattr(tensor, "device", None)  # Variables have none.

    def near(tensor, other):
        return tensor
