"""The base class of the generated optimizers, with the options of both kinds."""

from __future__ import annotations

import functools
import inspect
import reprlib
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._blocks.gradients import Gradients
from keras_normopt._blocks.partition import SCOPES, Blocks
from keras_normopt._optimizer.arguments import (
    check_axes,
    check_choice,
    check_flag,
    check_patterns,
    read_only,
    refuse_after_build,
)
from keras_normopt._optimizer.docstrings import options_of
from keras_normopt._optimizer.measuring import Measuring
from keras_normopt._optimizer.rates import Rates
from keras_normopt._optimizer.representation import represent
from keras_normopt._optimizer.skipping import Skipping
from keras_normopt._optimizer.state import OwnVariables, Paths
from keras_normopt._optimizer.types import (
    ApplyTo,
    AxesByPattern,
    NormLike,
    Patterns,
    Scope,
    StepSize,
    TrackNorms,
)
from keras_normopt._optimizer.update_capture import UpdateCapture
from keras_normopt._transforms import step_size_argument
from keras_normopt._transforms.center import center
from keras_normopt._transforms.track_norms import NormTracker
from keras_normopt.norms import _registry, l2

#: Changes the `Gradients` of one step.
Transform: TypeAlias = Callable[[Gradients], None]


class OptimizerMixin(Paths, OwnVariables, Measuring, Skipping, Rates, UpdateCapture):
    """Adds options to an optimizer, and makes the transforms for them.

    A transform changes the `Gradients` of one step. `build` makes two tuples of
    transforms: one for gradients before the base optimizer receives them, and one for
    its updates.

    Args:
        norm: How to measure a gradient. A string names a built-in norm, or a norm
            registered with `keras_normopt.register_norm`. A function takes a gradient
            and returns its norm, a scalar tensor. `None` leaves gradients unchanged.
            The built-in norms are `"l1"`, `"l2"`, `"l1_l2"`, `"avg_l1"`, `"avg_l2"`,
            `"avg_l1_l2"`, `"max"` (or `"linf"`), `"min_max"` and `"std"`: see
            `keras_normopt.norms`. Defaults to `"l2"`.
        scope: Which gradients share a norm, as one block. `"variable"` gives each
            variable its own norm. `"unit"` gives a norm to each output unit of a
            kernel, over its input axes, and to each vector or scalar. `"layer"` gives
            one norm to all variables of a layer, as if they were one long vector. Their
            paths are the same up to the last `/`. `"global"` gives one norm to all
            variables together. Defaults to `"variable"`.
        exclude: Regular expression, or list of regular expressions. If one of them is
            found in the path of a variable, the optimizer uses the raw gradient of the
            variable. An example is `("bias", "gamma", "beta")`. Defaults to `()`.
        track_norms: Whether to keep norms for the property `gradient_norms` and the
            callback `keras_normopt.callbacks.GradientNorms`. `True` keeps the norm of
            each block's gradient before the step changes it (l2 if `norm` is `None`).
            `"all"` also keeps the l2 norms of weights and updates, and their ratio. The
            norm of weights is from before the step, and updates include weight decay.
            Defaults to `False`.
        apply_to: What to measure and rescale. `"gradient"` rescales gradients before
            {base} receives them. `"update"` rescales the u in the step w ← w + lr · u
            of {base}. The update includes momentum, but not weight decay. The learning
            rate may be 0, or negative, which reverses the step. Ftrl and
            ScheduleFreeAdamW reject `"update"`, because they recompute weights from
            slots. Defaults to `"gradient"`.
        centralize: Boolean, whether to subtract the mean from the gradient of each
            output unit of a kernel (arXiv 2004.01461). The mean is over the input axes,
            and the norm is computed after that. Updates are never centralized. Defaults
            to `False`.
        axes: Dictionary from regular expressions to the axes of kernels. The first
            expression found in the path of a variable counts. A value is
            `(inputs, outputs)`, two tuples of integers. With `(inputs, outputs, parts)`
            the outputs are several matrices side by side, such as gates. A value may
            also be `"vector"` or `"embedding"`. Axes that are not listed count separate
            matrices, such as heads. Layers of Keras need no entry. `scope="unit"`,
            `centralize` and `direction` use axes. Defaults to `None`.
        step_size: What to multiply the learning rate by. A dictionary maps regular
            expressions to factors. The first expression found in the path of a variable
            counts. A factor is a float of at least 0, or a `LearningRateSchedule`,
            which counts optimizer steps. It also multiplies the weight decay, and acts
            on excluded variables. With 0 a variable does not change, but the slots of
            {base} do. `"weight_norm"` is the norm of each block's weights, as in LARS.
            `"gradient_correlation"` adapts to how successive gradients agree. Objects
            of `keras_normopt.step_sizes` take arguments. A list multiplies the factors
            of dictionaries and at most one name or object. With `apply_to="gradient"`,
            Lamb, Ftrl and Adafactor with `relative_step` reject names and objects,
            because they set the size of their steps. Defaults to `None`.
    """

    scope = read_only("scope", 'Which gradients share a norm, such as `"variable"`.')
    exclude = read_only(
        "exclude", "Regular expressions for paths of excluded variables."
    )
    track_norms = read_only(
        "track_norms", 'Whether norms are kept, a boolean or `"all"`.'
    )
    apply_to = read_only("apply_to", 'What is rescaled, `"gradient"` or `"update"`.')
    centralize = read_only("centralize", "Whether the mean of each unit is subtracted.")
    axes = read_only("axes", "Dictionary from patterns to the axes of kernels.")

    PREFIX: str
    CLIPS = False
    #: The keyword-only arguments that the mixin adds to the base optimizer's arguments.
    OPTIONS: dict[str, inspect.Parameter]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "PREFIX" in vars(cls):
            cls.OPTIONS = options_of(OptimizerMixin) | options_of(cls)

    def __init__(
        self,
        *args: Any,
        norm: NormLike = "l2",
        scope: Scope = "variable",
        exclude: Patterns = (),
        track_norms: TrackNorms = False,
        apply_to: ApplyTo = "gradient",
        centralize: bool = False,
        axes: AxesByPattern | None = None,
        step_size: StepSize = None,
        **kwargs: Any,
    ) -> None:
        # Checks all arguments first, so that a wrong argument does not leave an
        # incomplete optimizer.
        check_choice("scope", scope, SCOPES)
        resolved_norm = self._resolve(norm, scope)
        exclude = check_patterns(exclude)
        check_choice("apply_to", apply_to, ("gradient", "update"))
        if not isinstance(track_norms, bool) and track_norms != "all":
            raise ValueError(
                "`track_norms` must be True, False or 'all'. "
                f"Received: track_norms={reprlib.repr(track_norms)}"
            )
        check_flag("centralize", centralize)
        axes = check_axes(axes)
        step_size = step_size_argument.get(step_size)
        super().__init__(*args, **kwargs)
        # Keeps the function, because its name may be registered for another function
        # later.
        self._norm, self._resolved_norm = norm, resolved_norm
        self._scope, self._exclude, self._apply_to = scope, exclude, apply_to
        self._track_norms, self._centralize = track_norms, centralize
        self._axes, self._step_size = axes, step_size
        if step_size is not None:
            self._check_base_takes_factors()
        if apply_to == "update":
            self._check_base_can_be_captured()
        self._blocks: Any = None  # The `Blocks`, made by `build`.
        self._norm_tracker: NormTracker | None = None
        self._gradient_transforms: tuple[Transform, ...] | None = None
        self._update_transforms: tuple[Transform, ...] | None = None

    def get_config(self):
        config = {
            "norm": _registry.serialize(self.norm),
            "scope": self.scope,
            "exclude": list(self.exclude),
            "track_norms": self.track_norms,
            "apply_to": self.apply_to,
            "centralize": self.centralize,
            # Pairs, because some ways of saving sort dictionaries.
            "axes": self.axes and [list(pair) for pair in self.axes.items()],
            "step_size": step_size_argument.serialize(self.step_size),
        }
        return self._add_paths(super().get_config() | config)

    def __repr__(self) -> str:
        return represent(self)

    def _kept(self, name, default):
        """Returns the value that the optimizer keeps for the default of an option."""
        return default

    @property
    def norm(self) -> NormLike:
        """The name of a norm, a function from a gradient to its norm, or `None`."""
        return self._norm

    @norm.setter
    def norm(self, norm: NormLike) -> None:
        resolved_norm = self._resolve(norm, self.scope)
        if self.built and norm != self._norm:
            refuse_after_build(self, "norm", norm, "")
        self._norm, self._resolved_norm = norm, resolved_norm

    @classmethod
    def _resolve(cls, norm, scope):
        """Returns the `Norm` that the argument `norm` stands for, or `None`."""
        resolved = _registry.get(norm)
        if resolved is not None and scope != "variable":
            reason = f"Received: scope={scope!r}, which needs the norm"
            resolved.require_norm(norm, reason)
        return resolved

    def build(self, variables):
        if self.built:
            return
        # Errors must come before Keras's `build`, which marks the optimizer as built.
        self._paths = self._paths_of(variables)
        if self._uses_axes():
            self._variable_axes = self._axes_of(variables)
        elif self.axes:
            warnings.warn(
                f"`axes` of {type(self).__name__} has no effect. Only `direction`, "
                '`scope="unit"` and `centralize` use axes. '
                f"Received: axes={reprlib.repr(self.axes)}",
                stacklevel=3,
            )
        self._blocks = Blocks(
            self.scope, self.exclude, variables, self._paths, self._variable_axes
        )
        if self._resolved_norm is not None:
            self._resolved_norm.check(self._blocks, variables)
        super().build(variables)
        gradient_transforms, update_transforms = self._make_transforms(variables)
        if gradient_transforms or update_transforms:
            self._check_dtypes(variables)
        self._gradient_transforms = tuple(gradient_transforms)
        self._update_transforms = tuple(update_transforms)

    def _uses_axes(self):
        return self.scope == "unit" or self.centralize

    def _make_transforms(self, variables):
        """Makes the transforms, and adds their variables.

        Returns:
            A pair of lists: functions for gradients, and functions for updates.
        """
        # The step sizes come first, because they use raw gradients.
        on_gradients, final_updates = self._make_step_sizes(variables)
        if self.track_norms == "all":
            self._require_methods('track_norms="all"', "_apply_weight_decay")
        if self.track_norms:
            self._norm_tracker = NormTracker(
                self._blocks.names,
                functools.partial(self._add_own_variable, changes_when_skipped=True),
                clips=self.CLIPS,
                skips=getattr(self, "skip", False),
                updates=self.track_norms == "all",
            )
            norm = l2.norm if self._resolved_norm is None else self._resolved_norm
            is_shared = self._resolved_norm is not None and self.apply_to == "gradient"
            on_gradients.append(
                functools.partial(
                    self._norm_tracker.update, norm=norm.tracked, is_shared=is_shared
                )
            )
        if self.centralize:
            on_gradients.append(functools.partial(center, axes=self._variable_axes))
        on_updates: list[Transform] = []
        if self._rescales():
            rescale = self._make_rescaling(variables)
            target = on_gradients if self.apply_to == "gradient" else on_updates
            target.append(rescale)
        return on_gradients, on_updates + final_updates

    def _rescales(self):
        """Returns whether a norm or a direction changes gradients or updates."""
        return self._resolved_norm is not None

    def _make_rescaling(self, variables):
        """Makes the transform that normalizes, clips, or replaces by directions."""
        raise NotImplementedError

    def _check_dtypes(self, variables):
        # The tracked total includes excluded variables.
        wrong = [
            path
            for variable, path, number in zip(
                variables, self._paths, self._blocks.block_of, strict=True
            )
            if "complex" in keras.backend.standardize_dtype(variable.dtype)
            and (number is not None or self.track_norms)
        ]
        if wrong:
            raise ValueError(
                f"{type(self).__name__} cannot {self.VERB} complex gradients. Received "
                f"the complex variables {reprlib.repr(wrong)}. Keep real and imaginary "
                "parts in one real variable, or leave these variables out with "
                "`exclude` and without `track_norms`."
            )

    def _transform_gradients(self, grads, variables):
        if self._gradient_transforms is None:
            raise RuntimeError(
                f"{type(self).__name__} cannot {self.VERB} gradients, because it is "
                "not built: its `build` failed or was not called. Make a new "
                "optimizer, and compile the model with it."
            )
        grads = self._transform(self._gradient_transforms, grads, variables)
        self._apply_pending_decay()
        return grads

    def _transform_updates(self, updates, variables, learning_rate):
        rate = ops.cast(learning_rate, "float32")
        return self._transform(self._update_transforms, updates, variables, rate)

    def _captures_updates(self):
        return bool(self._update_transforms)

    def _transform(self, transforms, tensors, variables, rate=None):
        if not transforms:
            return tensors
        indices = [self._get_variable_index(v) for v in variables]
        blocks = self._blocks.positions_by_block(indices)
        tensors = [
            sparse.prepare(t, v) for t, v in zip(tensors, variables, strict=True)
        ]
        units = self._blocks.units and [self._blocks.units[i] for i in indices]
        gradients = Gradients(tensors, blocks, units, variables, indices, rate)
        for transform in transforms:
            transform(gradients)
        return gradients.tensors

    @property
    def gradient_norms(self) -> dict[str, float]:
        """The norm of each block's gradient in the last step, by the block's name.

        The gradients are measured before this package changes them. `"total"` is the l2
        norm of all gradients together. The dict is empty before the optimizer is built.
        With a `LossScaleOptimizer`, use
        `model.optimizer.inner_optimizer.gradient_norms`.

        Raises:
            AttributeError: If the optimizer was not made with `track_norms=True`.
        """
        tracker = self.norm_tracker
        return tracker.last if tracker else {}

    @property
    def update_ratios(self) -> dict[str, float]:
        """The ratio ‖update‖ / ‖weights‖ of each block in the last step, by block name.

        `"total"` is the ratio of all variables together. The dict is empty before the
        optimizer is built.

        Raises:
            AttributeError: If the optimizer was not made with `track_norms="all"`.
        """
        if self.track_norms != "all":
            raise AttributeError(
                f"{type(self).__name__} measures no updates. Make it with "
                '`track_norms="all"`.'
            )
        tracker = self._norm_tracker
        return tracker.statistics["ratios"].last if tracker else {}

    @property
    def norm_tracker(self) -> NormTracker | None:
        """The `NormTracker`, or `None` before the optimizer is built."""
        if not self._track_norms:
            raise AttributeError(
                f"{type(self).__name__} keeps no gradient norms. Make it with "
                "`track_norms=True`."
            )
        return self._norm_tracker
