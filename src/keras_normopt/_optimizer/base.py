"""What normalized and clipping optimizers share: options, blocks, transforms."""

import reprlib

import keras
from keras import ops

from keras_normopt import norms
from keras_normopt._backend import sparse
from keras_normopt._blocks.grouped import FastStep
from keras_normopt._blocks.partition import Blocks
from keras_normopt._optimizer import options
from keras_normopt._optimizer.hook import Hook
from keras_normopt._optimizer.state import OwnVariables, Paths
from keras_normopt._optimizer.update_capture import Updates
from keras_normopt._transforms.center import centralized
from keras_normopt._transforms.track import NormTracker
from keras_normopt.norms import _registry, _user_norms
from keras_normopt.norms._overflow import is_built_in
from keras_normopt.norms._user_norms import ReturnsGradient


class Rescaling(Paths, OwnVariables, Updates, Hook):
    """What normalized and clipping optimizers share. Not for use by itself."""

    norm = options.NORM
    scope = options.SCOPE
    exclude = options.EXCLUDE
    track_norms = options.TRACK_NORMS
    apply_to = options.APPLY_TO
    centralize = options.CENTRALIZE

    CLIPS = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # The keyword-only arguments that are added to those of the base.
        cls.OPTIONS = options.of_class(cls)

    def __init__(self, *args, **kwargs):
        values = {
            name: kwargs.pop(name, option.default)
            for name, option in self.OPTIONS.items()
        }
        # Before Keras's own: a wrong argument should not leave half an optimizer.
        values = self.checked_options(values)
        super().__init__(*args, **kwargs)
        for name, value in values.items():
            setattr(self, f"_{name}", value)
        self.on_option_set()
        if self.apply_to == "update":
            self._check_base_can_be_caught()
        self._blocks = None
        self._norm_tracker = None
        self._live_numbers = {}

    def on_option_set(self):
        # The function, not the name, which may come to stand for another.
        self._norm_function = _registry.get(self.norm)

    @classmethod
    def checked_options(cls, values):
        """Checks the values of all options, and whether they go together."""
        values = {
            name: cls.OPTIONS[name].check(value) for name, value in values.items()
        }
        norm, scope = values["norm"], values["scope"]
        if scope != "variable" and isinstance(_registry.get(norm), ReturnsGradient):
            raise ValueError(
                f"norm={norm!r} returns the normalized gradient: there is no norm to "
                f"share. Received: scope={scope!r}. Pass "
                'scope="variable", or a function that returns a norm.'
            )
        return values

    def get_config(self):
        config = {
            name: option.serialize(getattr(self, name))
            for name, option in self.OPTIONS.items()
        }
        return self._with_paths(super().get_config() | config)

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._paths = self._paths_of(variables)
        self._blocks = Blocks(self.scope, self.exclude, variables, self._paths)
        self._check_dtypes(variables)
        if not (self._norm_function is None or is_built_in(self._norm_function)):
            _user_norms.check(self._norm_function, self._blocks, variables)
        self._build_transforms(variables)

    def _check_dtypes(self, variables):
        if not self._transforms() + self._rescaling():
            return
        # The total that is tracked is that of all variables, excluded or not.
        wrong = [
            path
            for variable, path, number in zip(
                variables, self._paths, self._blocks.of, strict=True
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

    def _add_live_number(self, name):
        """Keeps an option in a variable, so that compiled steps see it change.

        Its value is part of the config, and not saved a second time.
        """
        self._live_numbers[name] = self._add_own_variable(
            name,
            saved=False,
            shape=(),
            dtype="float32",
            initializer=keras.initializers.Constant(getattr(self, name)),
        )

    def change_live_number(self, name, value):
        if name in self._live_numbers:  # Not if `norm` is `None`.
            self._live_numbers[name].assign(value)

    def _live_number(self, name):
        return ops.convert_to_tensor(self._live_numbers[name])

    def _build_transforms(self, variables):
        """Adds the variables that the transforms keep."""
        if self.track_norms:
            self._norm_tracker = NormTracker(
                self._blocks.names, self._add_own_variable, self.CLIPS
            )

    def _rescaled(self, grads, variables):
        transforms = self._transforms()
        if self.apply_to == "gradient":
            transforms += self._rescaling()
        return self._transformed(grads, variables, transforms)

    def _catches_updates(self):
        return self.apply_to == "update" and bool(self._rescaling())

    def _rescaled_updates(self, updates, variables, learning_rate):
        rate = ops.cast(learning_rate, "float32")
        return self._transformed(updates, variables, self._rescaling(), rate)

    def _transformed(self, tensors, variables, transforms, rate=None):
        if not transforms:
            return tensors
        blocks = self._blocks.of_step([self._get_variable_index(v) for v in variables])
        if not blocks:  # There is the total to be tracked still.
            transforms = [self._track] if self._track in transforms else []
        tensors = [
            sparse.prepare(t, v) for t, v in zip(tensors, variables, strict=True)
        ]
        step = FastStep(tensors, variables, blocks, self._blocks.per_unit, rate)
        for transform in transforms:
            transform(step)
        return step.gradients

    def _transforms(self):
        """What is done to the gradients, in this order: functions of their `Step`."""
        transforms = [self._track] if self.track_norms else []
        if self.centralize:
            transforms.append(self._subtract_means)
        return transforms

    def _rescaling(self):
        """What is done to the gradients after that, or to the updates instead."""
        raise NotImplementedError

    def _numbers(self, step):
        """The numbers of the step's blocks among those of the optimizer."""
        first = [step.weights[block[0]] for block in step.blocks]
        return [self._blocks.of[self._get_variable_index(v)] for v in first]

    def _track(self, step):
        function = self._norm_function
        has_norm = not (function is None or isinstance(function, ReturnsGradient))
        function = function if has_norm else norms.l2
        values = step.by_block(step.norms(function)) if step.blocks else []
        self._norm_tracker.update(self._numbers(step), values, step.total())

    def _subtract_means(self, step):
        step.replace(centralized)

    @property
    def gradient_norms(self) -> dict[str, float]:
        """The norm of each block's gradient in the last step, by the block's name.

        It is that of the gradient as it arrives to be rescaled; under `"total"` is the
        l2 norm of all gradients together. Empty before the optimizer is built. Under a
        `LossScaleOptimizer`, read `model.optimizer.inner_optimizer.gradient_norms`.

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
