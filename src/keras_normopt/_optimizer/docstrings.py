"""Merges the signatures and docstrings of a mixin and its base optimizer."""

import inspect
import re
import textwrap

_DOCSTRING = """\
{summary}

Args:
{arguments}

Raises:
    ValueError: If an argument is out of the range above, or if {base} rejects it.
    TypeError: If `exclude` or the keys of a dictionary are not strings, or if `axes` is
        not a dictionary.

Example:
    >>> import keras, keras_normopt
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer={construction}, loss="mse")
    >>> model.optimizer
    {printed}

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


def with_defaults(signature, defaults):
    """Returns a signature with other defaults."""
    parameters = [
        p.replace(default=defaults.get(name, p.default))
        for name, p in signature.parameters.items()
    ]
    return inspect.Signature(parameters)


def docstring(
    base,
    mixin,
    construction,
    printed,
    signature,
    summary=None,
    references=None,
    defaults=None,
):
    """Returns the docstring of the class made from `base`, with every argument.

    Args:
        base: The base optimizer class.
        mixin: The mixin that adds options to it.
        construction: Code that makes an instance, for the example.
        printed: What the example prints, the `repr` of the instance.
        signature: The signature of the class.
        summary: The text before the arguments. Defaults to the mixin's text.
        references: The list of references. Defaults to the mixin's list.
        defaults: Dict from names of arguments to defaults that replace those in the
            text.
    """
    if not mixin.__doc__:  # Python runs with -OO.
        return None
    own_summary, _, rest = inspect.cleandoc(mixin.__doc__).partition("\n\nArgs:\n")
    _, _, own_references = rest.partition("\n\nReferences:\n")
    summary, references = summary or own_summary, references or own_references
    # The options of both mixins come first. The arguments of the base come last,
    # because readers may know them.
    options = "".join(_arguments_of(cls) for cls in (mixin.__mro__[1], mixin))
    arguments = options + _base_arguments(base, signature, mixin.OPTIONS)
    for name, value in (defaults or {}).items():
        arguments = _with_default(arguments, name, value)
    text = _DOCSTRING.replace("{summary}", summary).replace("{references}", references)
    text = text.replace("{arguments}", textwrap.indent(arguments.rstrip(), "    "))
    text = text.replace("{construction}", construction).replace("{printed}", printed)
    return text.replace("{base}", base.__name__)


def _with_default(arguments, name, value):
    """Replaces the default in the text of an argument."""
    text = f'"{value}"' if isinstance(value, str) else repr(value)

    def replace(entry):
        without = re.sub(r"Defaults\s+to\s+`[^`]*`\.", "", entry[0]).rstrip()
        return f"{without} Defaults to `{text}`.\n"

    return re.sub(rf"^{name}:.*\n([ \t]+.*\n|\n)*", replace, arguments, flags=re.M)


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
