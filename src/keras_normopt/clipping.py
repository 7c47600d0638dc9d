"""What a clipping optimizer adds to its base."""

from keras_normopt import lengths, options, registry
from keras_normopt.custom import ReturnsGradient
from keras_normopt.mixin import Rescaling


class Clipping(Rescaling):
    """What a clipping optimizer adds to its base. Not for use by itself."""

    max_norm = options.MAX_NORM

    PREFIX = "Clipped"
    VERB = "clip"

    @classmethod
    def checked_options(cls, values):
        if isinstance(registry.get(values["norm"]), ReturnsGradient):
            raise ValueError(
                f"norm={values['norm']!r} returns the normalized gradient, which has "
                "no norm to clip by. Pass a function that returns a norm."
            )
        return super().checked_options(values)

    def _transforms(self):
        transforms = super()._transforms()
        if self._norm_function is not None:
            transforms.append(self._clip)
        return transforms

    def _clip(self, step):
        lengths.clip(step, self._norm_function, self.max_norm)
