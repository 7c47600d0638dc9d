"""A branch: taken where its condition has a value, traced where it has none yet."""

import contextlib

import keras
from keras import ops

_BACKEND = keras.backend.backend()

if _BACKEND == "torch":
    from torch.compiler import is_compiling
else:

    def is_compiling():
        return False


def choose(condition, if_true, if_false):
    """Calls one of two functions.

    Args:
        condition: Scalar boolean tensor.
        if_true: Function without arguments that returns a tensor or a list of tensors.
        if_false: The same. Of a traced branch both are called, once each.

    Returns:
        What the function returned.
    """
    value = known(condition, bool)
    if value is not None:
        return if_true() if value else if_false()
    if _BACKEND != "torch":
        return ops.cond(condition, if_true, if_false)
    # What PyTorch traces (its compiler, its vmap) cannot branch.
    one, other = if_true(), if_false()
    if isinstance(one, list):
        return [ops.where(condition, a, b) for a, b in zip(one, other, strict=True)]
    return ops.where(condition, one, other)


def known(tensor, read=ops.convert_to_numpy):
    """What a function reads from a tensor, or `None` while a program is traced."""
    if is_compiling():  # Which reading would interrupt.
        return None
    try:
        return read(tensor)
    except (AttributeError, NotImplementedError, TypeError, RuntimeError):
        return None


def eagerly():
    """A context in which calls are not traced, within a program that is."""
    if _BACKEND == "jax":
        import jax

        return jax.ensure_compile_time_eval()
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    return contextlib.nullcontext()
