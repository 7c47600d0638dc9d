"""Adds clipping to an optimizer: `ClippedMixin`."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_normopt._optimizer.arguments import (
    check_count,
    check_flag,
    read_only,
    refuse_after_build,
)
from keras_normopt._optimizer.mixin import OptimizerMixin
from keras_normopt._optimizer.types import MaxNorm
from keras_normopt._transforms import thresholds
from keras_normopt._transforms.rescale import clip


class ClippedMixin(OptimizerMixin):
    """{base} with gradients clipped by any norm.

    Before the update of {base}, the optimizer scales down each gradient g whose norm is
    above `max_norm`:

        g ← g · min(1, max_norm / norm(g))

    The direction of g does not change. With `apply_to="update"`, it scales down the
    update u of {base} instead:

        w ← w + lr · u · min(1, max_norm / norm(u))

    Keras first divides out the loss scale, accumulates gradients and does its own
    clipping. Weight decay is not clipped. Norms are computed in float32 (float64 for
    float64 gradients). The result has the shape and dtype of the gradient. Saved state
    loads into {base}, unless `track_norms`, `skip`, a `RunningNorm` or an object in
    `step_size` adds variables. Saved state of {base} always loads here.

    Args:
        max_norm: The largest norm that a gradient may keep. A float is finite and above
            0. A `LearningRateSchedule` returns such floats, and counts steps of the
            optimizer. `keras_normopt.WeightNorm(...)` is a fraction of the norm of the
            block's weights, as in adaptive gradient clipping.
            `keras_normopt.RunningNorm(...)` is a multiple of the running mean of the
            block's own norm, as in AdaGC. The names `"weight_norm"` and
            `"running_norm"` stand for these objects with their defaults. During
            training, a float may replace a float, as with `learning_rate`. Defaults to
            `1.0`.
        skip: Boolean. If `True`, the optimizer skips a step if its gradient would be
            clipped, or if the norm is infinite or NaN. A skipped step changes no state:
            no slot, weight decay, moving average, running norm or `iterations`.
            `skip=True` needs a norm, `scope="global"` and `apply_to="gradient"`.
            Defaults to `False`.
        max_skips: Integer, at least 1. How many steps in a row may be skipped. After
            that, gradients are clipped instead, until a norm is at most `max_norm`.
            Steps with non-finite gradients are always skipped. Defaults to `10`.

    References:
        - [Pascanu et al., 2013, On the difficulty of training recurrent neural
          networks](https://arxiv.org/abs/1211.5063)
        - [Brock et al., 2021, High-Performance Large-Scale Image Recognition Without
          Normalization](https://arxiv.org/abs/2102.06171), for `WeightNorm`
    """

    PREFIX = "Clipped"
    VERB = "clip"
    CLIPS = True

    skip = read_only("skip", "Whether to skip steps whose gradient would be clipped.")
    max_skips = read_only("max_skips", "How many steps in a row may be skipped.")

    def __init__(
        self,
        *args: Any,
        max_norm: MaxNorm = 1.0,
        skip: bool = False,
        max_skips: int = 10,
        **kwargs: Any,
    ) -> None:
        max_norm = thresholds.get(max_norm)
        check_flag("skip", skip)
        check_count("max_skips", max_skips)
        if skip:
            _check_skip(**kwargs)
        super().__init__(*args, **kwargs)
        self._max_norm, self._skip = max_norm, skip
        self._max_skips = int(max_skips)

    def get_config(self):
        return super().get_config() | {
            "max_norm": thresholds.serialize(self.max_norm),
            "skip": self.skip,
            "max_skips": self.max_skips,
        }

    @property
    def skipped_steps(self) -> int:
        """The number of steps skipped so far.

        Raises:
            AttributeError: If the optimizer was not made with `skip=True`.
        """
        if not self.skip:
            raise AttributeError(
                f"{type(self).__name__} skips no steps, so it does not count them. "
                "Make it with `skip=True`."
            )
        return int(ops.convert_to_numpy(self._all_skips)) if self.built else 0

    @property
    def max_norm(self) -> MaxNorm:
        """The largest norm that a gradient may keep, a float or an object."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: MaxNorm) -> None:
        value = thresholds.get(value)
        are_floats = isinstance(value, float) and isinstance(self._max_norm, float)
        if are_floats:
            self._assign_own_variable("max_norm", value)
        elif self.built and value != self._max_norm:
            advice = ", unless a float replaces a float"
            refuse_after_build(self, "max_norm", value, advice)
        self._max_norm = value

    @classmethod
    def _resolve(cls, norm, scope):
        resolved = super()._resolve(norm, scope)
        if resolved is not None:
            reason = f"{cls.__name__} compares a norm with `max_norm`"
            resolved.require_norm(norm, reason)
        return resolved

    def _make_rescaling(self, variables):
        norm, tracker = self._resolved_norm, self._norm_tracker
        threshold = thresholds.threshold_of(self.max_norm, lambda: self.iterations)
        shapes = self._blocks.norm_shapes(variables)
        state = threshold.add_limit_variables(self._add_own_variable, shapes)

        if self.skip:
            self._add_skip_variables()

        def clip_at_threshold(gradients):
            limits = threshold.limits(gradients, norm, state)
            skipped = None
            if self.skip and limits:
                # There is one block. On PyTorch its norm is a vector.
                [step_norm] = gradients.norms(norm)
                total = gradients.total() if any(self._blocks.excluded) else step_norm
                scalars = [ops.reshape(t, ()) for t in (step_norm, *limits, total)]
                skipped = self._decide_skip(*scalars)
                skipped = ops.reshape(skipped, step_norm.shape)
            above = clip(gradients, norm, limits)
            if skipped is not None:
                above = [one & ops.logical_not(skipped) for one in above]
            if tracker is not None:
                tracker.update_share("clipped", gradients, above)
                if skipped is not None:
                    tracker.update_share("skipped", gradients, [skipped])
            if self.skip:
                self._end_if_skipped()

        return clip_at_threshold


def _check_skip(norm="l2", scope="variable", apply_to="gradient", **other):
    """Raises a `ValueError` for options that do not work with `skip`."""
    needs = [
        (norm is not None, "norm", norm, "a norm"),
        (scope == "global", "scope", scope, '`scope="global"`'),
        (apply_to == "gradient", "apply_to", apply_to, '`apply_to="gradient"`'),
    ]
    for is_valid, name, value, needed in needs:
        if not is_valid:
            raise ValueError(
                "`skip=True` skips steps by the norm of the whole gradient, so it "
                f"needs {needed}. Received: {name}={value!r}"
            )
