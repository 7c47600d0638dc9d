"""The mixins of the generated classes: what is done to the gradients of a step."""

import functools
import numbers
import re
import reprlib
import types
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_normopt import blocks, norms, registry, sparse, step_sizes
from keras_normopt.monitoring import NormTracker
from keras_normopt.normalization import floored, measure, rescale
from keras_normopt.road import Road

_LARGEST = float(np.finfo("float32").max)


class Rescaling(Road):
    """What normalized and clipping optimizers share. Not for use by itself."""

    # The keyword-only arguments that are added to those of the base, with defaults.
    OPTIONS: Mapping[str, Any] = types.MappingProxyType(
        {"norm": "l2", "scope": "variable", "exclude": (), "track_norms": False}
    )
    PREFIX = ""

    def __init__(self, *args, **kwargs):
        options = {
            name: kwargs.pop(name, default) for name, default in self.OPTIONS.items()
        }
        # Before Keras's own: a wrong argument should not leave half an optimizer.
        options = self._checked(**options)
        super().__init__(*args, **kwargs)
        for name, value in options.items():
            setattr(self, f"_{name}", value)
        self._norm_function = registry.get(self._norm)
        self._block_names, self._block_of = [], []
        self._own_variables = {}
        self._norm_tracker = None

    def _checked(self, norm, scope, exclude, track_norms):
        self._check_norm(norm, scope)
        if not isinstance(track_norms, bool):
            raise ValueError(
                "`track_norms` must be True or False. "
                f"Received: track_norms={reprlib.repr(track_norms)}"
            )
        return {
            "norm": norm,
            "scope": scope,
            "exclude": _checked_patterns(exclude),
            "track_norms": track_norms,
        }

    @staticmethod
    def _check_norm(norm, scope):
        function = registry.get(norm)
        if not isinstance(scope, str) or scope not in blocks.SCOPES:
            raise ValueError(
                f"`scope` must be one of {', '.join(map(repr, blocks.SCOPES))}. "
                f"Received: scope={reprlib.repr(scope)}"
            )
        if scope != "variable" and isinstance(function, registry.ReturnsGradient):
            raise ValueError(
                f"norm={norm!r} returns the normalized gradient: there is no norm to "
                f"share. Received: scope={scope!r}. Pass "
                'scope="variable", or a function that returns a norm.'
            )

    @property
    def norm(self) -> Any:
        """A registered name, a function from a gradient to its norm, or `None`."""
        return self._norm

    @norm.setter
    def norm(self, norm: Any) -> None:
        self._check_norm(norm, self._scope)
        self._norm_function = registry.get(norm)
        self._norm = norm

    @property
    def scope(self) -> str:
        """What one norm spans: `"variable"`, `"unit"`, `"layer"` or `"global"`."""
        return self._scope

    @property
    def exclude(self) -> tuple[str, ...]:
        """Regular expressions for the paths of variables that are left alone."""
        return self._exclude

    @property
    def track_norms(self) -> bool:
        """Whether the norms of the gradients are kept."""
        return self._track_norms

    @property
    def gradient_norms(self) -> dict[str, float]:
        """The norm of each block's gradient in the last step, by the block's name.

        It is that of the gradient as it arrives to be rescaled. Empty before the first
        step.

        Raises:
            AttributeError: If the optimizer was not made with `track_norms=True`.
        """
        tracker = self.norm_tracker
        return tracker.last if tracker else {}

    @property
    def norm_tracker(self) -> NormTracker | None:
        """Where the norms are kept; `None` before the optimizer is built."""
        if not self._track_norms:
            raise AttributeError(
                f"{type(self).__name__} keeps no gradient norms. Make it with "
                "`track_norms=True`."
            )
        return self._norm_tracker

    def get_config(self):
        config = {name: getattr(self, name) for name in self.OPTIONS}
        config["norm"] = registry.serialize(self.norm)
        config["exclude"] = list(self.exclude)
        return super().get_config() | config

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        paths = [getattr(v, "path", v.name) for v in variables]
        left_out = [any(re.search(p, path) for p in self._exclude) for path in paths]
        if self._exclude and not any(left_out):
            warnings.warn(
                f"exclude={self._exclude} of {type(self).__name__} matches none of the "
                f"variables. Their paths are {reprlib.repr(paths)}.",
                stacklevel=2,
            )
        self._warn_of_clipping_in_vain(any(left_out))
        included = [
            i
            for i, variable in enumerate(variables)
            if not (left_out[i] or getattr(variable, "overwrite_with_gradient", False))
        ]
        self._block_names, numbers_of_blocks = blocks.partition(
            self._scope, [paths[i] for i in included]
        )
        self._block_of = [None] * len(variables)
        for i, number in zip(included, numbers_of_blocks, strict=True):
            self._block_of[i] = number
        if self._track_norms:
            self._norm_tracker = NormTracker(self._block_names, self._add_own_variable)

    def _add_own_variable(self, name, **arguments):
        """Adds a variable beyond those of the base, the same on all replicas."""
        variable = self.add_variable(
            name=name, aggregation="only_first_replica", **arguments
        )
        self._own_variables[name] = variable
        return variable

    # Apart from those of the base, so that its slots are loaded from a file that was
    # saved with other options, and the other way round.
    def save_own_variables(self, store):
        own = {id(v) for v in self._own_variables.values()}
        of_base = [v for v in self.variables if id(v) not in own]
        for key, variable in [*enumerate(of_base), *self._own_variables.items()]:
            store[str(key)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        own = {id(v) for v in self._own_variables.values()}
        of_base = [v for v in self.variables if id(v) not in own]
        stored = [key for key in store.keys() if key.isdecimal()]  # noqa: SIM118
        if len(stored) != len(of_base):
            super().load_own_variables(store)  # Which says what is wrong.
            return
        for i, variable in enumerate(of_base):
            variable.assign(store[str(i)])
        for name, variable in self._own_variables.items():
            if name in store and tuple(store[name].shape) == tuple(variable.shape):
                variable.assign(store[name])

    def _warn_of_clipping_in_vain(self, any_excluded):
        raise NotImplementedError

    def _divisor(self, norm):
        raise NotImplementedError

    def _rescale(self, grads, variables):
        if not (self._is_on() or self._track_norms):
            return grads
        grads = [sparse.prepare(g, v) for g, v in zip(grads, variables, strict=True)]
        positions = {}
        for position, variable in enumerate(variables):
            number = self._block_of[self._get_variable_index(variable)]
            if number is not None:
                positions.setdefault(number, []).append(position)
        if not positions:
            return grads
        return self._rescale_blocks(grads, variables, positions)

    def _is_on(self):
        return self._norm_function is not None

    def _rescale_blocks(self, grads, variables, positions):
        members = list(positions.values())
        per_unit = self._scope == "unit"
        if self._norm_function is None:
            rescaled = grads
            values = functools.partial(measure, grads, members, norms.l2, per_unit)
        else:
            rescaled, values = rescale(
                grads, members, self._norm_function, self._divisor, per_unit
            )
        if self._track_norms:
            self._norm_tracker.update(list(positions), values())
        return rescaled


class Normalization(Rescaling):
    """What a normalized optimizer adds to its base. Not for use by itself."""

    OPTIONS = Rescaling.OPTIONS | {"norm_epsilon": 1e-30, "step_size": None}
    PREFIX = "Normalized"
    VERB = "normalize"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._kept = {}
        if self._step_size is not None:
            self._check_base_takes_factors()

    def _checked(self, norm_epsilon, step_size, **options):
        _check_epsilon(norm_epsilon)
        return super()._checked(**options) | {
            "norm_epsilon": float(norm_epsilon),
            "step_size": step_sizes.get(step_size),
        }

    def _check_base_takes_factors(self):
        # Ftrl finds its weights anew each time, from sums over all rates so far.
        scales = isinstance(self, keras.optimizers.Lamb | keras.optimizers.Ftrl)
        if isinstance(self, keras.optimizers.Adafactor):
            scales = self.relative_step
        if scales:
            raise ValueError(
                f"{type(self).__name__} sets the size of its steps by itself: there is "
                "no learning rate of a step to multiply. Received: "
                f"step_size={step_sizes.serialize(self._step_size)}. Leave it out, or "
                "take another base (or Adafactor with `relative_step=False`)."
            )
        owner = self._next_in_line("_backend_update_step")
        if owner.__module__.partition(".")[0] != "keras":
            raise ValueError(
                f"{owner.__name__} updates all variables together, in its "
                "`_backend_update_step`, with one learning rate. Received: "
                f"step_size={step_sizes.serialize(self._step_size)}. Leave it out, or "
                "move the update to `update_step`."
            )

    def _next_in_line(self, name):
        """The class of the base that a call of a method goes to."""
        mro = type(self).__mro__
        return next(c for c in mro[mro.index(Road) + 1 :] if name in vars(c))

    def get_config(self):
        return super().get_config() | {
            "step_size": step_sizes.serialize(self._step_size)
        }

    @property
    def norm_epsilon(self) -> float:
        """The floor of the norm, a finite float of at least 0."""
        return self._norm_epsilon

    @norm_epsilon.setter
    def norm_epsilon(self, norm_epsilon: float) -> None:
        _check_epsilon(norm_epsilon)
        self._norm_epsilon = float(norm_epsilon)

    @property
    def step_size(self) -> Any:
        """An object of `keras_normopt.step_sizes`, or `None`."""
        return self._step_size

    def _divisor(self, norm):
        return floored(norm, self._norm_epsilon)

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        if self._step_size is None:
            return
        # The factors are variables, as TensorFlow hands nothing else on from where
        # gradients are rescaled to the replicas' updates.
        for i, variable in enumerate(variables):
            if self._block_of[i] is not None:
                shape = blocks.norm_shape(variable.shape, self._scope == "unit")
                self._kept[i] = self._step_size.add_variables(
                    self._add_own_variable, i, variable, shape
                )

    def _is_on(self):
        return super()._is_on() or self._step_size is not None

    def _rescale_blocks(self, grads, variables, positions):
        if self._step_size is not None:
            indices = [self._get_variable_index(v) for v in variables]
            factors = self._step_size.factors(
                grads,
                [ops.convert_to_tensor(v) for v in variables],
                list(positions.values()),
                self._scope == "unit",
                [self._kept.get(i) for i in indices],
            )
            for position, factor in factors.items():
                variable, *_ = self._kept[indices[position]]
                variable.assign(ops.cast(factor, "float32"))
        return super()._rescale_blocks(grads, variables, positions)

    def update_step(self, gradient, variable, learning_rate):
        if self._step_size is not None:
            kept = self._kept.get(self._get_variable_index(variable))
            if kept:
                learning_rate = ops.multiply(
                    ops.cast(learning_rate, variable.dtype),
                    ops.cast(ops.convert_to_tensor(kept[0]), variable.dtype),
                )
        super().update_step(gradient, variable, learning_rate)

    def _update_at_the_place(self, grads, variables, learning_rate):
        if self._step_size is None or not hasattr(self, "_parallel_update_step"):
            super()._update_at_the_place(grads, variables, learning_rate)
            return
        # Keras's foreach classes for PyTorch know one learning rate only. Past their
        # override is the base's own, which steps variable by variable.
        foreach = self._next_in_line("_backend_update_step")
        super(foreach, self)._backend_update_step(grads, variables, learning_rate)

    def _warn_of_clipping_in_vain(self, any_excluded):
        # Known of the built-in norms, all of which are homogeneous.
        if any_excluded or self._norm_function not in norms.BUILT_IN.values():
            return
        in_vain = ["global_clipnorm"]
        if self._scope in ("variable", "unit"):
            in_vain.append("clipnorm")
        for name in in_vain:
            if (getattr(self, name) or 0) > 0:
                warnings.warn(
                    f"{name}={getattr(self, name)} has no effect on "
                    f"{type(self).__name__} with norm={self.norm!r}: it clips the raw "
                    "gradient, which keeps its direction, and its length is divided "
                    f"out after that. Leave `{name}` out, or use `clipvalue`, which "
                    "bounds each entry.",
                    stacklevel=3,
                )


class Clipping(Rescaling):
    """What a clipping optimizer adds to its base. Not for use by itself."""

    OPTIONS = Rescaling.OPTIONS | {"max_norm": 1.0}
    PREFIX = "Clipped"
    VERB = "clip"

    def _checked(self, max_norm, **options):
        _check_max_norm(max_norm)
        return super()._checked(**options) | {"max_norm": float(max_norm)}

    @staticmethod
    def _check_norm(norm, scope):
        if isinstance(registry.get(norm), registry.ReturnsGradient):
            raise ValueError(
                f"norm={norm!r} returns the normalized gradient, which has no norm to "
                "clip by. Pass a function that returns a norm."
            )
        Rescaling._check_norm(norm, scope)

    @property
    def max_norm(self) -> float:
        """The largest norm that a gradient may have, a finite float above 0."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, max_norm: float) -> None:
        _check_max_norm(max_norm)
        self._max_norm = float(max_norm)

    def _divisor(self, norm):
        return floored(ops.divide(norm, norms.like(norm, self._max_norm)), 1.0)

    def _warn_of_clipping_in_vain(self, any_excluded):
        pass  # Keras's clipping comes first, and then ours: both act.


def _checked_patterns(exclude):
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    problem = "`exclude` must be a regular expression, or a list or tuple of them. "
    received = f"Received: exclude={reprlib.repr(exclude)}"
    if not isinstance(patterns, list | tuple):
        raise TypeError(problem + received)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(problem + received)
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{problem}{received}: {error}") from error
    return tuple(patterns)


def _is_finite_float(value):
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and -_LARGEST <= value <= _LARGEST
    )


def _check_epsilon(norm_epsilon):
    if not _is_finite_float(norm_epsilon) or norm_epsilon < 0:
        raise ValueError(
            "`norm_epsilon` must be a finite float of at least 0, within float32. "
            f"Received: norm_epsilon={reprlib.repr(norm_epsilon)}"
        )


def _check_max_norm(max_norm):
    if not _is_finite_float(max_norm) or not float(max_norm) > 0:
        raise ValueError(
            "`max_norm` must be a finite float above 0, within float32. "
            f"Received: max_norm={reprlib.repr(max_norm)}"
        )
