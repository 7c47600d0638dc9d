"""Writes the stub of `keras_normopt.optimizers`, whose classes exist only at run time.

`python tests/typing/make_stubs.py` writes the stub. With `--check`, it only checks that
the stub in the source tree matches the classes. Needs the newest supported Keras.
"""

import argparse
import inspect
import pathlib
import sys

from keras_normopt import optimizers

PATH = pathlib.Path(__file__).parents[2] / "src/keras_normopt/optimizers.pyi"

HEAD = """\
# Made by tests/typing/make_stubs.py.

from typing import Any

import keras

from keras_normopt._optimizer.clipped import ClippedMixin
from keras_normopt._optimizer.normalized import NormalizedMixin
from keras_normopt._optimizer.types import (
    ApplyTo,
    AxesByPattern,
    DirectionLike,
    MaxNorm,
    NormLike,
    Patterns,
    Scope,
    StepSize,
    TrackNorms,
)

NORMALIZED: dict[str, type[NormalizedMixin]]
ORTHOGONAL: dict[str, type[NormalizedMixin]]
CLIPPED: dict[str, type[ClippedMixin]]
ALIASES: dict[str, type[NormalizedMixin] | type[ClippedMixin]]

__all__ = [
{classes}
]
"""

CLASS = """
class {name}({bases}):
    def __init__(
{parameters}
    ) -> None: ...
"""


def make():
    classes = list(optimizers.ALIASES.values())
    text = HEAD.format(
        classes="\n".join(f'    "{name}",' for name in optimizers.__all__),
    )
    for cls in classes:
        parameters = [f"        {line}," for line in _parameters(cls)]
        text += CLASS.format(
            name=cls.__name__,
            bases=_bases(cls),
            parameters="\n".join(parameters),
        )
    return text


def _bases(cls):
    parent = cls.__mro__[1]
    if parent.__name__ in optimizers.__all__:
        return parent.__name__
    base = cls.__name__.removeprefix(cls.PREFIX)
    return f"{parent.__name__}, keras.optimizers.{base}"


def _parameters(cls):
    starred = False
    for parameter in inspect.signature(cls.__init__).parameters.values():
        if parameter.name == "self":
            yield "self"
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        option = cls.OPTIONS.get(parameter.name)
        annotation = option.annotation if option else "Any"
        if parameter.kind is parameter.VAR_KEYWORD:
            yield f"**{parameter.name}: {annotation}"
            continue
        default = parameter.default
        text = f'"{default}"' if isinstance(default, str) else repr(default)
        yield f"{parameter.name}: {annotation} = {text}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PATH.write_text(make(), encoding="utf-8")
    elif not PATH.exists() or PATH.read_text(encoding="utf-8") != make():
        sys.exit(f"{PATH} does not match the classes; run {__file__}")


if __name__ == "__main__":
    main()
