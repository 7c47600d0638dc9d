"""The interface of the 2018 package keras-normalized-optimizers, for Keras 3.

The 2018 class wrapped an optimizer. Here `NormalizedOptimizer(...)` makes an instance
of the normalized class, and `ClippedOptimizer(...)` makes an instance of the clipping
class. The differences:

- The given optimizer is copied with its state, and not used again.
- The norm has a floor, `norm_epsilon`, of 1e-30. The 2018 class added 1e-7 to the norm.
- A name that is registered for another function raises an error.
"""

import abc
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_normopt._optimizer.clipped import ClippedMixin
from keras_normopt._optimizer.factory import clipped, normalized
from keras_normopt._optimizer.normalized import NormalizedMixin
from keras_normopt.norms import _registry


class NormalizedOptimizer(abc.ABC):  # noqa: B024  (an ABC for its `register` only)
    """Makes a normalized optimizer from an optimizer.

    From an `Adam` it makes a `NormalizedAdam` with the same hyperparameters and the
    same state (slots, iterations, learning rate), so training continues. For every
    normalized optimizer, `isinstance(optimizer, NormalizedOptimizer)` is true.

    Args:
        optimizer: A Keras optimizer, its name, or its config from
            `keras.optimizers.serialize`.
        normalization: The argument `norm` of the normalized classes. Defaults to
            `"l2"`.

    Returns:
        A new, normalized optimizer.

    Raises:
        ValueError: If the optimizer is unknown, a `LossScaleOptimizer`, a
            `MultiOptimizer` or normalized already, or if the norm is unknown.

    Example:
        >>> from keras.optimizers import SGD
        >>> from keras_normopt import NormalizedOptimizer
        >>> sgd = NormalizedOptimizer(SGD(0.01, momentum=0.9), normalization="l2")
        >>> type(sgd).__name__, sgd.momentum
        ('NormalizedSGD', 0.9)

    References:
        - [Yu et al., 2017, Block-Normalized Gradient Method: An Empirical Study for
          Training Deep Neural Network](https://arxiv.org/abs/1707.04822)
    """

    def __new__(cls, optimizer: Any, normalization: Any = "l2") -> Any:
        return _convert(optimizer, normalized, normalization)

    @staticmethod
    def set_normalization_function(name: str, function: Callable[[Any], Any]) -> None:
        """Registers a normalization function under a name.

        Args:
            name: String, not the name of a built-in norm.
            function: Callable of a gradient. It returns the norm, a scalar tensor, or
                the normalized gradient, a tensor of the same shape. It is called once,
                on a tensor of shape (2, 3), to find out which of the two it returns.

        Raises:
            ValueError: If the function fails on that tensor or returns neither, or if a
                built-in norm or another function has the name.
            TypeError: If `name` is not a string or `function` is not callable.
        """
        if not callable(function):
            raise TypeError(
                "`function` must be a callable of a gradient. "
                f"Received: function={function!r}"
            )
        probe = ops.convert_to_tensor(np.arange(1, 7).reshape(2, 3) / 8, "float32")
        try:
            shape = tuple(ops.convert_to_tensor(function(probe)).shape)
        except Exception as error:
            raise ValueError(
                f"The normalization function for name={name!r} failed on a gradient of "
                f"shape {tuple(probe.shape)}: {error}"
            ) from error
        if shape == ():
            _registry.register_norm(name, function)
        elif shape == tuple(probe.shape):
            _registry.register_normalizer(name, function)
        else:
            raise ValueError(
                f"The normalization function for name={name!r} must return the norm, a "
                "scalar, or the normalized gradient. For a gradient of shape "
                f"{tuple(probe.shape)} it returned a tensor of shape {shape}."
            )

    @staticmethod
    def get_normalization_functions() -> list[str]:
        """Returns the sorted names that `normalization` takes."""
        return _registry.names()


class ClippedOptimizer(abc.ABC):  # noqa: B024
    """Makes a clipping optimizer from an optimizer.

    From an `Adam` it makes a `ClippedAdam`. All else is as for `NormalizedOptimizer`.

    Args:
        optimizer: A Keras optimizer, its name, or its config from
            `keras.optimizers.serialize`.
        normalization: The argument `norm` of the clipping classes. Defaults to `"l2"`.
        clipnorm: Float, above 0 and finite, the largest norm that a gradient may keep:
            the argument `max_norm` of the clipping classes. Defaults to 1.0.

    Returns:
        A new, clipping optimizer.

    Raises:
        ValueError: If the optimizer is unknown, a `LossScaleOptimizer`, a
            `MultiOptimizer`, or normalized or clipped already. Also if the norm is
            unknown, or `clipnorm` is out of its range.

    Example:
        >>> from keras_normopt import ClippedOptimizer
        >>> adam = ClippedOptimizer("adam", normalization="max", clipnorm=0.5)
        >>> type(adam).__name__, adam.norm, adam.max_norm
        ('ClippedAdam', 'max', 0.5)

    References:
        - [Pascanu et al., 2013, On the difficulty of training recurrent neural
          networks](https://arxiv.org/abs/1211.5063)
    """

    def __new__(
        cls, optimizer: Any, normalization: Any = "l2", clipnorm: float = 1.0
    ) -> Any:
        return _convert(optimizer, clipped, normalization, max_norm=clipnorm)

    set_normalization_function = NormalizedOptimizer.set_normalization_function
    get_normalization_functions = NormalizedOptimizer.get_normalization_functions


NormalizedOptimizer.register(NormalizedMixin)
ClippedOptimizer.register(ClippedMixin)


def _convert(optimizer, factory, norm, **options):
    original = keras.optimizers.get(optimizer)
    if original is None:
        raise ValueError(
            "`optimizer` must be a Keras optimizer, its name or its config. "
            "Received: optimizer=None"
        )
    cls = factory(type(original))
    config = _hyperparameters(original) | {"norm": norm} | options
    result = cls.from_config(config)
    _copy_state(original, result)
    return result


def _hyperparameters(original):
    # The learning rate may be a schedule or function that cannot be saved. So the
    # config comes from a stand-in without it.
    stand_in = object.__new__(type(original))
    vars(stand_in).update(vars(original), _learning_rate=None)
    learning_rate = original._learning_rate
    if isinstance(learning_rate, keras.Variable):
        learning_rate = float(ops.convert_to_numpy(learning_rate))
    return stand_in.get_config() | {"learning_rate": learning_rate}


def _copy_state(original, result):
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(original, name):
            setattr(result, name, getattr(original, name))
    if original.built:
        result.build(original._trainable_variables)
    for old, new in zip(original.variables, result._base_variables, strict=True):
        # A copy, because on JAX `fit` donates the memory of the original.
        new.assign(ops.copy(old))
