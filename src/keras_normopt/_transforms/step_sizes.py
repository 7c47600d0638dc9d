"""Multiplies the learning rate of each block, or variable, by a factor."""

from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.tensors import constant_like, divide
from keras_normopt._blocks.gradients import norms_of_each
from keras_normopt._transforms.config import Configured, checked_float
from keras_normopt._transforms.rescale import NO_LIMIT
from keras_normopt.norms import l2


class WeightNorm(Configured):
    """A step size or limit from the weights: coefficient · max(‖w‖, minimum).

    The optimizer's `scope` decides which weights ‖w‖ covers.

    As `step_size`, it multiplies the step, and ‖w‖ is the l2 norm. With
    `NormalizedSGD`, `norm="l2"` and no momentum, a step has the l2 norm
    lr · coefficient · ‖w‖, a fraction of the weights' norm. With `scope="layer"` this
    is LARS. Adam's step on N entries has a norm of about √N, so the fraction grows with
    N. `NormalizedAdam(apply_to="update")` avoids this, and is LAMB.

    As `max_norm`, it is the largest norm of a clipped gradient, and ‖w‖ is the
    optimizer's norm. With `scope="unit"` this is adaptive gradient clipping (AGC).

    If the product is 0, the step is multiplied by 1, or the gradient is not clipped.
    Weights that start at 0 are small after one step, and then limit their own steps.
    Set `minimum` to prevent this.

    Args:
        coefficient: Float, above 0 and finite. Defaults to 1.0.
        minimum: Float, at least 0 and finite: the smallest value for the norm of the
            weights. The AGC paper uses 0.001. Defaults to 0.0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import keras_normopt
        >>> from keras_normopt import WeightNorm
        >>> lars = WeightNorm(coefficient=0.01)
        >>> keras_normopt.NormalizedSGD(scope="layer", step_size=lars)
        NormalizedSGD(scope='layer', step_size=WeightNorm(coefficient=0.01))
        >>> agc = WeightNorm(coefficient=0.02)
        >>> keras_normopt.ClippedSGD(scope="unit", max_norm=agc)
        ClippedSGD(scope='unit', max_norm=WeightNorm(coefficient=0.02))

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
        """Returns the arguments, by name."""
        return {"coefficient": self.coefficient, "minimum": self.minimum}

    def add_factor_variables(self, add_variable, index, variable, shape):
        """Adds the variables for one weight. The first one holds the weight's factor.

        Args:
            add_variable: Callable like `add_variable` of an optimizer.
            index: Index of the weight in the optimizer.
            variable: The weight.
            shape: Shape of the weight's norm. It has one axis if each unit has its own
                norm.
        """
        return [
            add_variable(
                f"step_size_{index}", shape=shape, dtype="float32", initializer="ones"
            )
        ]

    def factors(self, gradients, state):
        """Returns a dict from positions of gradients to factors of the learning rate.

        Args:
            gradients: The raw `Gradients`.
            state: List with the result of `add_factor_variables` for the weight of each
                gradient. It has `None` for weights in no block.
        """
        scaled_norms = self._scaled_norms(gradients.weight_norms(l2.norm))
        factors = [
            ops.where(ops.equal(s, 0), ops.ones_like(s), s) for s in scaled_norms
        ]
        by_block = gradients.by_block(factors)
        return {
            position: by_block[number]
            for number, positions in gradients.blocks.items()
            for position in positions
        }

    def add_limit_variables(self, add_variable, shapes):
        """Adds no variables: limits follow the weights."""

    def limits(self, gradients, norm, state):
        """Returns the limits of the norms of one step, packed.

        Args:
            gradients: The `Gradients`.
            norm: The `Norm`.
            state: The result of `add_limit_variables`.
        """
        scaled_norms = self._scaled_norms(gradients.weight_norms(norm))
        return [
            ops.where(ops.equal(s, 0), constant_like(s, NO_LIMIT), s)
            for s in scaled_norms
        ]

    def _scaled_norms(self, norms):
        if self.minimum:  # Not `ops.maximum`, which computes in float32 on PyTorch.
            floors = [constant_like(n, self.minimum) for n in norms]
            norms = [
                ops.where(n < floor, floor, n)
                for n, floor in zip(norms, floors, strict=True)
            ]
        return [ops.multiply(n, constant_like(n, self.coefficient)) for n in norms]


class GradientCorrelation(Configured):
    """A factor for the step of each variable, adapted to its gradients.

    The factor m starts at 1, and each step updates it:

        m ← clip(m · (1 + rate · cos(g_t, g_{t−1})), minimum, maximum)

    The cosine is between successive raw gradients of the variable. It is 0 at the first
    step, or if one gradient is zero. So m grows while gradients agree, and shrinks when
    they turn. Schedules of the learning rate still apply. On deterministic problems, m
    corrects learning rates that are far too small. With minibatch noise, successive
    gradients hardly agree, and near a minimum they turn. Then m decays towards
    `minimum`: use a schedule instead. The optimizer keeps a copy of the gradients.

    Args:
        rate: Float, above 0 and below 1. Defaults to 0.01.
        minimum: Float, above 0 and at most 1. Defaults to 0.01.
        maximum: Float, at least 1 and finite. Defaults to 100.0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import keras_normopt
        >>> from keras_normopt.step_sizes import GradientCorrelation
        >>> keras_normopt.NormalizedSGD(step_size=GradientCorrelation(rate=0.05))
        NormalizedSGD(step_size=GradientCorrelation(rate=0.05))
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
        """Returns the arguments, by name."""
        return {"rate": self.rate, "minimum": self.minimum, "maximum": self.maximum}

    def add_factor_variables(self, add_variable, index, variable, shape):
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

    def factors(self, gradients, state):
        """Returns a dict from positions of gradients to factors: see `WeightNorm`."""
        positions = [i for block in gradients.blocks.values() for i in block]
        raw = [sparse.densify(gradients.tensors[i]) for i in positions]
        previous = [
            sparse.densify(ops.convert_to_tensor(state[i][1])) for i in positions
        ]
        # Divides by the norms first, because products of gradients may overflow.
        units, previous_units = _unit_vectors(raw), _unit_vectors(previous)
        result = {}
        for i, new, unit, previous_unit in zip(
            positions, raw, units, previous_units, strict=True
        ):
            cosine = ops.cast(ops.sum(ops.multiply(unit, previous_unit)), "float32")
            factor, previous_gradient = state[i]
            factor = ops.multiply(factor, 1 + self.rate * cosine)
            result[i] = ops.clip(factor, self.minimum, self.maximum)
            previous_gradient.assign(ops.cast(new, previous_gradient.dtype))
        return result


def _unit_vectors(tensors):
    """Returns the tensors divided by their l2 norms. Zeros stay zeros."""
    return [
        divide(
            ops.cast(tensor, norm.dtype),
            ops.where(ops.equal(norm, 0), ops.ones_like(norm), norm),
        )
        for tensor, norm in zip(tensors, norms_of_each(tensors, l2.norm), strict=True)
    ]


def set_factors(gradients, step_size, state):
    """Stores the factor of each weight that has a gradient.

    Args:
        gradients: The raw `Gradients`.
        step_size: The object that computes the factors.
        state: Dict from the indices of weights to results of `add_factor_variables`.
    """
    step_state = [state.get(index) for index in gradients.indices]
    for position, factor in step_size.factors(gradients, step_state).items():
        variable, *_ = step_state[position]
        variable.assign(ops.cast(factor, "float32"))


def multiply(gradients, state):
    """Multiplies each update by the factor of its weight.

    Args:
        gradients: The updates, as `Gradients`.
        state: As for `set_factors`.
    """
    step_state = [state.get(index) for index in gradients.indices]
    gradients.multiply(
        {i: ops.convert_to_tensor(k[0]) for i, k in enumerate(step_state) if k}
    )


def multiply_by_patterns(gradients, multipliers, iterations):
    """Multiplies updates by the factors of patterns.

    Args:
        gradients: The updates, as `Gradients`.
        multipliers: Dict from the indices of variables to their `Multiplier`.
        iterations: Scalar tensor, the number of steps so far.
    """
    found = [multipliers.get(index) for index in gradients.indices]
    factors = {
        i: ops.convert_to_tensor(multiplier.at(iterations), "float32")
        for i, multiplier in enumerate(found)
        if multiplier is not None
    }
    gradients.multiply(factors)
