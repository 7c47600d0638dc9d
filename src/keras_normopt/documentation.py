"""Composes the signature and the docstring of a normalized optimizer class."""

import inspect
import re
import textwrap

_ARGUMENTS = """\
norm: Keyword-only. What a gradient is divided by: the name of a norm, built-in or
    registered with `keras_normopt.register_norm`; or a function from a gradient to
    its norm, a scalar tensor; or `None` for no normalization, which is exactly
    {base}. Built in are `"l1"`, `"l2"`, `"l1_l2"`, `"avg_l1"`, `"avg_l2"`,
    `"avg_l1_l2"`, `"max"` (or `"linf"`), `"min_max"` and `"std"`: see
    `keras_normopt.norms`. Defaults to `{norm!r}`.
norm_epsilon: Keyword-only. Float, at least 0 and finite, the floor of the norm. A
    gradient whose norm is below it is scaled up to a norm of less than 1. The
    default is tiny, as true gradients of deep networks are; raise it, to 1e-7 say,
    if gradients that are only rounding noise, such as that of a bias before a
    batch normalization, should not take full steps. Defaults to `{norm_epsilon}`.
"""

_DOCSTRING = """\
{base} on normalized gradients.

Before the update of {base}, the gradient g of each variable is divided by its
norm,

    g ← g / max(norm(g), norm_epsilon)

so that what {base} receives has norm 1, however small or large the gradient was.
A gradient that is all zero stays so. Gradients are clipped and accumulated, and a
loss scale is divided out, before they are normalized. Weight decay does not pass
through normalization. The norm is computed in float32 (float64 for float64
gradients), and the normalized gradient has the shape and dtype of the gradient.
There are no variables beyond those of {base}: saved state loads into either.

Args:
{arguments}

Raises:
    ValueError: If `norm` is none of these, if `norm_epsilon` is negative or not
        finite, or for what {base} raises it.

Example:
    >>> import keras, keras_normopt
    >>> optimizer = {construction}
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=optimizer, loss="mse")

References:
    - [Yu et al., 2017, Block-Normalized Gradient Method: An Empirical Study for
      Training Deep Neural Network](https://arxiv.org/abs/1707.04822)
"""


def signature(base, ours):
    """The signature of `base.__init__` with keyword-only parameters added to it."""
    parameters = list(inspect.signature(base.__init__).parameters.values())
    end = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        end -= 1
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in ours.items()
    ]
    return inspect.Signature(parameters[:end] + added + parameters[end:])


def docstring(base, construction, signature):
    """The docstring of the normalized class of `base`, with every argument."""
    defaults = {
        name: signature.parameters[name].default for name in ("norm", "norm_epsilon")
    }
    arguments = _arguments_of(base, signature) + _ARGUMENTS.format(
        base=base.__name__, **defaults
    )
    return _DOCSTRING.format(
        base=base.__name__,
        arguments=textwrap.indent(arguments.rstrip(), "    "),
        construction=construction,
    )


def _arguments_of(base, signature):
    found = re.search(
        r"^Args:\n((?:[ \t]+.*\n|\n)*)", (inspect.getdoc(base) or "") + "\n", re.M
    )
    text = textwrap.dedent(found[1]).strip() + "\n" if found else ""
    documented = set(re.findall(r"^(\w+):", text, re.M))
    for name, parameter in list(signature.parameters.items())[1:]:
        named = parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if named and name not in documented | {"norm", "norm_epsilon"}:
            text += f"{name}: As in `{base.__name__}`.\n"
    return text
