"""Branches, loops and reads values, eagerly or traced, on each backend."""

import contextlib
import threading
from typing import Any

import keras
from keras import ops

_BACKEND = keras.backend.backend()

if _BACKEND == "torch":
    from torch.compiler import is_compiling as is_compiling
else:

    def is_compiling():
        return False


# Several threads may trace one optimizer at once on TensorFlow and JAX. PyTorch's
# compiler cannot follow thread-local variables.
ThreadLocal: Any = object if _BACKEND == "torch" else threading.local


def cond(condition, if_true, if_false):
    """Calls one of two functions.

    Args:
        condition: Scalar boolean tensor.
        if_true: Function without arguments. It returns a list of tensors.
        if_false: Like `if_true`. While traced, both functions are called, once each.

    Returns:
        The result of the function.
    """
    value = concrete_value(condition, bool)
    if value is not None:
        return if_true() if value else if_false()
    if _BACKEND != "torch":
        return ops.cond(condition, if_true, if_false)
    # PyTorch's compiler and its vmap cannot branch.
    pairs = zip(if_true(), if_false(), strict=True)
    return [ops.where(condition, one, other) for one, other in pairs]


def fold(function, start, rows):
    """Calls a function on the result so far and each row of numbers in turn.

    Args:
        function: Callable from a tensor and the numbers of a row to a tensor of the
            same shape and dtype.
        start: The initial tensor.
        rows: Non-empty list of rows, each a list of numbers.

    Returns:
        The last result.
    """
    if _BACKEND == "torch" or not _is_traced(start):
        for row in rows:
            start = function(start, *row)
        return start
    # XLA compiles the body of a loop once.
    table = ops.convert_to_tensor(rows, start.dtype)

    def call(i, result):
        return function(result, *ops.unstack(table[i], len(rows[0])))

    return ops.fori_loop(0, len(rows), call, start)


def _is_traced(tensor):
    if _BACKEND == "jax":
        import jax

        return isinstance(tensor, jax.core.Tracer)
    import tensorflow as tf

    return not tf.executing_eagerly()


def concrete_value(tensor, read=ops.convert_to_numpy):
    """Returns `read(tensor)`, or `None` while a program is traced."""
    if is_compiling():  # Reading a value would break the graph.
        return None
    try:
        return read(tensor)
    except (AttributeError, NotImplementedError, TypeError, RuntimeError):
        return None


def eagerly():
    """Returns a context that runs code eagerly while a program is traced."""
    if _BACKEND == "jax":
        import jax

        return jax.ensure_compile_time_eval()
    if _BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    return contextlib.nullcontext()
