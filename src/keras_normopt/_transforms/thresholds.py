"""What a clipping optimizer clips at: a constant, or a length that follows something.

A block without a length to go by is left alone: its limit is `NO_LIMIT`.
"""

import math
import numbers
import reprlib
from typing import Any

import keras
from keras import ops

from keras_normopt._backend.devices import near
from keras_normopt._backend.tracing import choose
from keras_normopt._transforms import step_sizes
from keras_normopt._transforms.rescale import NO_LIMIT
from keras_normopt._transforms.step_sizes import Configured, WeightNorm, checked_float
from keras_normopt.norms._overflow import apart, join
from keras_normopt.norms._reductions import cast

_BACKEND = keras.backend.backend()


class RunningNorm(Configured):
    """Clips each block by a running mean of its own norm, so that spikes are cut.

    With the norm n of a block's gradient, and its running mean γ,

        g ← g · min(1, factor · γ / n)
        γ ← decay · γ + (1 − decay) · min(n, factor · γ)

    The first `warmup` norms of a block are not clipped by, and γ is their mean. A norm
    that is 0, infinite or NaN is not one of them, and leaves γ as it is: a path that is
    dead for a while does not shut itself, and no NaN stays. There is one γ for each
    block of the optimizer's `scope`, for `scope="unit"` one for each unit, in float32.
    γ is part of the optimizer's state: saved with it, counted once for all batches of
    an accumulated gradient, the same on all replicas, and untouched by a step that a
    `LossScaleOptimizer` leaves out.

    Norms that are clipped let γ grow by at most `1 + (1 − decay) · (factor − 1)` in a
    step, .1 % with the defaults. Where gradients of a healthy run grow faster than
    that, take a larger factor.

    Args:
        factor: Float, at least 1 and finite, how far above its mean a norm may be.
            Defaults to 1.05.
        decay: Float, at least 0 and below 1, of the running mean. Defaults to 0.98.
        warmup: Integer, at least 1, in steps of the optimizer. Defaults to 100.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import keras_normopt
        >>> optimizer = keras_normopt.ClippedAdam(
        ...     0.001, max_norm=keras_normopt.RunningNorm(factor=1.5, warmup=20)
        ... )

    References:
        - [Wang et al., 2025, AdaGC: Improving Training Stability for Large Language
          Model Pretraining](https://arxiv.org/abs/2502.11034), which clips by a
          constant during the warm-up, for which the base's `global_clipnorm` is there
        - [Seetharaman et al., 2020, AutoClip: Adaptive Gradient Clipping for Source
          Separation Networks](https://arxiv.org/abs/2007.14469), which takes a
          percentile of all norms so far
    """

    __module__ = "keras_normopt"  # For pickles.
    name = "running_norm"

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
                "`warmup` must be an integer of at least 1, below 2**24. "
                f"Received: warmup={reprlib.repr(warmup)}"
            )
        self.warmup = int(warmup)

    def get_config(self) -> dict[str, Any]:
        """The arguments, by name."""
        return {"factor": self.factor, "decay": self.decay, "warmup": self.warmup}


class RunningNorms:
    """The running means of all blocks, as variables of an optimizer.

    Args:
        threshold: The `RunningNorm`.
        shapes: List of the shapes of the blocks' norms.
        add_variable: Callable like `add_variable` of an optimizer.
    """

    def __init__(self, threshold, shapes, add_variable):
        self._threshold, self._shapes = threshold, shapes
        length = (sum(math.prod(shape) for shape in shapes),)
        self._means = add_variable("running_norm", shape=length, dtype="float32")
        self._counts = add_variable("running_norm_count", shape=length, dtype="float32")

    def limits(self, norms, numbers):
        """Takes in the norms of one step.

        Args:
            norms: List of the norms of blocks.
            numbers: List of the numbers of these blocks.

        Returns:
            List of what the norms may be at most.
        """
        # In one vector: on PyTorch each call takes long, however small its tensor is. A
        # block that has no gradient in this step counts as little as one of norm 0.
        given = dict(zip(numbers, norms, strict=True))
        values = [
            given[i] if i in given else ops.zeros(shape)
            for i, shape in enumerate(self._shapes)
        ]
        vector = join(values)
        means, counts = map(ops.convert_to_tensor, (self._means, self._counts))
        limits = self._take_in(near(cast(vector, "float32"), means), means, counts)
        limits = cast(limits, keras.backend.standardize_dtype(vector.dtype))
        every = self._apart(limits)
        return [every[number] for number in numbers]

    def _apart(self, limits):
        if _BACKEND == "torch":
            return apart(limits, self._shapes)
        # Compilers are quick over what leaves a branch, and slow over the same taken
        # apart in the midst of a program: that takes them twice as long.
        return choose(
            ops.any(limits < NO_LIMIT),
            lambda: apart(limits, self._shapes),
            lambda: [ops.full(shape, NO_LIMIT, limits.dtype) for shape in self._shapes],
        )

    def _take_in(self, norms, means, counts):
        is_warm = counts >= self._threshold.warmup
        limits = ops.where(is_warm, means * self._threshold.factor, NO_LIMIT)
        counted = (norms > 0) & (norms <= NO_LIMIT)  # False of NaN.
        clipped = ops.minimum(norms, limits)
        weight = ops.where(is_warm, 1.0 - self._threshold.decay, 1.0 / (counts + 1.0))
        change = (ops.where(counted, clipped, means) - means) * weight
        self._means.assign(means + change)
        self._counts.assign(counts + ops.cast(counted, "float32"))
        return limits


_CLASSES = {cls.name: cls for cls in (WeightNorm, RunningNorm)}


def get(identifier: Any) -> Any:
    """Finds what `max_norm=` stands for.

    Args:
        identifier: A float above 0, a name, an object, or what `serialize` made of one.

    Raises:
        ValueError: If it is none of these, or its arguments are wrong.
    """
    if isinstance(identifier, numbers.Real) and not isinstance(identifier, bool):
        if 0 < float(identifier) <= NO_LIMIT:
            return float(identifier)
    elif identifier is not None:
        found = step_sizes.find(identifier, "max_norm", _CLASSES)
        if found is not None:
            return found
    raise ValueError(
        "`max_norm` must be a finite float above 0, within float32, "
        f"{', '.join(map(repr, _CLASSES))}, or an object of `keras_normopt.WeightNorm` "
        f"or `keras_normopt.RunningNorm`. Received: max_norm={reprlib.repr(identifier)}"
    )


def serialize(max_norm: Any) -> Any:
    """What `get` makes the same threshold of, in types that JSON has."""
    return max_norm if isinstance(max_norm, float) else step_sizes.serialize(max_norm)
