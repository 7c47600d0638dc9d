"""Merges the signatures and docstrings of the mixins and of their base optimizers."""

import inspect
import re
import textwrap

_DOCSTRING = """\
{summary}

Args:
{arguments}

Raises:
    ValueError: If an argument is out of its range, as described above, or if {base}
        rejects it.
    TypeError: If `exclude` holds anything but strings.

Example:
    >>> import keras, keras_normopt
    >>> optimizer = {construction}
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=optimizer, loss="mse")

References:
{references}
"""


def options_of(mixin):
    """Returns the keyword-only parameters of a mixin, by name."""
    parameters = inspect.signature(mixin.__init__).parameters
    return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def signature(base, mixin):
    """Returns the signature of `base.__init__` with the options of the mixin."""
    parameters = list(inspect.signature(base.__init__).parameters.values())
    end = len(parameters)
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        end -= 1
    options = [p.replace(annotation=p.empty) for p in mixin.OPTIONS.values()]
    return inspect.Signature(parameters[:end] + options + parameters[end:])


def docstring(base, mixin, construction, signature):
    """Returns the docstring of the class made from `base`, with every argument."""
    if not mixin.__doc__:  # Python runs with -OO.
        return None
    summary, _, rest = inspect.cleandoc(mixin.__doc__).partition("\n\nArgs:\n")
    _, _, references = rest.partition("\n\nReferences:\n")
    # From the class that the mixin derives from, and then from the mixin itself.
    options = "".join(_arguments_of(cls) for cls in (mixin.__mro__[1], mixin))
    arguments = _base_arguments(base, signature, mixin.OPTIONS) + options
    text = _DOCSTRING.replace("{summary}", summary).replace("{references}", references)
    text = text.replace("{arguments}", textwrap.indent(arguments.rstrip(), "    "))
    return text.replace("{construction}", construction).replace("{base}", base.__name__)


def _arguments_of(cls):
    """Returns the section `Args` of a docstring."""
    found = re.search(
        r"^Args:\n((?:[ \t]+.*\n|\n)*)", (inspect.getdoc(cls) or "") + "\n", re.M
    )
    return textwrap.dedent(found[1]).strip() + "\n" if found else ""


def _base_arguments(base, signature, options):
    text = _arguments_of(base)
    documented = set(re.findall(r"^(\w+):", text, re.M))
    for name, parameter in list(signature.parameters.items())[1:]:
        named = parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if named and name not in documented | set(options):
            text += f"{name}: As in `{base.__name__}`.\n"
    return text
