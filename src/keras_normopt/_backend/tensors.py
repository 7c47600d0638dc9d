"""Casts, divides and packs tensors where `keras.ops` alone is inexact or slow."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_normopt._backend.devices import to_device_of
from keras_normopt._backend.tracing import concrete_value, is_compiling

_BACKEND = keras.backend.backend()

if _BACKEND == "torch":
    import torch


def dtype_of(tensor):
    """Returns the name of a tensor's dtype."""
    return keras.backend.standardize_dtype(tensor.dtype)


def cast(tensor, dtype):
    """Casts a tensor if needed. On PyTorch, a cast to an equal dtype is slow."""
    return tensor if dtype_of(tensor) == dtype else ops.cast(tensor, dtype)


def constant_like(tensor, value):
    """Converts a number to the dtype of a tensor. Keras alone would use float32."""
    return ops.convert_to_tensor(value, dtype=dtype_of(tensor))


def widen(tensors):
    """Casts tensors to one dtype that is wide enough for norms.

    The dtype is float64 if any tensor is float64, else float32.
    """
    dtypes = {dtype_of(t) for t in tensors}
    dtype = "float64" if "float64" in dtypes else "float32"
    return [cast(t, dtype) for t in tensors]


def safe_sqrt(squares):
    """Returns the square root. Its derivative at 0 is 0, not infinite."""
    is_zero = ops.equal(squares, 0)
    one = ops.ones_like(squares)
    return ops.where(is_zero, squares, ops.sqrt(ops.where(is_zero, one, squares)))


def divide(values, divisor, keep=None):
    """Divides in the dtype of the divisor, and casts the quotient back.

    Args:
        values: Tensor.
        divisor: Tensor that broadcasts against `values`, not 0.
        keep: Scalar boolean tensor. If it is false, the quotient is 0. PyTorch ignores
            `keep`: use `mask_divisors`.
    """
    dtype = dtype_of(values)
    wide = cast(values, dtype_of(divisor))
    divisor = to_device_of(divisor, wide)
    if _BACKEND != "torch":
        # XLA multiplies by the reciprocal of a scalar. It flushes the subnormal
        # reciprocals of the largest numbers to 0.
        exponent = np.finfo(dtype_of(divisor)).maxexp
        scale = 2.0 ** (exponent // 2 - 1)
        one, small = constant_like(divisor, 1), constant_like(divisor, 1 / scale)
        factor = ops.where(divisor > scale, small, one)
        if _BACKEND == "jax":  # The derivative contains the divisor's square.
            factor = ops.where(
                divisor < 1 / scale, constant_like(divisor, scale), factor
            )
        divisor = divisor * factor
        if keep is not None:
            keep = to_device_of(keep, wide)
            factor = ops.where(keep, factor, ops.zeros_like(factor))
        wide = wide * factor
    return cast(wide / divisor, dtype)


def mask_divisors(divisors, keep):
    """Makes divisors infinite on PyTorch if the scalar boolean `keep` is false.

    Multiplying the quotients by 0 would take another pass over all gradients.
    """
    if _BACKEND != "torch" or keep is None:
        return divisors
    return [ops.where(keep, d, constant_like(d, float("inf"))) for d in divisors]


def pack(parts, stacked, joined=None):
    """Packs the norms of groups of blocks in the form that is fast on the backend.

    PyTorch gets one vector, because each call is slow. The other backends get one
    tensor for each block. XLA takes up to twice as long to compile a program that
    unstacks them later.

    Args:
        parts: List with one tensor for each group.
        stacked: For each group, whether the first axis of its tensor counts blocks.
        joined: The result of `join(parts)`, or `None` to compute it.

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
    """Joins tensors into one vector, scalars first."""
    if not tensors:
        return ops.zeros((0,))
    tensors = [to_device_of(tensor, tensors[0]) for tensor in tensors]
    # Even an empty `TensorShape` of TensorFlow is true.
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
    """Splits a vector from `join` into tensors of these shapes."""
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
    """Computes the l2 norms of all tensors in a few calls, on PyTorch.

    Args:
        tensors: List of dense tensors of one floating-point dtype, as from `widen`.

    Returns:
        Vector. `None` on other backends, while traced, or without tensors.
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
        # Squares of entries may have overflowed or lost digits.
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
    return matrices.mT  # `keras.ops` is several times slower.


class Leaf(list):
    """A list that Keras does not search for symbolic tensors. The search is slow."""
