"""Shows what an optimizer does to each variable of a model: `describe`."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import keras

from keras_normopt._blocks import layers
from keras_normopt._blocks.axes import find
from keras_normopt._optimizer.clipped import ClippedMixin
from keras_normopt._optimizer.mixin import OptimizerMixin
from keras_normopt._optimizer.model_optimizers import inner_optimizers
from keras_normopt._transforms.config import schedule_of
from keras_normopt.norms._user_norms import function_name


@dataclasses.dataclass(frozen=True)
class Step:
    """What the optimizer does to one variable.

    Attributes:
        path: The path of the variable.
        shape: The shape of the variable.
        layer: The class of the layer that created the variable, or `""` if the layer no
            longer exists.
        axes: The axes of the variable (inputs | outputs), or `"vector"`. Axes that are
            not listed count separate matrices.
        step: The name of the direction that replaces the gradient or update,
            `"divided"`, `"clipped"`, `"skipped"`, `"centralized"`, or `"raw"` if
            nothing changes it.
        length: The length of the gradient or update after the change. For updates,
            multiply this length by the learning rate.
        rate: The factor of the learning rate, from patterns of `step_size`.
        why: The reason for `step`.
    """

    path: str
    shape: tuple[int, ...]
    layer: str
    axes: str
    step: str
    length: str
    rate: str
    why: str


class Description(Sequence):
    """A sequence of rows, one for each variable, that prints as a table."""

    def __init__(self, optimizers, steps):
        self.optimizers, self._steps = optimizers, steps

    def __getitem__(self, index):
        return self._steps[index]

    def __len__(self):
        return len(self._steps)

    def __repr__(self) -> str:
        names = [field.name for field in dataclasses.fields(Step)]
        rows = [names]
        rows += [[str(getattr(step, n)) for n in names] for step in self._steps]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*self.optimizers, "", *lines])


def describe(model: keras.Model) -> Description:
    """Shows what the model's optimizer does to each variable.

    `describe` does not train or change the model.

    Args:
        model: A built model, compiled with an optimizer of this package. The optimizer
            may be inside a `LossScaleOptimizer` or a `MultiOptimizer`.

    Returns:
        A sequence with one row for each trainable variable. It prints as a table.
        A row has the attributes `path`, `shape`, `layer`, `axes`, `step`, `length`,
        `rate` and `why`.

    Raises:
        ValueError: If the model has no variables yet, or no optimizer of this package,
            or if the optimizer is not built and cannot be copied.

    Example:
        >>> import keras, keras_normopt
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        >>> model.compile(optimizer=keras_normopt.OrthogonalSGD(0.01), loss="mse")
        >>> for row in keras_normopt.describe(model):
        ...     print(row.shape, row.axes, row.step)
        (8, 4) (0 | 1) orthogonal
        (4,) vector raw
    """
    optimizer = getattr(model, "optimizer", None)
    if not model.trainable_variables:
        raise ValueError(
            "The model has no trainable variables. First build it, or call it on data."
        )
    if optimizer is not None and not optimizer.built:
        optimizer = _copy(optimizer)
        optimizer.build(model.trainable_variables)
    own = [o for o in inner_optimizers(optimizer) if isinstance(o, OptimizerMixin)]
    # A `MultiOptimizer` does not build an optimizer that gets no variables.
    own = [o for o in own if o.built] or own
    if not own:
        raise ValueError(
            "`describe` needs a model that is compiled with an optimizer of "
            f"keras_normopt. Received: optimizer={optimizer!r}"
        )
    steps = [step for o in own for step in _steps_of(o)]
    return Description([_title(o) for o in own], steps)


def _copy(optimizer):
    try:
        return copy.deepcopy(optimizer)
    except ValueError as error:
        raise ValueError(
            f"`describe` cannot copy this {type(optimizer).__name__}, which is not "
            f"built yet: {error} Or build it first: "
            "`model.optimizer.build(model.trainable_variables)`."
        ) from error


def _title(optimizer):
    changed = "updates" if optimizer.apply_to == "update" else "gradients"
    step_size = getattr(optimizer, "step_size", None)
    text = f", step_size={step_size}" if step_size else ""
    return f"{type(optimizer).__name__}, of its {changed}{text}:"


def _steps_of(optimizer):
    variables, paths = optimizer._trainable_variables, optimizer._paths
    axes = optimizer._variable_axes
    if axes is None:
        axes, _ = find(variables, paths, optimizer.axes)
    for number, (variable, path, creators, variable_axes) in enumerate(
        zip(variables, paths, layers.creators(variables), axes, strict=True)
    ):
        shape = tuple(variable.shape)
        layer = type(creators[0]).__name__ if creators else ""
        step, length, why = _step_of(optimizer, number, variable_axes, shape)
        rate = str(optimizer._multipliers.get(number, 1))
        yield Step(path, shape, layer, str(variable_axes), step, length, rate, why)


def _step_of(optimizer, number, axes, shape) -> tuple[str, str, str]:
    """Returns the step of one variable, its length and the reason."""
    if optimizer._blocks.excluded[number]:
        return "raw", "", "matches `exclude`"
    if optimizer._blocks.block_of[number] is None:
        return "raw", "", "its gradient overwrites it"
    direction: Any = getattr(optimizer, "direction", None)
    if direction is not None:
        variable_direction = optimizer._directions[number]
        if variable_direction is None:
            return "raw", "", f"{axes.role}: the direction does not change it"
        if 0 in shape:
            return variable_direction.name, "", "no entries"
        length = (
            f"{variable_direction.unit} of {variable_direction.length(axes, shape):.3g}"
        )
        guessed = ", axes guessed" if number in optimizer._guessed else ""
        return variable_direction.name, length, f"{axes.role}{guessed}"
    if optimizer.norm is None:
        step = "centralized" if optimizer.centralize else "raw"
        return step, "", "norm=None"
    name = (
        optimizer.norm
        if isinstance(optimizer.norm, str)
        else function_name(optimizer.norm)
    )
    if isinstance(optimizer, ClippedMixin):
        schedule = schedule_of(optimizer.max_norm)
        limit = type(schedule).__name__ if schedule else optimizer.max_norm
        step = "skipped" if optimizer.skip else "clipped"
        return step, f"{name} of at most {limit}", _scope(optimizer)
    return "divided", f"{name} of 1", _scope(optimizer)


def _scope(optimizer):
    return f'scope="{optimizer.scope}"'
