"""Finds which axes of a variable are inputs of its layer, and which are outputs.

A kernel is a matrix (in | out): it maps the input axes of its layer to the output axes.
Layers order these axes differently, so the layer that created a variable decides.
"""

import dataclasses
import gc
import math
import re
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import keras

from keras_normopt._backend import torch_modules
from keras_normopt._blocks import layers
from keras_normopt._blocks.arrangement import Axes, dense_axes
from keras_normopt._blocks.patterns import first_match, warn_of_unused_patterns

#: A function from a variable's layer and shape to the variable's axes.
Rule: TypeAlias = Callable[[Any, tuple[int, ...]], Axes]


def _dense(layer, shape):
    return dense_axes(shape)


def _embedding(layer, shape):
    return Axes("embedding", (0,), (1,))


def _gates(parts):
    return lambda layer, shape: dataclasses.replace(dense_axes(shape), parts=parts)


def _grouped(layer, shape):
    return dataclasses.replace(dense_axes(shape), parts=layer.groups)


def _conv_transpose(layer, shape):
    rank = len(shape)
    return Axes("kernel", (*range(rank - 2), rank - 1), (rank - 2,))


def _depthwise(layer, shape):
    rank = len(shape)  # Each channel has its own filter.
    return Axes("kernel", tuple(range(rank - 2)), (rank - 1,))


def _einsum(layer, shape):
    """Reads the axes from an equation. In `abc,cde->abde`, cde has axes (c | de)."""
    operands, result = layer.equation.replace(" ", "").split("->")
    operand, kernel = operands.split(",")
    inputs = tuple(i for i, name in enumerate(kernel) if name not in result)
    outputs = tuple(
        i for i, name in enumerate(kernel) if name in result and name not in operand
    )
    return Axes("kernel", inputs, outputs) if inputs else Axes("vector")


def _einsum_lora_a(layer, shape):
    """Returns the axes of the first LoRA kernel, whose last axis is the rank."""
    whole, last_axis = _einsum(layer, shape), len(shape) - 1
    if last_axis in whole.inputs + whole.outputs:
        return whole
    return dataclasses.replace(whole, outputs=(*whole.outputs, last_axis))


def _einsum_lora_b(layer, shape):
    """Returns the axes of the second LoRA kernel. The rank is its input or output."""
    kernel = layer.equation.replace(" ", "").split("->")[0].split(",")[1]
    comes_first = len(kernel) - 1 in _einsum(layer, kernel).inputs
    return Axes("kernel", (1,), (0,)) if comes_first else dense_axes(shape)


_LORA = {"lora_kernel_a": _dense, "lora_kernel_b": _dense}
_EINSUM_LORA = {"lora_kernel_a": _einsum_lora_a, "lora_kernel_b": _einsum_lora_b}

#: For each layer class of Keras, rules for its variables by name. Vectors have none.
_RULES: dict[str, dict[str, Rule]] = {
    "Dense": {"kernel": _dense} | _LORA,
    "EinsumDense": {"kernel": _einsum} | _EINSUM_LORA,
    "BaseConv": {"kernel": _grouped} | _LORA,
    "BaseConvTranspose": {"kernel": _conv_transpose},
    "BaseDepthwiseConv": {"kernel": _depthwise},
    "BaseSeparableConv": {"depthwise_kernel": _depthwise, "pointwise_kernel": _dense},
    "SimpleRNNCell": {"kernel": _dense, "recurrent_kernel": _dense},
    "GRUCell": {"kernel": _gates(3), "recurrent_kernel": _gates(3)},
    "LSTMCell": {"kernel": _gates(4), "recurrent_kernel": _gates(4)},
    "ConvLSTMCell": {"kernel": _gates(4), "recurrent_kernel": _gates(4)},
    "Embedding": {
        "embeddings": _embedding,
        "reverse_embeddings": _dense,
        "lora_embeddings_a": _embedding,
        "lora_embeddings_b": _dense,
    },
    "STFTSpectrogram": {"real_kernel": _dense, "imag_kernel": _dense},
}


def axes_of_layer(layer, variable):
    """Finds the axes of a variable in the layer that created it.

    Returns:
        The `Axes`, or `None` if the layer is unknown.
    """
    shape = tuple(variable.shape)
    if isinstance(layer, keras.layers.TorchModuleWrapper):
        return _axes_of_torch(layer, variable, shape)
    for cls in type(layer).__mro__:
        if cls.__module__.partition(".")[0] != "keras":
            continue
        rules = _RULES.get(cls.__name__, {})
        if variable.name in rules:
            return rules[variable.name](layer, shape)
    # A user's subclass may have kernels that its base does not have.
    is_own = type(layer).__module__.partition(".")[0] == "keras"
    if not is_own or _is_container(layer):
        return None
    # Users may add weights to a layer of Keras.
    return _axes_from_name(variable.name, shape)


def _is_container(layer):
    """Returns whether a layer of Keras holds variables of unknown role."""
    return isinstance(layer, keras.Model) or "jax_layer" in type(layer).__module__


def _axes_of_torch(layer, variable, shape):
    kind, parts, name = torch_modules.find_role(layer.module, variable.value)
    rank = len(shape)
    if kind is None:
        return _axes_from_name(name, shape)
    if kind == "embedding":
        return Axes("embedding", (0,), (1,))
    if kind == "vector" or rank < 2:
        return Axes("vector")
    spatial = tuple(range(2, rank))
    if kind == "depthwise":
        return Axes("kernel", spatial, (1,))
    if kind == "swapped":  # A transposed convolution has (in, out, spatial…).
        return Axes("kernel", (0, *spatial), (1,))
    return Axes("kernel", (1, *spatial), (0,), parts)


#: The role of a variable whose name contains a word. The last known word counts.
_WORDS = dict.fromkeys(
    ("bias", "gain", "gamma", "beta", "alpha", "scale", "offset"), "vector"
)
_WORDS |= dict.fromkeys(
    ("embedding", "embed", "emb", "pos", "position", "encoding", "table", "token"),
    "embedding",
)
_WORDS |= dict.fromkeys(("kernel", "weight", "dense", "proj", "projection"), "kernel")


def _axes_from_name(name, shape):
    """Finds the axes from a variable's name and shape.

    Returns:
        The `Axes`, or `None` if the name and the shape do not decide.
    """
    words = re.split(r"[^a-z]+", name.rpartition("/")[2].lower())
    roles = [_WORDS.get(word) or _WORDS.get(word.removesuffix("s")) for word in words]
    role = next((role for role in reversed(roles) if role), None)
    # A single row, such as a class token, is not a matrix.
    is_row = len(shape) < 2 or (math.prod(shape[:-1]) == 1 and role != "kernel")
    if is_row or role == "vector":
        return Axes("vector")
    if role == "embedding":
        return dataclasses.replace(dense_axes(shape), role=role)
    return None


def guess_axes(variable, layer=None):
    """Guesses the axes of a variable in an unknown layer.

    Returns:
        The `Axes`, and whether the name or the layer confirms them.
    """
    shape = tuple(variable.shape)
    axes = _axes_from_name(variable.name, shape)
    if axes is not None:
        return axes, True
    if len(shape) == 3 and _has_experts(layer, variable):
        return Axes("kernel", (1,), (2,)), True
    return dense_axes(shape), False


def _has_experts(layer, variable):
    """Returns whether the first axis counts the experts of a mixture."""
    names = f"{type(layer).__name__} {variable.name}".lower()
    count = getattr(layer, "num_experts", None)
    return "expert" in names or count == variable.shape[0]


def find(variables, paths, patterns):
    """Finds the axes of all variables of an optimizer.

    Args:
        variables: List of the variables.
        paths: List of their paths.
        patterns: The argument `axes`: a dict from regular expressions, or `None`. The
            first expression that is found in a path counts.

    Returns:
        A list of `Axes`, and a dict of the variables with guessed axes. The dict maps
        the index of such a variable to its layer, or to `None` if its layer is unknown.
    """
    warn_of_unused_patterns("axes", patterns or (), paths, stacklevel=5)
    guessed: dict[int, Any] = {}
    result = []
    creators = layers.creators(variables)
    for number, (variable, path, owners) in enumerate(
        zip(variables, paths, creators, strict=True)
    ):
        axes = axes_from_user(patterns, path, tuple(variable.shape))
        if axes is None:
            axes = _axes_in_layers(owners, variable)
        if axes is None:
            layer = owners[0] if owners else None
            axes, is_certain = guess_axes(variable, layer)
            if not is_certain:
                guessed[number] = layer
        result.append(axes)
    if gc.get_freeze_count() and any(
        not owners and len(v.shape) > 1
        for owners, v in zip(creators, variables, strict=True)
    ):
        warnings.warn(
            "`gc.freeze()` hides the layers of some variables, so the axes of their "
            "kernels are guessed. Build the optimizer before `gc.freeze()`, or pass "
            "`axes`.",
            stacklevel=5,
        )
    return result, guessed


def _axes_in_layers(owners, variable):
    """Returns the axes of a variable, or `None` if none of its layers knows them."""
    candidates = [axes_of_layer(layer, variable) for layer in owners]
    # A shared table counts as an embedding. A wrapper may hold its layer's kernel.
    ranks = {"embedding": 0, "kernel": 1, "vector": 2}
    return min((a for a in candidates if a), key=lambda a: ranks[a.role], default=None)


def axes_from_user(patterns, path, shape):
    """Returns the axes that the user gave for a path, or `None`."""
    pattern = first_match(patterns or (), path)
    if pattern is None:
        return None
    value, rank = patterns[pattern], len(shape)
    if value == "vector":
        return Axes("vector")
    role = "kernel"
    if value == "embedding":
        role, value = value, [[0], list(range(1, rank))]
    inputs, outputs = (
        tuple(i + rank if i < 0 else i for i in group) for group in value[:2]
    )
    axes = Axes(role, inputs, outputs, *value[2:])
    every, problem = (*inputs, *outputs), None
    if any(not 0 <= i < rank for i in every):
        problem = "The variable has no such axes."
    elif len(set(every)) < len(every):
        problem = "An axis is named twice."
    elif math.prod(shape[i] for i in outputs) % axes.parts:
        problem = f"Its outputs cannot be split into {axes.parts} equal parts."
    if problem:
        raise ValueError(
            f"`axes` does not fit the variable {path!r} of shape {shape}. "
            f"{problem} Let the pattern match only variables with these axes. "
            f"Received: axes={{{pattern!r}: {patterns[pattern]}}}"
        )
    return axes
