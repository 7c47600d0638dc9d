"""The keyword arguments that the generated classes add to those of their base.

An option is declared once, as an attribute of a mixin: its default, its check, its
text in the docstrings and its type in the stubs. It is a property of the optimizer.
"""

import numbers
import re
import reprlib
from typing import Any

import numpy as np

from keras_normopt._blocks import partition
from keras_normopt._transforms import step_sizes, thresholds
from keras_normopt.norms import _registry

_LARGEST = float(np.finfo("float32").max)


class Option(property):
    """A keyword argument that is also a property.

    Args:
        default: The default.
        check: Function from what was given to what is kept; raises what is wrong.
        about: Docstring of the property. No colon: Napoleon takes what is before it for
            a type.
        text: Text for the docstring of the class, in which `{base}` is the base's name.
        annotation: Type, as the stubs spell it.
        settable: Whether it may be set before the optimizer is built. Floats may be
            set at any time.
        serialize: Function from what is kept to what `get_config` returns.
    """

    def __init__(
        self,
        default,
        check,
        about,
        text,
        annotation,
        settable=False,
        serialize=lambda value: value,
    ):
        super().__init__(lambda optimizer: getattr(optimizer, f"_{self.name}"))
        self.default, self.check, self.__doc__ = default, check, about
        self.text, self.annotation = text, annotation
        self.settable, self.serialize = settable, serialize

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, optimizer: Any, owner: Any = None) -> Any:
        return super().__get__(optimizer, owner)

    def __set__(self, optimizer: Any, value: Any) -> None:
        if not self.settable:
            raise AttributeError(
                f"`{self.name}` of {type(optimizer).__name__} is fixed when it is "
                f"made. Received: {self.name}={reprlib.repr(value)}. Make a new one."
            )
        others = {name: getattr(optimizer, name) for name in type(optimizer).OPTIONS}
        checked = type(optimizer).checked_options(others | {self.name: value})
        if optimizer.built:
            self._change(optimizer, others[self.name], checked[self.name])
        setattr(optimizer, f"_{self.name}", checked[self.name])
        optimizer.on_option_set()

    def _change(self, optimizer, old, new):
        """Has the steps of a built optimizer, which may be compiled, take a new value.

        Raises:
            ValueError: If it is not a float in place of another one.
        """
        if isinstance(old, float) and isinstance(new, float):
            optimizer.change_live_number(self.name, new)
        elif old != new:
            raise ValueError(
                f"`{self.name}` of {type(optimizer).__name__} is fixed once it is "
                "built, unless one float replaces another. Received: "
                f"{self.name}={reprlib.repr(new)}, while it is {reprlib.repr(old)}. "
                "Make a new optimizer, and compile the model with it."
            )


def of_class(cls):
    """The options of a mixin, by name, those of its bases first."""
    return {
        name: option
        for owner in reversed(cls.__mro__)
        for name, option in vars(owner).items()
        if isinstance(option, Option)
    }


def _check_norm(norm):
    _registry.get(norm)
    return norm


def _check_scope(scope):
    if not isinstance(scope, str) or scope not in partition.SCOPES:
        raise ValueError(
            f"`scope` must be one of {', '.join(map(repr, partition.SCOPES))}. "
            f"Received: scope={reprlib.repr(scope)}"
        )
    return scope


def _check_flag(name):
    def check(value):
        if not isinstance(value, bool):
            raise ValueError(
                f"`{name}` must be True or False. "
                f"Received: {name}={reprlib.repr(value)}"
            )
        return value

    return check


def _check_exclude(exclude):
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    problem = "`exclude` must be a regular expression, or a list or tuple of them. "
    received = f"Received: exclude={reprlib.repr(exclude)}"
    if not isinstance(patterns, list | tuple):
        raise TypeError(problem + received)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(problem + received)
        if not pattern:
            raise ValueError(
                f"`exclude` must not contain an empty pattern. {received}. It matches "
                "every path, and nothing would be normalized. Pass exclude=() to "
                "exclude nothing, or norm=None to normalize nothing."
            )
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{problem}{received}: {error}") from error
    return tuple(patterns)


def _check_norm_epsilon(norm_epsilon):
    if not _is_finite_float(norm_epsilon) or norm_epsilon < 0:
        raise ValueError(
            "`norm_epsilon` must be a finite float of at least 0, within float32. "
            f"Received: norm_epsilon={reprlib.repr(norm_epsilon)}"
        )
    return float(norm_epsilon)


def _check_apply_to(apply_to):
    if not isinstance(apply_to, str) or apply_to not in ("gradient", "update"):
        raise ValueError(
            '`apply_to` must be "gradient" or "update". '
            f"Received: apply_to={reprlib.repr(apply_to)}"
        )
    return apply_to


def _is_finite_float(value):
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and -_LARGEST <= value <= _LARGEST
    )


NORM = Option(
    default="l2",
    check=_check_norm,
    about="A registered name, a function from a gradient to its norm, or `None`.",
    text="""\
norm: Keyword-only. What a gradient is measured by: the name of a norm, built-in or
    registered with `keras_normopt.register_norm`; or a function from a gradient to
    its norm, a scalar tensor; or `None` to leave gradients alone, which is exactly
    {base}. Built in are `"l1"`, `"l2"`, `"l1_l2"`, `"avg_l1"`, `"avg_l2"`,
    `"avg_l1_l2"`, `"max"` (or `"linf"`), `"min_max"` and `"std"`: see
    `keras_normopt.norms`. Defaults to `{default}`.
""",
    annotation="Norm",
    settable=True,
    serialize=_registry.serialize,
)
SCOPE = Option(
    default="variable",
    check=_check_scope,
    about='What one norm spans, `"variable"`, `"unit"`, `"layer"` or `"global"`.',
    text="""\
scope: Keyword-only. What one norm spans: `"variable"`; `"unit"`, each output unit of a
    kernel, over all axes but the last (vectors and scalars as a whole); `"layer"`,
    all variables of a layer, whose paths are the same up to the last `/`, as one
    long vector; or `"global"`, all variables as one. Defaults to `{default}`.
""",
    annotation="Scope",
)
EXCLUDE = Option(
    default=(),
    check=_check_exclude,
    about="Regular expressions for the paths of variables that are left alone.",
    text="""\
exclude: Keyword-only. Regular expression, or list of them, searched for in the path of
    a variable, such as `("bias", "gamma", "beta")`. Variables in which one is found
    step with their raw gradient. Defaults to `{default}`.
""",
    annotation="str | list[str] | tuple[str, ...]",
    serialize=list,
)
TRACK_NORMS = Option(
    default=False,
    check=_check_flag("track_norms"),
    about="Whether the norms of the gradients are kept.",
    text="""\
track_norms: Keyword-only. Boolean, whether to keep the norm of each block's gradient,
    as it was before this step changed it (l2 if `norm` is `None`), for the property
    `gradient_norms` and the callback `keras_normopt.callbacks.GradientNorms`.
    Defaults to `{default}`.
""",
    annotation="bool",
)
APPLY_TO = Option(
    default="gradient",
    check=_check_apply_to,
    about='What is measured and rescaled, `"gradient"` or `"update"`.',
    text="""\
apply_to: Keyword-only. What is measured and rescaled: `"gradient"`, which {base} then
    receives; or `"update"`, the u of the step w ← w + lr · u that {base} is about to
    make, momentum and all, without weight decay. A learning rate of 0 makes a step of
    0, and a negative one turns the step around. Not for bases that keep a relation
    between weights and slots which a changed update would break (Ftrl,
    ScheduleFreeAdamW). Defaults to `{default}`.
""",
    annotation='Literal["gradient", "update"]',
)
CENTRALIZE = Option(
    default=False,
    check=_check_flag("centralize"),
    about="Whether the mean of each unit's gradient is subtracted first.",
    text="""\
centralize: Keyword-only. Boolean, whether to subtract from each gradient of more than
    one axis its mean over all axes but the last, that is, of each output unit, before
    its norm is taken (arXiv 2004.01461). It is always the gradient that is centralized.
    Defaults to `{default}`.
""",
    annotation="bool",
)
NORM_EPSILON = Option(
    default=1e-30,
    check=_check_norm_epsilon,
    about="The floor of the norm, a finite float of at least 0.",
    text="""\
norm_epsilon: Keyword-only. Float, at least 0 and finite, the floor of the norm. A
    gradient whose norm is below it is scaled up to a norm of less than 1. The
    default is tiny, as true gradients of deep networks are; raise it, to 1e-7 say,
    if gradients that are only rounding noise, such as that of a bias before a
    batch normalization, should not take full steps. It may be set during training, as
    `learning_rate` may. Defaults to `{default}`.
""",
    annotation="float",
    settable=True,
)
STEP_SIZE = Option(
    default=None,
    check=step_sizes.get,
    about="An object of `keras_normopt.step_sizes`, or `None`.",
    text="""\
step_size: Keyword-only. What multiplies the learning rate of each block: `None`;
    `"weight_norm"`, the norm of the block's weights, as in LARS; or
    `"gradient_correlation"`, a factor that adapts to how successive gradients agree;
    or an object of `keras_normopt.step_sizes`, with arguments. Not for bases that
    set the size of steps by themselves (Lamb, Ftrl, Adafactor with
    `relative_step`). Defaults to `{default}`.
""",
    annotation="StepSize",
    serialize=step_sizes.serialize,
)
MAX_NORM = Option(
    default=1.0,
    check=thresholds.get,
    about="The largest norm that a gradient may have, a float or an object.",
    text="""\
max_norm: Keyword-only. The largest norm that a gradient may keep: a float, above 0 and
    finite; `keras_normopt.WeightNorm(...)`, a fraction of the norm of the block's
    weights, as in adaptive gradient clipping; or `keras_normopt.RunningNorm(...)`, a
    multiple of the running mean of the block's own norm, as in AdaGC; or one of them by
    name, `"weight_norm"` or `"running_norm"`. During training a float may be set in the
    place of a float, as `learning_rate` may. Defaults to `{default}`.
""",
    annotation="MaxNorm",
    settable=True,
    serialize=thresholds.serialize,
)
