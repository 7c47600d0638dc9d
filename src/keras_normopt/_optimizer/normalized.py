"""Adds normalization to an optimizer: `NormalizedMixin`."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from keras_normopt._optimizer.arguments import read_only
from keras_normopt._optimizer.mixin import OptimizerMixin
from keras_normopt._optimizer.types import DirectionLike
from keras_normopt._transforms import direction_argument
from keras_normopt._transforms.config import checked_float
from keras_normopt._transforms.direction import point
from keras_normopt._transforms.rescale import normalize
from keras_normopt.norms._overflow import BuiltIn


class NormalizedMixin(OptimizerMixin):
    """{base} with normalized gradients.

    Before the update of {base}, the optimizer divides the gradient g of each variable
    by its norm:

        g ← g / max(norm(g), norm_epsilon)

    So {base} receives gradients of norm 1, however small or large they were. A gradient
    of zeros stays zero. Keras first divides out the loss scale, accumulates gradients
    and clips them. Weight decay is not normalized. Norms are computed in float32
    (float64 for float64 gradients). The result has the shape and dtype of the gradient.
    Saved state loads into {base}, unless `track_norms` or an object in `step_size` adds
    variables. Saved state of {base} always loads here.

    With `apply_to="update"`, the optimizer divides the update u of {base} instead:

        w ← w + lr · u / max(norm(u), norm_epsilon)

    So the step itself has norm lr, however {base} computes it.

    Args:
        norm_epsilon: Float, at least 0 and finite, the floor of the norm. Gradients
            with a smaller norm do not reach norm 1. The default is tiny, because
            gradients of deep networks can be tiny too. Raise it, for example to 1e-7,
            if rounding noise should not make full steps. The gradient of a bias before
            a batch normalization is such noise. With a `direction`, steps shrink in
            proportion once the largest entry is below `norm_epsilon`. So momentum that
            has decayed to almost 0 makes almost no steps. You may set it during
            training, as with `learning_rate`. `None` stands for 1e-30, or for 1e-20
            with a direction. Defaults to `None`.
        direction: What replaces each gradient, or each update with `apply_to="update"`,
            instead of a division by a norm. It is `"orthogonal"`, `"sign"`, `"rows"`,
            an object of `keras_normopt.directions`, or `None`. A dictionary maps
            regular expressions to these values. The first expression found in the path
            of a variable counts. If no expression is found, the optimizer uses the raw
            gradient. A direction sets the length of the step, so `norm` must be left
            out. `scope="unit"` raises an error, because scaling units would undo the
            direction. Defaults to `None`.

    References:
        - [Yu et al., 2017, Block-Normalized Gradient Method: An Empirical Study for
          Training Deep Neural Network](https://arxiv.org/abs/1707.04822)
        - [Cutkosky, Mehta, 2020, Momentum Improves Normalized
          SGD](https://arxiv.org/abs/2002.03305), for `apply_to="update"`
    """

    direction = read_only(
        "direction", "An object of `keras_normopt.directions`, a dictionary, or `None`."
    )

    PREFIX = "Normalized"
    VERB = "normalize"

    def __init__(
        self,
        *args: Any,
        norm_epsilon: float | None = None,
        direction: DirectionLike = None,
        **kwargs: Any,
    ) -> None:
        direction = direction_argument.get(direction)
        if norm_epsilon is None:
            norm_epsilon = _default_epsilon(direction)
        norm_epsilon = checked_float(norm_epsilon, "norm_epsilon", at_least=0)
        if direction is not None:
            _check_direction(direction, **kwargs)
            kwargs["norm"] = None
        super().__init__(*args, **kwargs)
        self._norm_epsilon = norm_epsilon
        self._direction = direction
        self._directions: list[Any] = []

    def get_config(self):
        config = {
            "norm_epsilon": self.norm_epsilon,
            "direction": direction_argument.serialize(self.direction),
        }
        return super().get_config() | config

    def _kept(self, name, default):
        if name == "norm_epsilon" and default is None:
            return _default_epsilon(self.direction)
        if name == "norm" and self.direction is not None:
            return None
        return default

    @OptimizerMixin.norm.setter  # type: ignore[attr-defined]
    def norm(self, norm):
        if self.direction is not None:
            _check_direction(self.direction, norm)
        OptimizerMixin.norm.fset(self, norm)  # type: ignore[attr-defined]

    @property
    def norm_epsilon(self) -> float:
        """The floor of the norm, a finite float of at least 0."""
        return self._norm_epsilon

    @norm_epsilon.setter
    def norm_epsilon(self, value: float) -> None:
        self._norm_epsilon = checked_float(value, "norm_epsilon", at_least=0)
        self._assign_own_variable("norm_epsilon", self._norm_epsilon)

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._warn_of_useless_clipping()

    def _uses_axes(self):
        return super()._uses_axes() or self.direction is not None

    def _is_doubtful(self, path, layer, variable):
        direction = direction_argument.direction_of_path(self.direction, path)
        if direction is None or not direction.uses_axes:
            return super()._is_doubtful(path, layer, variable)
        return layer is not None or len(variable.shape) > 2

    def _rescales(self):
        return super()._rescales() or self.direction is not None

    def _make_rescaling(self, variables):
        epsilon = self._add_own_variable("norm_epsilon", value=self.norm_epsilon)
        if self.direction is not None:
            axes = self._variable_axes
            paths = [
                None if number is None else path
                for number, path in zip(self._blocks.block_of, self._paths, strict=True)
            ]
            self._directions = direction_argument.resolve(self.direction, paths, axes)
            return functools.partial(
                point,
                directions=self._directions,
                axes=axes,
                epsilon=epsilon,
            )
        return functools.partial(normalize, norm=self._resolved_norm, epsilon=epsilon)

    def _warn_of_useless_clipping(self):
        # Only built-in norms are known to be homogeneous.
        has_norm = isinstance(self._resolved_norm, BuiltIn)
        has_directions = self.direction is not None and all(self._directions)
        if self.apply_to == "update" or any(self._blocks.excluded):
            return
        if not (has_norm or has_directions):
            return
        useless = ["global_clipnorm"]
        if self.scope in ("variable", "unit"):
            useless.append("clipnorm")
        for name in useless:
            if (getattr(self, name) or 0) > 0:
                option = f"norm={self.norm!r}"
                if has_directions:
                    option = f"direction={self.direction}"
                warnings.warn(
                    f"{name}={getattr(self, name)} has no effect on "
                    f"{type(self).__name__} with {option}. It only scales the raw "
                    "gradient, and the optimizer divides out this scale. Leave "
                    f"`{name}` out, or use `clipvalue`, which bounds each entry.",
                    stacklevel=3,
                )


def _default_epsilon(direction):
    return 1e-30 if direction is None else 1e-20


def _check_direction(direction, norm=None, scope="variable", **other):
    """Raises a `ValueError` for a norm or scope that no direction allows."""
    received = f"direction={direction}"
    if norm is not None:
        raise ValueError(
            "A direction sets the length of each step, so `norm` must be None. "
            f"Received: norm={norm!r}, {received}. Leave out one of the two."
        )
    if scope == "unit":
        raise ValueError(
            "Scaling units would undo the direction. "
            f'Received: scope="unit", {received}. Leave `scope` out. '
            'direction="rows" gives every unit the same length.'
        )
