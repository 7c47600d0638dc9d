"""Computes norms that are accurate at any magnitude.

A definition such as √Σg² overflows or underflows long before its exact result does
(float32: beyond 1e19 and below 1e-23). Norms are homogeneous, so
norm(g) = norm(c · g) / c. The right side is computed only if the plain result is
outside its safe range.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_normopt._backend.devices import to_device_of
from keras_normopt._backend.tensors import constant_like, dtype_of, join, pack
from keras_normopt._backend.tracing import concrete_value, cond
from keras_normopt.norms._norm import Norm
from keras_normopt.norms._reductions import Reductions, reductions_of


def built_in(*, squares=False, leaves_range=True):
    """Turns a definition for ordinary magnitudes into a public norm.

    Args:
        squares: Whether the definition squares entries, and so underflows before the
            exact result does. Higher powers are not allowed, because one factor could
            not span their range.
        leaves_range: Whether the definition can overflow or underflow before the exact
            result does.
    """

    def decorate(definition: Callable[[Reductions], Any]) -> Any:
        def norm(gradient: Any) -> Any:
            block = reductions_of([ops.convert_to_tensor(gradient)])
            (value,) = result.measure([block])
            return ops.reshape(value, ())

        norm.__name__ = norm.__qualname__ = definition.__name__
        norm.__doc__, norm.__module__ = definition.__doc__, "keras_normopt.norms"
        result = BuiltIn(norm, definition, squares, leaves_range)
        norm.norm = result  # type: ignore[attr-defined]
        return norm

    return decorate


class BuiltIn(Norm):
    """A built-in norm."""

    takes_stacks = True

    def __init__(self, function, definition, squares, leaves_range):
        super().__init__(function)
        self._definition = definition
        self._squares, self._leaves_range = squares, leaves_range

    def measure(self, blocks, divisor=None):
        values = self._norms_of(blocks)
        if divisor is None:
            return values
        # A negative learning rate reverses updates. Their norm stays positive.
        return [
            v / to_device_of(ops.cast(ops.abs(divisor), dtype_of(v)), v) for v in values
        ]

    def _norms_of(self, blocks):
        plain = [self._plain(block) for block in blocks]
        stacked = [block.stacked for block in blocks]
        if not self._leaves_range:
            return pack(plain, stacked)
        # Above the highest floor, the results of all blocks are accurate.
        floor = max(map(self._floor, blocks))
        joined = join(plain)
        safe = _is_safe(joined, floor)

        def rescale():
            # Rescales each block alone, so that one zero gradient does not slow down
            # all blocks.
            rows = zip(blocks, plain, _safe_flags(safe, plain), strict=True)
            norms = [self._rescale_if_unsafe(*row, floor) for row in rows]
            return pack(norms, stacked)

        # Packs inside the branches, because XLA compiles that faster.
        return cond(ops.all(safe), lambda: pack(plain, stacked, joined), rescale)

    def _plain(self, block):
        if not block.size:
            return ops.zeros(block.shape, dtype=block.dtype)
        return self._definition(block)

    def _floor(self, block):
        """Returns the smallest plain result that is accurate to rounding.

        Underflow takes up to the smallest normal number from each of N squares. This
        loss must be negligible compared to the square of the result.
        """
        if not self._squares:
            return 0.0
        limits = np.finfo(block.dtype)
        return float(np.sqrt(block.size * limits.tiny / (8 * limits.eps)))

    def _rescale_if_unsafe(self, block, plain, flags, floor):
        """Returns the norms of a block, computed at another scale if necessary.

        The scale keeps even safe results in range. A compiler may compute this for all
        blocks, and the derivative of the unused branch must be finite.
        """
        if not block.size:
            return plain

        def rescaled():
            exponent = np.finfo(block.dtype).maxexp
            up, down = 2.0 ** (exponent * 25 // 32), 2.0 ** -(exponent * 5 // 8)
            is_small = plain < floor
            is_large = ops.logical_not(plain <= _largest(plain))  # Also true for NaN.
            scale = ops.where(
                is_large, constant_like(plain, down), ops.ones_like(plain)
            )
            scale = ops.where(is_small, constant_like(plain, up), scale)
            return (
                self._definition(block.scaled({up: is_small, down: is_large})) / scale
            )

        if flags is None:
            is_safe = ops.all(_is_safe(plain, floor))
            (norms,) = cond(is_safe, lambda: [plain], lambda: [rescaled()])
            return norms
        if not flags.all():  # Zeros need no rescaling, and are quick to find.
            flags = flags | concrete_value(block.max_abs() == 0).ravel()
        return plain if flags.all() else rescaled()


def _safe_flags(safe, plain):
    """Returns which results of each block are safe. `None` while traced."""
    flags = concrete_value(safe)
    if flags is None:
        return [None] * len(plain)
    # Reads all flags at once, because each read is slow on PyTorch.
    result, start = [None] * len(plain), 0
    for i in sorted(range(len(plain)), key=lambda i: bool(len(plain[i].shape))):
        end = start + math.prod(plain[i].shape)
        result[i], start = flags[start:end], end
    return result


def _is_safe(values, floor):
    # An overflow may cause NaN, for which both comparisons are false.
    return (values >= floor) & (values <= _largest(values))


def _largest(tensor):
    return float(np.finfo(dtype_of(tensor)).max)
