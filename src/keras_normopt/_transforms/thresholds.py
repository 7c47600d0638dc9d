"""Computes the limits of norms for a clipping optimizer."""

import math
import numbers
import reprlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_normopt._backend.devices import constant_on_device_of, to_device_of
from keras_normopt._backend.tensors import cast, constant_like, join
from keras_normopt._backend.tracing import cond
from keras_normopt._transforms import config
from keras_normopt._transforms.config import Configured, checked_float, is_real
from keras_normopt._transforms.rescale import NO_LIMIT
from keras_normopt._transforms.step_sizes import WeightNorm

_ON_TORCH = keras.backend.backend() == "torch"


class RunningNorm(Configured):
    """A limit for each block from the running mean of its norm, to cut off spikes.

    For a block's gradient g with norm n, and the running mean γ of n:

        g ← g · min(1, factor · γ / n)
        γ ← decay · γ + (1 − decay) · min(n, factor · γ)

    The first `warmup` norms of a block are not clipped, and γ is their mean. Norms that
    are 0, infinite or NaN are skipped, so γ neither collapses to 0 nor becomes NaN.
    Each block of the optimizer's `scope` has one γ in float32. With `scope="unit"`,
    each unit has one. γ is part of the optimizer's state, so it is saved. It is the
    same on all replicas. An accumulated gradient counts once. A step that a
    `LossScaleOptimizer` skips leaves γ unchanged.

    Clipped norms let γ grow at most by the factor `1 + (1 − decay) · (factor − 1)` in a
    step, .1 % with the defaults. If gradients of a healthy run grow faster, use a
    larger `factor`.

    Args:
        factor: Float, at least 1 and finite: the largest ratio of a norm to its mean.
            Defaults to 1.05.
        decay: Float, at least 0 and below 1, for the running mean. Defaults to 0.98.
        warmup: Integer, at least 1, the number of optimizer steps without clipping.
            Defaults to 100.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import keras_normopt
        >>> threshold = keras_normopt.RunningNorm(factor=1.5, warmup=20)
        >>> keras_normopt.ClippedAdam(max_norm=threshold)
        ClippedAdam(max_norm=RunningNorm(factor=1.5, warmup=20))

    References:
        - [Wang et al., 2025, AdaGC: Improving Training Stability for Large Language
          Model Pretraining](https://arxiv.org/abs/2502.11034), which clips by a
          constant during the warm-up, as the base optimizer's `global_clipnorm` does
        - [Seetharaman et al., 2020, AutoClip: Adaptive Gradient Clipping for Source
          Separation Networks](https://arxiv.org/abs/2007.14469), which uses a
          percentile of all norms so far
    """

    __module__ = "keras_normopt"  # For pickles.
    name = "running_norm"
    warmup: int

    def __init__(
        self, factor: float = 1.05, decay: float = 0.98, warmup: int = 100
    ) -> None:
        self.factor = checked_float(factor, "factor", at_least=1)
        self.decay = checked_float(decay, "decay", at_least=0, below=1)
        if (
            not isinstance(warmup, numbers.Integral)
            or isinstance(warmup, bool)
            or not 1 <= warmup < 2**24
        ):
            raise ValueError(
                "`warmup` must be an integer from 1 to 2**24 - 1. "
                f"Received: warmup={reprlib.repr(warmup)}"
            )
        self.warmup = int(warmup)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, by name."""
        return {"factor": self.factor, "decay": self.decay, "warmup": self.warmup}

    def add_limit_variables(self, add_variable, shapes):
        """Adds the running means of all blocks, and the counts of their norms.

        Args:
            add_variable: Callable like `add_variable` of an optimizer.
            shapes: List of the shapes of the blocks' norms.

        Returns:
            A tuple: the two variables, a dict from the index of each block to the
            position of its first norm in the variables, and `shapes`.
        """
        numbers = range(len(shapes))
        # `join` puts scalars first, so saved files have this order.
        order = sorted(numbers, key=lambda number: bool(shapes[number]))
        offsets = _offsets(order, shapes)
        shape = (sum(map(math.prod, shapes)),)
        means = add_variable("running_norm", shape=shape, dtype="float32")
        counts = add_variable("running_norm_count", shape=shape, dtype="float32")
        return means, counts, offsets, shapes

    def limits(self, gradients, norm, state):
        """Updates the running means, and returns the limits of one step, packed.

        Args:
            gradients: The `Gradients`.
            norm: The `Norm`.
            state: The result of `add_limit_variables`.
        """
        *variables, offsets, shapes = state
        means, counts = map(ops.convert_to_tensor, variables)
        values = to_device_of(cast(join(gradients.norms(norm)), "float32"), means)
        step_offsets = _offsets(gradients.numbers, shapes)
        has_all_blocks = step_offsets == offsets  # Avoids two copies of many norms.
        if not has_all_blocks:
            # A block without a gradient is skipped like a norm of 0.
            padded = ops.append(values, ops.zeros_like(means[:1]))
            absent = values.shape[0]
            sources = {number: step_offsets.get(number, absent) for number in offsets}
            indices = ops.minimum(_indices(sources, shapes, means), absent)
            values = ops.take(padded, indices)
        is_warm = counts >= self.warmup
        limits = ops.where(is_warm, means * self.factor, NO_LIMIT)
        counted = (values > 0) & (values <= NO_LIMIT)  # False for NaN.
        weight = ops.where(is_warm, 1.0 - self.decay, 1.0 / (counts + 1.0))
        clipped = ops.minimum(values, limits)
        change = (ops.where(counted, clipped, means) - means) * weight
        variables[0].assign(means + change)
        variables[1].assign(counts + ops.cast(counted, "float32"))
        if not has_all_blocks:
            targets = {number: offsets[number] for number in gradients.numbers}
            limits = ops.take(limits, _indices(targets, shapes, means))
        if _ON_TORCH:  # A branch would wait for the device.
            return gradients.from_vector(limits)
        # XLA compiles this twice as fast if a branch splits the vector.
        return cond(
            ops.any(limits < NO_LIMIT),
            lambda: gradients.from_vector(limits),
            lambda: gradients.from_vector(ops.full_like(limits, NO_LIMIT)),
        )


def _offsets(numbers, shapes):
    """Returns a dict from the index of each block to the position of its first norm.

    Args:
        numbers: Indices of blocks. The norms of the blocks are joined in this order.
        shapes: List of the shapes of all blocks' norms.
    """
    offsets: dict[int, int] = {}
    start = 0
    for number in numbers:
        offsets[number] = start
        start += math.prod(shapes[number])
    return offsets


def _indices(offsets, shapes, other):
    """Returns the positions of all norms of some blocks, as a vector of integers.

    Args:
        offsets: Dict from the indices of the blocks to the positions of their first
            norms. Blocks with a scalar norm come first.
        shapes: List of the shapes of the blocks' norms.
        other: Tensor. The result is on its device.
    """
    scalars = [offset for number, offset in offsets.items() if not shapes[number]]
    parts = [constant_on_device_of(scalars, "int32", other)]
    # Uses `arange`, because a list would have one entry for each unit.
    parts += [
        constant_on_device_of([offset], "int32", other) + ops.arange(shapes[number][0])
        for number, offset in offsets.items()
        if shapes[number]
    ]
    return ops.concatenate(parts) if len(parts) > 1 else parts[0]


class _Constant:
    """The same limit for all norms, from a float in `max_norm`."""

    def __init__(self, value):
        self._value = value

    def add_limit_variables(self, add_variable, shapes):
        """Adds a variable, so that compiled steps see the limit change."""
        return add_variable("max_norm", value=self._value)

    def limits(self, gradients, norm, state):
        """Returns the limits of the norms of one step, packed."""
        return [ops.convert_to_tensor(state)] * len(gradients.norms(norm))


class _Scheduled:
    """The same limit for all norms, from a schedule.

    Args:
        schedule: A `LearningRateSchedule`.
        iterations: Callable that returns the number of steps so far.
    """

    def __init__(self, schedule, iterations):
        self._schedule, self._iterations = schedule, iterations

    def add_limit_variables(self, add_variable, shapes):
        """Adds no variables: optimizers count their steps."""

    def limits(self, gradients, norm, state):
        """Returns the limits of the norms of one step, packed."""
        limit = ops.cast(self._schedule(self._iterations()), "float32")
        # Avoids division by 0.
        smallest = constant_like(limit, np.finfo("float32").tiny)
        limit = ops.where(limit < smallest, smallest, limit)
        return [limit] * len(gradients.norms(norm))


_CLASSES = {cls.name: cls for cls in (WeightNorm, RunningNorm)}


def get(identifier: Any) -> Any:
    """Converts the argument `max_norm` to a float, a schedule or an object.

    Args:
        identifier: A float above 0, a `LearningRateSchedule`, a name, an object, or a
            result of `serialize`.

    Raises:
        ValueError: If `identifier` is none of these, or if the arguments of the object
            are invalid.
    """
    if is_real(identifier):
        return checked_float(identifier, "max_norm", above=0)
    found = config.schedule_of(identifier)
    if found is None:
        found = config.find_object(identifier, "max_norm", _CLASSES)
    if found is None:
        choices = ", ".join(map(repr, _CLASSES))
        raise ValueError(
            "`max_norm` must be a finite float above 0 in the range of float32, a "
            f"`LearningRateSchedule`, {choices}, or an object of "
            "`keras_normopt.WeightNorm` or `keras_normopt.RunningNorm`. "
            f"Received: max_norm={reprlib.repr(identifier)}"
        )
    return found


def serialize(max_norm: Any) -> Any:
    """Returns a JSON-compatible config. `get` makes an equal threshold from it."""
    if isinstance(max_norm, float):
        return max_norm
    if config.schedule_of(max_norm) is not None:
        return config.schedule_config(max_norm)
    return config.config_of(max_norm)


def threshold_of(max_norm, iterations):
    """Returns the object that computes the limits of each step.

    Args:
        max_norm: A result of `get`.
        iterations: Callable that returns the number of steps so far.
    """
    if isinstance(max_norm, float):
        return _Constant(max_norm)
    if config.schedule_of(max_norm) is not None:
        return _Scheduled(max_norm, iterations)
    return max_norm
