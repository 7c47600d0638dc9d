"""The types of arguments, and the base class that mixins have for type checkers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import keras
from keras.optimizers.schedules import LearningRateSchedule

from keras_normopt._transforms.orthogonal import Orthogonal
from keras_normopt._transforms.step_sizes import GradientCorrelation, WeightNorm
from keras_normopt._transforms.thresholds import RunningNorm
from keras_normopt._transforms.vector_directions import Rows, Sign

# `str` is for registered names. Editors complete the literals.
NormLike: TypeAlias = (
    Literal[
        "avg_l1",
        "avg_l1_l2",
        "avg_l2",
        "l1",
        "l1_l2",
        "l2",
        "linf",
        "max",
        "min_max",
        "std",
    ]
    | str
    | Callable[[Any], Any]
    | None
)
Scope: TypeAlias = Literal["variable", "unit", "layer", "global"]
Patterns: TypeAlias = str | list[str] | tuple[str, ...]
TrackNorms: TypeAlias = bool | Literal["all"]
ApplyTo: TypeAlias = Literal["gradient", "update"]
_StepSize: TypeAlias = (
    Literal["weight_norm", "gradient_correlation"] | WeightNorm | GradientCorrelation
)
_FactorByPattern: TypeAlias = dict[str, float | LearningRateSchedule]
StepSize: TypeAlias = (
    _StepSize | _FactorByPattern | list[_StepSize | _FactorByPattern] | None
)
AxesByPattern: TypeAlias = dict[str, Any]
Direction: TypeAlias = (
    Literal["sign", "rows", "orthogonal"] | Sign | Rows | Orthogonal | None
)
DirectionLike: TypeAlias = Direction | dict[str, Direction]
MaxNorm: TypeAlias = (
    float
    | LearningRateSchedule
    | Literal["weight_norm", "running_norm"]
    | WeightNorm
    | RunningNorm
)

# A mixin calls methods of the optimizer class after it.
if TYPE_CHECKING:

    class MixinBase(keras.optimizers.Optimizer):
        """The base class of mixins, only for type checkers."""
else:
    MixinBase = object
