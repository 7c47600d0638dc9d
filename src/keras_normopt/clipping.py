"""What a clipping optimizer adds to its base."""

from keras_normopt import lengths, options, registry, thresholds
from keras_normopt.custom import ReturnsGradient
from keras_normopt.mixin import Rescaling
from keras_normopt.thresholds import RunningNorm, RunningNorms


class Clipping(Rescaling):
    """What a clipping optimizer adds to its base. Not for use by itself."""

    max_norm = options.MAX_NORM

    PREFIX = "Clipped"
    VERB = "clip"
    CLIPS = True

    @classmethod
    def checked_options(cls, values):
        if isinstance(registry.get(values["norm"]), ReturnsGradient):
            raise ValueError(
                f"norm={values['norm']!r} returns the normalized gradient, which has "
                "no norm to clip by. Pass a function that returns a norm."
            )
        return super().checked_options(values)

    def check_change(self, name, value):
        if name == "max_norm" and isinstance(value, RunningNorm) and self.built:
            raise ValueError(
                "A RunningNorm keeps variables, which are made when the optimizer is "
                f"built. Received: max_norm={value!r} for a {type(self).__name__} that "
                "is built. Make a new one."
            )

    def _build_transforms(self, variables):
        super()._build_transforms(variables)
        self._running = None
        if isinstance(self.max_norm, RunningNorm):
            self._running = RunningNorms(
                self.max_norm,
                self._blocks.norm_shapes(variables),
                self._add_own_variable,
            )

    def _rescaling(self):
        return [] if self._norm_function is None else [self._clip]

    def _clip(self, step):
        numbers = self._numbers(step)
        limits = thresholds.limits(
            self.max_norm, step, self._norm_function, self._running, numbers
        )
        clipped = lengths.clip(step, self._norm_function, limits)
        if self.track_norms:
            self._norm_tracker.update_clipped(numbers, step.by_block(clipped))
