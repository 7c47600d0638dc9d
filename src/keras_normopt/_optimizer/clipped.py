"""What a clipping optimizer adds to its base."""

from keras import ops

from keras_normopt._optimizer import options
from keras_normopt._optimizer.base import Rescaling
from keras_normopt._transforms import rescale
from keras_normopt._transforms.step_sizes import WeightNorm
from keras_normopt._transforms.thresholds import RunningNorm, RunningNorms
from keras_normopt.norms import _registry
from keras_normopt.norms._user_norms import ReturnsGradient


class Clipping(Rescaling):
    """What a clipping optimizer adds to its base. Not for use by itself."""

    max_norm = options.MAX_NORM

    PREFIX = "Clipped"
    VERB = "clip"
    CLIPS = True

    @classmethod
    def checked_options(cls, values):
        if isinstance(_registry.get(values["norm"]), ReturnsGradient):
            raise ValueError(
                f"norm={values['norm']!r} returns the normalized gradient, which has "
                "no norm to clip by. Pass a function that returns a norm."
            )
        return super().checked_options(values)

    def _build_transforms(self, variables):
        super()._build_transforms(variables)
        self._running = None
        if isinstance(self.max_norm, RunningNorm):
            self._running = RunningNorms(
                self.max_norm,
                self._blocks.norm_shapes(variables),
                self._add_own_variable,
            )
        elif isinstance(self.max_norm, float) and self._norm_function is not None:
            self._add_live_number("max_norm")

    def _rescaling(self):
        return [] if self._norm_function is None else [self._clip]

    def _clip(self, step):
        norm = self._norm_function
        norms = step.norms(norm)
        if isinstance(self.max_norm, RunningNorm):
            by_block = step.by_block(norms), self._numbers(step)
            limits = step.arranged(self._running.limits(*by_block))
        elif isinstance(self.max_norm, WeightNorm):
            limits = self.max_norm.limits(norms, step.weight_norms(norm))
        else:
            max_norm = self._live_number("max_norm")
            limits = [ops.cast(max_norm, n.dtype) for n in norms]
        above = rescale.clip(step, norm, limits)
        if self.track_norms:
            self._norm_tracker.update_clipped(self._numbers(step), step.by_block(above))
