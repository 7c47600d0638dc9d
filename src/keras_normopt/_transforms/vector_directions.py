"""The directions of entries and rows."""

import math
import reprlib

from keras import ops

from keras_normopt._transforms.direction import (
    RMS,
    Direction,
    checked_scale,
    unit_vectors,
)


class Sign(Direction):
    """The sign of each entry: u ← scale · sign(u).

    This is steepest descent in the max norm. Applied to the momentum, it is Signum.
    Entries with magnitudes below `norm_epsilon` are divided by `norm_epsilon` instead,
    and zeros stay zeros.

    Args:
        scale: The magnitude of each entry. `None`: 1. `"match_rms_adamw"`: .2, about as
            in a step of AdamW. `"operator"`: 1 / inputs for a kernel, else 1 (arXiv
            2502.07529). Defaults to `None`.

    Raises:
        ValueError: If an argument is not as above.

    Example:
        >>> import keras_normopt
        >>> keras_normopt.NormalizedSGD(
        ...     0.001, momentum=0.9, apply_to="update", direction="sign"
        ... ).direction
        Sign(scale=None)

    References:
        - [Bernstein et al., 2018, signSGD: Compressed Optimisation for Non-Convex
          Problems](https://arxiv.org/abs/1802.04434)
    """

    __module__ = "keras_normopt.directions"
    name = "sign"
    unit = "entries"

    def __init__(self, scale: str | None = None) -> None:
        self.scale = checked_scale(scale, ("match_rms_adamw", "operator"))

    def get_config(self):
        """Returns the arguments, by name."""
        return {"scale": self.scale}

    @property
    def uses_axes(self):
        return self.scale == "operator"

    def is_by_row(self, axes):
        # The length of a kernel's entries depends on the number of all rows.
        return axes.role != "kernel" or self.scale != "operator"

    def point(self, stack, axes, floor, factor):
        is_small = ops.abs(stack) < floor
        # Keeps NaN, whose sign is 0 on PyTorch.
        sign = ops.where(ops.equal(stack, stack), ops.sign(stack), stack)
        # Large entries are left out, or checks for infinities would abort.
        small = ops.where(is_small, stack, ops.zeros_like(stack)) / floor
        signs = ops.where(is_small, small, sign)
        return signs * (self.length(axes, stack.shape[1:]) * factor)

    def length(self, axes, shape):
        if self.scale == "operator":
            inputs = axes.sizes(shape)[1] if axes.role == "kernel" else 1
            return 1 / max(inputs, 1)
        return RMS if self.scale else 1.0


class Rows(Direction):
    """The rows of a matrix, scaled to equal length: u ← scale · u / ‖u‖₂.

    A row of an embedding belongs to one token. A row of a kernel has the weights of one
    output unit, as in the layout (out, in) of PyTorch. A vector is a single row. A row
    whose largest entry is below `norm_epsilon` is shorter in proportion, and zeros stay
    zeros.

    Args:
        scale: The length of a row of n entries. `None`: 1. `"match_rms_adamw"`: .2 √n,
            so its root mean square is .2. `"operator"` (arXiv 2502.07529): 1 / √n over
            the inputs of a kernel, else √n, so the root mean square is 1. Defaults to
            `None`.
        over: The axes of a row: `"inputs"` or `"outputs"` of the layer; or `"auto"`,
            the outputs for an embedding and the inputs for a kernel. Defaults to
            `"auto"`.

    Raises:
        ValueError: If an argument is not as above.

    Example:
        >>> import keras_normopt
        >>> from keras_normopt import directions
        >>> rows = directions.Rows("match_rms_adamw")
        >>> direction = {"embeddings": rows, ".*": None}
        >>> keras_normopt.NormalizedAdam(direction=direction).direction["embeddings"]
        Rows(scale='match_rms_adamw', over='auto')

    References:
        - [Pethick et al., 2025, Training Deep Learning Models with Norm-Constrained
          LMOs](https://arxiv.org/abs/2502.07529)
    """

    __module__ = "keras_normopt.directions"
    name = "rows"
    unit = "rows"

    def __init__(self, scale: str | None = None, over: str = "auto") -> None:
        self.scale = checked_scale(scale, ("match_rms_adamw", "operator"))
        if over not in ("auto", "inputs", "outputs"):
            raise ValueError(
                "`over` must be 'auto', 'inputs' or 'outputs'. "
                f"Received: over={reprlib.repr(over)}"
            )
        self.over = over

    def get_config(self):
        """Returns the arguments, by name."""
        return {"scale": self.scale, "over": self.over}

    def is_by_row(self, axes):
        return axes.role == "embedding" and self.over != "inputs"

    def point(self, stack, axes, floor, factor):
        shape = stack.shape[1:]
        over = tuple([i + 1 for i in self._axes(axes, len(shape))])
        unit, shrinkage = unit_vectors(stack, over, floor)
        length = self.length(axes, shape) * factor
        return unit * (shrinkage * length)

    def _axes(self, axes, rank):
        """Returns the axes of a row."""
        if axes.role == "vector":
            return tuple(range(rank))
        over = self.over
        if over == "auto":
            over = "outputs" if axes.role == "embedding" else "inputs"
        return getattr(axes, over)

    def length(self, axes, shape):
        entries = math.prod([shape[i] for i in self._axes(axes, len(shape))])
        if self.scale == "match_rms_adamw":
            return RMS * math.sqrt(entries)
        if self.scale == "operator":
            is_unit = axes.role == "kernel" and self.over != "outputs"
            return 1 / math.sqrt(entries) if is_unit else math.sqrt(entries)
        return 1.0
