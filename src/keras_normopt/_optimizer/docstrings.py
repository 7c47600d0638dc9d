"""Composes the signature and the docstring of the generated classes."""

import inspect
import re
import textwrap

_SUMMARY = {
    "Normalized": """\
{base} on normalized gradients.

Before the update of {base}, the gradient g of each variable is divided by its
norm,

    g ← g / max(norm(g), norm_epsilon)

so that what {base} receives has norm 1, however small or large the gradient was.
A gradient that is all zero stays so. Gradients are clipped and accumulated, and a
loss scale is divided out, before they are normalized. Weight decay does not pass
through normalization. The norm is computed in float32 (float64 for float64
gradients), and the normalized gradient has the shape and dtype of the gradient.
Files hold the variables of {base} and no others, unless `track_norms` or
`step_size` is set: saved state loads into either.

With `apply_to="update"` it is the update u of {base} that is divided,

    w ← w + lr · u / max(norm(u), norm_epsilon)

so that the step itself has norm lr, whatever {base} makes of gradients.
""",
    "Clipped": """\
{base} on gradients clipped by any norm.

Before the update of {base}, the gradient g of each variable is scaled down if its
norm is above `max_norm`,

    g ← g · min(1, max_norm / norm(g))

which keeps its direction; with `apply_to="update"`, the update u of {base} instead, in
w ← w + lr · u · min(1, max_norm / norm(u)). Gradients are accumulated, and a loss scale
is divided out, before they are clipped; Keras's own clipping comes before as well.
Weight decay is not clipped. The norm is computed in float32 (float64 for float64
gradients), and the clipped gradient has the shape and dtype of the gradient. Files hold
the variables of {base} and no others, unless `track_norms` is set or `max_norm` is a
`RunningNorm`: saved state loads into either.
""",
}

_REFERENCE = {
    "Normalized": """\
    - [Yu et al., 2017, Block-Normalized Gradient Method: An Empirical Study for
      Training Deep Neural Network](https://arxiv.org/abs/1707.04822)
    - [Cutkosky, Mehta, 2020, Momentum Improves Normalized
      SGD](https://arxiv.org/abs/2002.03305), for `apply_to="update"`
""",
    "Clipped": """\
    - [Pascanu et al., 2013, On the difficulty of training recurrent neural
      networks](https://arxiv.org/abs/1211.5063)
    - [Brock et al., 2021, High-Performance Large-Scale Image Recognition Without
      Normalization](https://arxiv.org/abs/2102.06171), for `WeightNorm`
""",
}

_DOCSTRING = """\
{summary}
Args:
{arguments}

Raises:
    ValueError: If an argument is out of its range, as described above, or for what
        {base} raises it.
    TypeError: If `exclude` holds anything but strings.

Example:
    >>> import keras, keras_normopt
    >>> optimizer = {construction}
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=optimizer, loss="mse")

References:
{reference}"""


def signature(base, ours):
    """The signature of `base.__init__` with keyword-only parameters added to it."""
    parameters = list(inspect.signature(base.__init__).parameters.values())
    end = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        end -= 1
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
        for name, option in ours.items()
    ]
    return inspect.Signature(parameters[:end] + added + parameters[end:])


def docstring(base, mixin, construction, signature):
    """The docstring of the class made from `base`, with every argument."""
    arguments = _arguments_of(base, signature, mixin.OPTIONS)
    for option in mixin.OPTIONS.values():
        default = option.default
        text = f'"{default}"' if isinstance(default, str) else default
        arguments += option.text.format(base=base.__name__, default=text)
    return _DOCSTRING.format(
        summary=_SUMMARY[mixin.PREFIX].format(base=base.__name__),
        base=base.__name__,
        arguments=textwrap.indent(arguments.rstrip(), "    "),
        construction=construction,
        reference=_REFERENCE[mixin.PREFIX],
    )


def _arguments_of(base, signature, ours):
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
        if named and name not in documented | set(ours):
            text += f"{name}: As in `{base.__name__}`.\n"
    return text
