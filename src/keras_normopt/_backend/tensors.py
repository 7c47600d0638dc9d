"""Casts, divides and packs tensors, where `keras.ops` alone is inexact or slow."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_normopt._backend.devices import near
from keras_normopt._backend.tracing import concrete_value, is_compiling

_BACKEND = keras.backend.backend()

if _BACKEND == "torch":
    import torch


def dtype_of(tensor):
    """Returns the name of a tensor's dtype."""
    return keras.backend.standardize_dtype(tensor.dtype)


def cast(tensor, dtype):
    """Casts a tensor. PyTorch is slow to notice that a cast changes nothing."""
    return tensor if dtype_of(tensor) == dtype else ops.cast(tensor, dtype)


def constant_like(tensor, value):
    """Converts a number to the dtype of a tensor. Keras alone would use float32."""
    return ops.convert_to_tensor(value, dtype=dtype_of(tensor))


def widen(tensors):
    """Casts tensors to one dtype that is wide enough for norms.

    This is float64 if any tensor has it, and float32 otherwise.
    """
    dtypes = {dtype_of(t) for t in tensors}
    dtype = "float64" if "float64" in dtypes else "float32"
    return [cast(t, dtype) for t in tensors]


def safe_sqrt(squares):
    """Returns the square root. Its derivative at 0 is 0, and not infinite."""
    is_zero = ops.equal(squares, 0)
    one = ops.ones_like(squares)
    return ops.where(is_zero, squares, ops.sqrt(ops.where(is_zero, one, squares)))


def divide(values, divisor, moves=None):
    """Divides in the dtype of the divisor, and casts back.

    Args:
        values: Tensor.
        divisor: Tensor that broadcasts against `values`, not 0.
        moves: Scalar boolean tensor. If it is false, the quotient is 0. PyTorch ignores
            it, and uses `stop` instead.
    """
    dtype = dtype_of(values)
    wide = cast(values, dtype_of(divisor))
    divisor = near(divisor, wide)
    if _BACKEND != "torch":
        # XLA multiplies by the reciprocal of a scalar. The reciprocal of the largest
        # numbers is subnormal, and XLA flushes it to 0.
        exponent = np.finfo(dtype_of(divisor)).maxexp
        scale = 2.0 ** (exponent // 2 - 1)
        one, small = constant_like(divisor, 1), constant_like(divisor, 1 / scale)
        factor = ops.where(divisor > scale, small, one)
        if _BACKEND == "jax":  # The derivative contains the divisor's square.
            factor = ops.where(
                divisor < 1 / scale, constant_like(divisor, scale), factor
            )
        divisor = divisor * factor
        if moves is not None:
            moves = near(moves, wide)
            factor = ops.where(moves, factor, ops.zeros_like(factor))
        wide = wide * factor
    return cast(wide / divisor, dtype)


def stop(divisors, moves):
    """Makes divisors infinite on PyTorch if a scalar boolean tensor is false.

    Multiplying the quotients by 0 would take another pass over all gradients.
    """
    if _BACKEND != "torch" or moves is None:
        return divisors
    return [ops.where(moves, d, constant_like(d, float("inf"))) for d in divisors]


def pack(parts, stacked, joined=None):
    """Packs the norms of groups of blocks in the way that suits the backend.

    PyTorch gets one vector, because each call takes long. The other backends get one
    tensor for each block. XLA takes up to twice as long to compile a program that
    takes stacks apart later.

    Args:
        parts: List with one tensor for each group.
        stacked: For each group, whether the first axis of the tensor counts blocks.
        joined: What `join` returns for the parts, if that is known.

    Returns:
        List of tensors.
    """
    if _BACKEND == "torch":
        return [join(parts) if joined is None else joined]
    return unstack(parts, stacked)


def unstack(parts, stacked):
    """Returns a list with one tensor for each block: see `pack`."""
    result: list[Any] = []
    for part, is_stack in zip(parts, stacked, strict=True):
        result += ops.unstack(part, part.shape[0]) if is_stack else [part]
    return result


def join(tensors):
    """Joins tensors in one vector: the scalars first, then the other tensors."""
    if not tensors:
        return ops.zeros((0,))
    tensors = [near(tensor, tensors[0]) for tensor in tensors]
    # A `TensorShape` of TensorFlow is true even if it is empty.
    scalars = [t for t in tensors if not len(t.shape)]
    vectors = [
        t if len(t.shape) == 1 else ops.reshape(t, (-1,))
        for t in tensors
        if len(t.shape)
    ]
    if scalars:
        vectors.insert(0, ops.stack(Leaf(scalars)))
    return vectors[0] if len(vectors) == 1 else ops.concatenate(vectors)


def split(vector, shapes):
    """Returns the list of tensors of these shapes that `join` joined."""
    start = sum(not shape for shape in shapes)
    scalars = iter(ops.unstack(vector[:start], start) if start else [])
    result = []
    for shape in shapes:
        if not shape:
            result.append(next(scalars))
            continue
        part = vector[start : start + math.prod(shape)]
        start += math.prod(shape)
        result.append(ops.reshape(part, shape) if len(shape) > 1 else part)
    return result


def l2_norms_at_once(tensors):
    """Returns the l2 norms of dense tensors on PyTorch, in a few calls for all.

    Args:
        tensors: List of tensors of one floating-point dtype that is wide enough.

    Returns:
        Vector, or `None` without tensors, on other backends, or while traced.
    """
    if _BACKEND != "torch" or is_compiling() or not tensors:
        return None
    device = tensors[0].device
    norms = [norm.to(device) for norm in torch._foreach_norm(tensors)]
    values = concrete_value(torch.stack(norms), lambda vector: vector.tolist())
    if values is None:
        return None
    limits = torch.finfo(tensors[0].dtype)
    for i, (tensor, value) in enumerate(zip(tensors, values, strict=True)):
        # Squares of the entries may have overflowed, or have lost digits.
        least = math.sqrt(tensor.numel() * limits.tiny / (8 * limits.eps))
        if least <= value <= limits.max or not tensor.numel():
            continue
        largest = tensor.abs().max()
        if 0 < largest.item() < math.inf:
            norms[i] = ((tensor / largest).norm() * largest).to(device)
    return torch.stack(norms)


def transposed(matrices):
    """Exchanges the last two axes."""
    if _BACKEND == "tensorflow":
        return ops.swapaxes(matrices, -1, -2)
    return matrices.mT  # PyTorch takes some times as long for `keras.ops`.


class Leaf(list):
    """A list that Keras does not search for symbolic tensors. The search is slow."""
