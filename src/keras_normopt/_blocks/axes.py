"""Which axes of a variable are inputs of its layer, and which are outputs.

A kernel maps the input axes of its layer to its output axes: it is a matrix (in | out).
Layers arrange the axes of their kernels differently, so the layer that created a
variable decides.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_normopt._backend import torch_modules
from keras_normopt._blocks import layers

ROLES = ("kernel", "embedding", "vector")


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one variable.

    An axis that is neither input nor output counts separate matrices.

    Attributes:
        role: `"kernel"`, a matrix product; `"embedding"`, a table of which a step uses
            some rows; or `"vector"`: a bias, a gain or a scalar of any rank.
        inputs: Tuple of the input axes.
        outputs: Tuple of the output axes.
        parts: Into how many matrices the outputs are split, such as the gates of an
            LSTM, or the groups of a convolution.
    """

    role: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    parts: int = 1

    def __str__(self) -> str:
        if self.role == "vector":
            return "vector"
        sides = (", ".join(map(str, axes)) for axes in (self.inputs, self.outputs))
        text = f"({' | '.join(sides)})"
        return f"{text} in {self.parts} parts" if self.parts > 1 else text

    def get_config(self) -> list[Any]:
        """Returns what `of_config` makes the same axes of."""
        return [self.role, list(self.inputs), list(self.outputs), self.parts]

    @classmethod
    def of_config(cls, config: Any) -> "Axes":
        role, inputs, outputs, parts = config
        return cls(role, tuple(inputs), tuple(outputs), parts)

    def batch(self, rank):
        """Returns the axes that count separate matrices."""
        listed = (*self.inputs, *self.outputs)
        return tuple([i for i in range(rank) if i not in listed])

    def sizes(self, shape):
        """Returns the number of matrices, of their inputs and of their outputs."""
        count, inputs, outputs = [
            math.prod([shape[i] for i in axes])
            for axes in (self.batch(len(shape)), self.inputs, self.outputs)
        ]
        return count * self.parts, inputs, outputs // self.parts

    def to_matrices(self, stack):
        """Arranges a stack of equal kernels as a stack of matrices.

        Args:
            stack: Tensor of shape `(n, *shape)`.

        Returns:
            Tensor of shape `(n · matrices, inputs, outputs)`.
        """
        n, *shape = stack.shape
        count, inputs, outputs = self.sizes(shape)
        stack = _transposed(stack, self._order(len(shape)))
        if self.parts > 1:
            split = (n * count // self.parts, inputs, self.parts, outputs)
            stack = ops.transpose(ops.reshape(stack, split), (0, 2, 1, 3))
        return ops.reshape(stack, (n * count, inputs, outputs))

    def from_matrices(self, matrices, n, shape):
        """Arranges a stack of matrices as `n` kernels again: see `to_matrices`."""
        count, inputs, outputs = self.sizes(shape)
        if self.parts > 1:
            split = (n * count // self.parts, self.parts, inputs, outputs)
            matrices = ops.transpose(ops.reshape(matrices, split), (0, 2, 1, 3))
        order = self._order(len(shape))
        sizes = [n, *shape]
        stack = ops.reshape(matrices, [sizes[i] for i in order])
        return _transposed(stack, [order.index(i) for i in range(len(order))])

    def _order(self, rank):
        axes = (*self.batch(rank), *self.inputs, *self.outputs)
        return [0, *[i + 1 for i in axes]]

    # An output unit has one entry on each axis but the inputs. For kernels whose last
    # axis is the only output, as in most layers, the four methods below do nothing.

    def units_shape(self, shape):
        """Returns the shape with the units on the last axis, or that of a vector."""
        if len(shape) < 2 or self._ends_with_units(len(shape)):
            return tuple(shape)
        if self.role == "vector":
            return (math.prod(shape),)
        inputs = math.prod([shape[i] for i in self.inputs])
        return inputs, math.prod(shape) // max(inputs, 1)

    def to_units(self, tensor):
        """Moves the units of a gradient to the last axis."""
        shape = tuple(tensor.shape)
        arranged = self.units_shape(shape)
        if arranged == shape:
            return tensor
        return ops.reshape(_transposed(tensor, self._unit_order(len(shape))), arranged)

    def from_units(self, tensor, shape):
        """Arranges the axes as they were: see `to_units`."""
        if tuple(tensor.shape) == tuple(shape):
            return tensor
        order = self._unit_order(len(shape))
        tensor = ops.reshape(tensor, [shape[i] for i in order])
        return _transposed(tensor, [order.index(i) for i in range(len(order))])

    def spread(self, values, shape):
        """Shapes one value for each unit so that it broadcasts against a gradient."""
        if not len(values.shape) or self._ends_with_units(len(shape)):
            return values
        sizes = [1 if i in self.inputs else size for i, size in enumerate(shape)]
        return self.from_units(values, sizes)

    def _ends_with_units(self, rank):
        return self.role != "vector" and self.inputs == tuple(range(rank - 1))

    def _unit_order(self, rank):
        if self.role == "vector":
            return list(range(rank))
        return [*self.inputs, *[i for i in range(rank) if i not in self.inputs]]


def _transposed(tensor, order):
    return tensor if order == sorted(order) else ops.transpose(tensor, order)


def last(shape):
    """The axes of a kernel whose last axis is its only output."""
    rank = len(shape)
    if rank < 2:
        return Axes("vector")
    return Axes("kernel", tuple(range(rank - 1)), (rank - 1,))


#: Finds the axes of one variable of a layer, from the layer and the variable's shape.
Rule: TypeAlias = Callable[[Any, tuple[int, ...]], Axes]


def _plain(layer, shape):
    return last(shape)


def _embedding(layer, shape):
    return Axes("embedding", (0,), (1,))


def _gates(parts):
    return lambda layer, shape: dataclasses.replace(last(shape), parts=parts)


def _grouped(layer, shape):
    return dataclasses.replace(last(shape), parts=layer.groups)


def _swapped(layer, shape):
    rank = len(shape)
    return Axes("kernel", (*range(rank - 2), rank - 1), (rank - 2,))


def _depthwise(layer, shape):
    rank = len(shape)  # Each channel has a filter of its own.
    return Axes("kernel", tuple(range(rank - 2)), (rank - 1,))


def _einsum(layer, shape):
    """Takes apart an equation such as `abc,cde->abde`: here cde is (c | de)."""
    operands, result = layer.equation.replace(" ", "").split("->")
    operand, kernel = operands.split(",")
    inputs = tuple(i for i, name in enumerate(kernel) if name not in result)
    outputs = tuple(
        i for i, name in enumerate(kernel) if name in result and name not in operand
    )
    return Axes("kernel", inputs, outputs) if inputs else Axes("vector")


def _einsum_lora(layer, shape):
    """The first kernel of a LoRA pair has the rank in the place of the last axis."""
    kernel, rank_axis = _einsum(layer, shape), len(shape) - 1
    kept = tuple(i for i in kernel.outputs if i != rank_axis)
    inputs = tuple(i for i in kernel.inputs if i != rank_axis)
    return Axes("kernel", inputs, (*kept, rank_axis))


_LORA = {"lora_kernel_a": _plain, "lora_kernel_b": _plain}

#: For classes of Keras the variables that are no vectors.
_RULES: dict[str, dict[str, Rule]] = {
    "Dense": {"kernel": _plain} | _LORA,
    "EinsumDense": {"kernel": _einsum} | _LORA | {"lora_kernel_a": _einsum_lora},
    "BaseConv": {"kernel": _grouped} | _LORA,
    "BaseConvTranspose": {"kernel": _swapped},
    "BaseDepthwiseConv": {"kernel": _depthwise},
    "BaseSeparableConv": {"depthwise_kernel": _depthwise, "pointwise_kernel": _plain},
    "SimpleRNNCell": {"kernel": _plain, "recurrent_kernel": _plain},
    "GRUCell": {"kernel": _gates(3), "recurrent_kernel": _gates(3)},
    "LSTMCell": {"kernel": _gates(4), "recurrent_kernel": _gates(4)},
    "ConvLSTMCell": {"kernel": _gates(4), "recurrent_kernel": _gates(4)},
    "Embedding": {
        "embeddings": _embedding,
        "reverse_embeddings": _plain,
        "lora_embeddings_a": _embedding,
        "lora_embeddings_b": _plain,
    },
}


def of_layer(layer, variable):
    """Finds the axes of a variable in the layer that created it.

    Returns:
        The `Axes`, or `None` if the layer is unknown.
    """
    shape = tuple(variable.shape)
    if type(layer).__name__ == "TorchModuleWrapper":
        return _of_torch(layer, variable, shape)
    for cls in type(layer).__mro__:
        if cls.__module__.partition(".")[0] != "keras":
            continue
        rules = _RULES.get(cls.__name__, {})
        if variable.name in rules:
            return rules[variable.name](layer, shape)
    # A subclass of somebody else may have kernels that its base does not have.
    is_own = type(layer).__module__.partition(".")[0] == "keras"
    has_rules = is_own and not _is_container(layer)
    return Axes("vector") if has_rules else None


def _is_container(layer):
    """Whether a layer of Keras holds variables that it knows nothing of."""
    return isinstance(layer, keras.Model) or "jax_layer" in type(layer).__module__


def _of_torch(layer, variable, shape):
    found = torch_modules.find(layer.module, variable.value)
    if found is None:
        return None
    kind, parts = found
    rank = len(shape)
    if kind == "embedding":
        return Axes("embedding", (0,), (1,))
    if kind == "vector" or rank < 2:
        return Axes("vector")
    if kind == "swapped":  # A transposed convolution has (in, out, spatial…).
        return Axes("kernel", (0, *range(2, rank)), (1,))
    return Axes("kernel", tuple(range(1, rank)), (0,), parts)


_VECTOR_NAMES = ("bias", "gain", "gamma", "beta", "alpha", "scale", "offset")


def guess(variable):
    """Guesses the axes of a variable from its shape and name alone."""
    shape = tuple(variable.shape)
    name = variable.name.rpartition("/")[2].lower()
    if len(shape) < 2 or any(part in name for part in _VECTOR_NAMES):
        return Axes("vector")
    if len(shape) == 2 and "embedding" in name:
        return Axes("embedding", (0,), (1,))
    return last(shape)


def find(variables, paths, given):
    """Finds the axes of all variables of an optimizer.

    Args:
        variables: List of the variables.
        paths: List of their paths.
        given: What the user passed as `axes`: a dict from regular expressions, or
            `None`. The first expression that is found in a path counts.

    Returns:
        A list of `Axes`, and a dict that says of each variable whose axes are guessed,
        by its number, which layer it is in, or `None`.
    """
    guessed: dict[int, Any] = {}
    result = []
    creators = layers.creators(variables)
    for number, (variable, path, known) in enumerate(
        zip(variables, paths, creators, strict=True)
    ):
        axes = _given(given, path, tuple(variable.shape))
        if axes is None:
            found = [of_layer(layer, variable) for layer in known]
            # A shared table is an embedding's first.
            found.sort(
                key=lambda a: (a is None, a is not None and a.role != "embedding")
            )
            axes = found[0] if found else None
        if axes is None:
            axes = guess(variable)
            if len(variable.shape) > 1:
                guessed[number] = known[0] if known else None
        result.append(axes)
    return result, guessed


def _given(given, path, shape):
    """Returns the axes that the user gave for a variable, or `None`."""
    for pattern, value in (given or {}).items():
        if not re.search(pattern, path):
            continue
        if value == "vector":
            return Axes("vector")
        if value == "embedding":
            value = [[0], list(range(1, len(shape)))]
        rank, problem = len(shape), None
        inputs, outputs = (
            tuple(i + rank if i < 0 else i for i in group) for group in value[:2]
        )
        role = "embedding" if given[pattern] == "embedding" else "kernel"
        axes = Axes(role, inputs, outputs, *value[2:])
        every = (*axes.inputs, *axes.outputs)
        if any(not 0 <= i < rank for i in every):
            problem = "It has no such axes."
        elif len(set(every)) < len(every):
            problem = "An axis is named twice."
        elif math.prod(shape[i] for i in axes.outputs) % axes.parts:
            problem = f"Its outputs cannot be split into {axes.parts} equal parts."
        if problem:
            raise ValueError(
                f"`axes` does not fit the variable {path!r} of shape {shape}. "
                f"{problem} Received: axes={{{pattern!r}: {given[pattern]}}}"
            )
        return axes
    return None
