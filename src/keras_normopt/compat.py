"""The interface of the 2018 package keras-normalized-optimizers, for Keras 3.

There a class wrapped an optimizer instance. Here `NormalizedOptimizer(...)` makes an
instance of the normalized class instead, and `ClippedOptimizer(...)` one of the
clipping class; what that changes:

- the wrapped optimizer is copied, with its state, and not used any further;
- the norm is not increased by 1e-7 but has a floor, `norm_epsilon`, of 1e-30;
- names that are registered for another function are not silently replaced.
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
    """Makes the normalized counterpart of an optimizer.

    The result is an instance of the normalized class of the optimizer's own, such as
    `NormalizedAdam` for `Adam`, with the same hyperparameters. An optimizer that has
    been in use hands over its state (slots, iterations, learning rate), so that
    training goes on where it was. `isinstance(optimizer, NormalizedOptimizer)` holds
    for every normalized optimizer.

    Args:
        optimizer: What to normalize: a Keras optimizer, the name of one, or its config
            as `keras.optimizers.serialize` gives it.
        normalization: Norm of the gradient, as the argument `norm` of the normalized
            classes. Defaults to `"l2"`.

    Returns:
        A new, normalized optimizer.

    Raises:
        ValueError: If the optimizer is unknown, is a `LossScaleOptimizer` or a
            `MultiOptimizer`, or is normalized already; or if the norm is unknown.

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
        return _converted(optimizer, normalized, normalization)

    @staticmethod
    def set_normalization_function(name: str, function: Callable[[Any], Any]) -> None:
        """Registers a normalization function under a name.

        Args:
            name: String, any but the name of a built-in norm.
            function: Callable of a gradient that returns either its norm, a scalar
                tensor, or the normalized gradient, a tensor of the gradient's shape. It
                is called once, on a tensor of shape (2, 3), to tell which.

        Raises:
            ValueError: If the function fails on that tensor or returns neither, or the
                name is that of a built-in norm or of another function.
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
        """Lists the names that `normalization` takes, sorted."""
        return _registry.names()


class ClippedOptimizer(abc.ABC):  # noqa: B024
    """Makes the clipping counterpart of an optimizer.

    The result is an instance of the clipping class of the optimizer's own, such as
    `ClippedAdam` for `Adam`. Everything else is as with `NormalizedOptimizer`.

    Args:
        optimizer: What is to clip: a Keras optimizer, the name of one, or its config as
            `keras.optimizers.serialize` gives it.
        normalization: Norm to clip by, as the argument `norm` of the clipping classes.
            Defaults to `"l2"`.
        clipnorm: Float, above 0 and finite, the largest norm that a gradient may keep,
            as the argument `max_norm` of the clipping classes. Defaults to 1.0.

    Returns:
        A new, clipping optimizer.

    Raises:
        ValueError: If the optimizer is unknown, is a `LossScaleOptimizer` or a
            `MultiOptimizer`, or is normalized or clipped already; or if the norm is
            unknown or `clipnorm` out of its range.

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
        return _converted(optimizer, clipped, normalization, max_norm=clipnorm)

    set_normalization_function = NormalizedOptimizer.set_normalization_function
    get_normalization_functions = NormalizedOptimizer.get_normalization_functions


NormalizedOptimizer.register(NormalizedMixin)
ClippedOptimizer.register(ClippedMixin)


def _converted(optimizer, factory, norm, **options):
    original = keras.optimizers.get(optimizer)
    if original is None:
        raise ValueError(
            "`optimizer` must be a Keras optimizer, its name or its config. "
            "Received: optimizer=None"
        )
    cls = factory(type(original))
    config = _hyperparameters(original) | {"norm": norm} | options
    result = cls.from_config(config)
    _carry_over(original, result)
    return result


def _hyperparameters(original):
    # A schedule or a function of the user's own is handed on as it is: it need not be
    # one that can be saved. So the config is asked of a stand-in without it.
    stand_in = object.__new__(type(original))
    vars(stand_in).update(vars(original), _learning_rate=None)
    learning_rate = original._learning_rate
    if isinstance(learning_rate, keras.Variable):
        learning_rate = float(ops.convert_to_numpy(learning_rate))
    return stand_in.get_config() | {"learning_rate": learning_rate}


def _carry_over(original, result):
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(original, name):
            setattr(result, name, getattr(original, name))
    if original.built:
        result.build(original._trainable_variables)
    for old, new in zip(original.variables, result._base_variables, strict=True):
        # A copy, since on JAX `fit` donates the memory of the original.
        new.assign(ops.copy(old))
