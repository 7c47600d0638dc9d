"""Multiplies the learning rate of each block, or variable, by a factor."""

import numbers
import reprlib
from typing import Any

from keras import ops

from keras_normopt import norms
from keras_normopt._backend import sparse
from keras_normopt._transforms.rescale import NO_LIMIT
from keras_normopt.norms._overflow import quotient
from keras_normopt.norms._reductions import like


class Configured:
    """An object that shows the arguments that it was made with, and keeps them."""

    def __setattr__(self, name, value):
        # Compiled steps would not see the change.
        if name in vars(self):
            raise AttributeError(
                f"`{name}` of {type(self).__name__} is fixed when it is made. "
                f"Received: {name}={reprlib.repr(value)}. Make a new object, and a new "
                "optimizer with it."
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.get_config().items())
        return f"{type(self).__name__}({arguments})"

    def get_config(self) -> dict[str, Any]:
        """The arguments, by name."""
        raise NotImplementedError


class WeightNorm(Configured):
    """A length that follows the weights: coefficient · max(‖w‖, minimum) of each block.

    The blocks are those of the optimizer's `scope`.

    As `step_size` of a normalized optimizer it multiplies the step, with the l2 norm of
    the weights. With `NormalizedSGD`, `norm="l2"` and no momentum a step has the length
    lr · coefficient · ‖w‖, a fraction of the weights' size; with `scope="layer"` that
    is LARS. Adam's step on N entries has a length of about √N itself, so that the
    fraction grows with N, unless it is the update that is normalized: with
    `NormalizedAdam(apply_to="update")` it is LAMB.

    As `max_norm` of a clipping optimizer it is the largest norm that a gradient may
    keep, with the optimizer's norm of the weights. With `scope="unit"` that is adaptive
    gradient clipping (AGC).

    Where the length is 0 there is none to go by: the step is multiplied by 1, the
    gradient is not clipped. Weights that start at 0 are small next, and would be held
    back from then on: a `minimum` lets them go.

    Args:
        coefficient: Float, above 0 and finite. Defaults to 1.0.
        minimum: Float, at least 0 and finite, what the norm of the weights counts as at
            least. For AGC 0.001 is published. Defaults to 0.0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import keras_normopt
        >>> from keras_normopt import WeightNorm
        >>> lars = keras_normopt.NormalizedSGD(
        ...     0.1, scope="layer", step_size=WeightNorm(coefficient=0.01)
        ... )
        >>> agc = keras_normopt.ClippedSGD(
        ...     0.1, scope="unit", max_norm=WeightNorm(0.01, minimum=0.001)
        ... )

    References:
        - [You et al., 2017, Large Batch Training of Convolutional
          Networks](https://arxiv.org/abs/1708.03888), LARS
        - [You et al., 2020, Large Batch Optimization for Deep
          Learning](https://arxiv.org/abs/1904.00962), LAMB
        - [Brock et al., 2021, High-Performance Large-Scale Image Recognition Without
          Normalization](https://arxiv.org/abs/2102.06171), AGC
    """

    __module__ = "keras_normopt.step_sizes"  # For pickles.
    name = "weight_norm"

    def __init__(self, coefficient: float = 1.0, minimum: float = 0.0) -> None:
        self.coefficient = checked_float(coefficient, "coefficient", above=0)
        self.minimum = checked_float(minimum, "minimum", at_least=0)

    def get_config(self) -> dict[str, float]:
        """The arguments, by name."""
        return {"coefficient": self.coefficient, "minimum": self.minimum}

    def lengths(self, sizes):
        """The length that goes with each norm of weights."""
        if self.minimum:  # Not `ops.maximum`, which on PyTorch computes in float32.
            at_least = [like(size, self.minimum) for size in sizes]
            sizes = [
                ops.where(size < floor, floor, size)
                for size, floor in zip(sizes, at_least, strict=True)
            ]
        return [ops.multiply(size, like(size, self.coefficient)) for size in sizes]

    def limits(self, norms, sizes):
        """What norms of gradients may be at most, `NO_LIMIT` if there is no length.

        Args:
            norms: List of the norms.
            sizes: List of the norms of the weights, arranged alike.
        """
        return [
            ops.cast(ops.where(v == 0, like(v, NO_LIMIT), v), n.dtype)
            for v, n in zip(self.lengths(sizes), norms, strict=True)
        ]

    def add_variables(self, add_variable, index, variable, shape):
        """Adds the variables for one weight, the first of which is for its factor.

        Args:
            add_variable: Callable like `add_variable` of an optimizer.
            index: Number of the weight.
            variable: The weight.
            shape: Shape of the weight's norm, where each unit may have one.
        """
        return [
            add_variable(
                f"step_size_{index}", shape=shape, dtype="float32", initializer="ones"
            )
        ]

    def factors(self, step, kept):
        """The factor of each weight in a block, by its position.

        Args:
            step: The `Step`, with raw gradients.
            kept: List of what `add_variables` returned for each weight.
        """
        lengths = step.by_block(self.lengths(step.weight_norms(norms.l2)))
        result = {}
        for block, length in zip(step.blocks, lengths, strict=True):
            factor = ops.where(ops.equal(length, 0), ops.ones_like(length), length)
            result |= dict.fromkeys(block, factor)
        return result


class GradientCorrelation(Configured):
    """Multiplies the step of each variable by a factor that its gradients adapt.

    The factor m is 1 at first, and then

        m ← clip(m · (1 + rate · cos(g_t, g_{t−1})), minimum, maximum)

    with the cosine between successive raw gradients of the variable, 0 at the first
    step and where one of them is zero. It grows while gradients agree and shrinks when
    they turn. Schedules of the learning rate still act. On deterministic problems it
    finds its way from learning rates that are far too small. Under minibatch noise
    successive gradients hardly agree, near a minimum they turn, and the factor decays
    towards its minimum: choose a schedule there. It keeps a copy of the gradients.

    Args:
        rate: Float, above 0 and below 1. Defaults to 0.01.
        minimum: Float, above 0 and at most 1. Defaults to 0.01.
        maximum: Float, at least 1 and finite. Defaults to 100.0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import keras_normopt
        >>> from keras_normopt.step_sizes import GradientCorrelation
        >>> optimizer = keras_normopt.NormalizedSGD(
        ...     0.001, step_size=GradientCorrelation(rate=0.05)
        ... )
    """

    __module__ = "keras_normopt.step_sizes"
    name = "gradient_correlation"

    def __init__(
        self, rate: float = 0.01, minimum: float = 0.01, maximum: float = 100.0
    ) -> None:
        self.rate = checked_float(rate, "rate", above=0, below=1)
        self.minimum = checked_float(minimum, "minimum", above=0, up_to=1)
        self.maximum = checked_float(maximum, "maximum", at_least=1)

    def get_config(self) -> dict[str, float]:
        """The arguments, by name."""
        return {"rate": self.rate, "minimum": self.minimum, "maximum": self.maximum}

    def add_variables(self, add_variable, index, variable, shape):
        """Adds the variables for one weight: see `WeightNorm`."""
        return [
            add_variable(
                f"step_size_{index}", shape=(), dtype="float32", initializer="ones"
            ),
            add_variable(
                f"previous_gradient_{index}",
                shape=variable.shape,
                dtype=variable.dtype,
                layout=getattr(variable, "_layout", None),
            ),
        ]

    def factors(self, step, kept):
        """The factor of each weight in a block, by its position: see `WeightNorm`."""
        positions = [position for block in step.blocks for position in block]
        raw = [sparse.densify(step.gradients[i]) for i in positions]
        before = [ops.convert_to_tensor(kept[i][1]) for i in positions]
        # By their norms first: the product of two gradients may overflow or vanish.
        sizes = step.sizes(raw, norms.l2)
        sizes_before = step.sizes(before, norms.l2)
        result = {}
        for i, new, old, size, size_before in zip(
            positions, raw, before, sizes, sizes_before, strict=True
        ):
            unit, unit_before = _unit(new, size), _unit(old, size_before)
            cosine = ops.cast(ops.sum(ops.multiply(unit, unit_before)), "float32")
            factor, previous = kept[i]
            factor = ops.multiply(factor, 1 + self.rate * cosine)
            factor = ops.clip(factor, self.minimum, self.maximum)
            previous.assign(ops.cast(new, previous.dtype))
            result[i] = factor
        return result


def _unit(tensor, size):
    wide = ops.cast(tensor, size.dtype)
    return quotient(wide, ops.where(ops.equal(size, 0), ops.ones_like(size), size))


_CLASSES = {cls.name: cls for cls in (WeightNorm, GradientCorrelation)}


def get(identifier: Any) -> Any:
    """Finds what `step_size=` stands for.

    Args:
        identifier: `None`, a name, an instance, or what `serialize` made of one.

    Raises:
        ValueError: If it is none of these, or its arguments are wrong.
    """
    found = find(identifier, "step_size", _CLASSES)
    if found is None and identifier is not None:
        raise ValueError(
            f"`step_size` must be None, {', '.join(map(repr, _CLASSES))}, or an object "
            "of `keras_normopt.step_sizes`. "
            f"Received: step_size={reprlib.repr(identifier)}"
        )
    return found


def find(identifier, argument, classes):
    """The object that an argument stands for, or `None` if it stands for none.

    Args:
        identifier: An object, a name, or what `serialize` made of an object.
        argument: Name of the argument.
        classes: Dict of the classes that it may be of, by name.
    """
    if isinstance(identifier, tuple(classes.values())):
        return identifier
    name, arguments = identifier, {}
    if isinstance(identifier, dict) and set(identifier) == {"name", "config"}:
        name, arguments = identifier["name"], identifier["config"]
    if not (isinstance(name, str) and name in classes and isinstance(arguments, dict)):
        return None
    try:
        return classes[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Wrong {argument}={name!r}: {error}") from error


def serialize(step_size: Any) -> dict[str, Any] | None:
    """What `get` makes the same step size of, in types that JSON has."""
    if step_size is None:
        return None
    return {"name": step_size.name, "config": step_size.get_config()}


def checked_float(value, name, *, above=None, below=None, at_least=None, up_to=None):
    wrong = (
        not isinstance(value, numbers.Real)
        or isinstance(value, bool)
        or not abs(value) < 1e30
        or (above is not None and not value > above)
        or (below is not None and not value < below)
        or (at_least is not None and not value >= at_least)
        or (up_to is not None and not value <= up_to)
    )
    if wrong:
        limits = {
            "above": above,
            "below": below,
            "of at least": at_least,
            "of at most": up_to,
        }
        text = " and ".join(f"{k} {v}" for k, v in limits.items() if v is not None)
        raise ValueError(
            f"`{name}` must be a finite float {text}. "
            f"Received: {name}={reprlib.repr(value)}"
        )
    return float(value)
