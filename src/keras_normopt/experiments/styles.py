"""Gives each optimizer the same colour, dashes and marker in every figure."""

import itertools

from keras_normopt.optimizers import ALIASES

# The colours of seaborn's palette "colorblind" that are dark enough on white. Pairs
# that are often compared differ strongly. The values are here because the extra `demo`
# has no seaborn.
COLOURS = (
    "#949494",
    "#0173B2",
    "#DE8F05",
    "#029E73",
    "#CC78BC",
    "#D55E00",
    "#56B4E9",
    "#CA9161",
)
# There are 8 colours, 5 dashes and 7 markers. These numbers have no common factor, so
# no two of 280 optimizers look the same.
DASHES = ((1, 1.5), (None, None), (6, 1.5, 1.5, 1.5), (5, 2), (3, 1.5))
MARKERS = ("v", "o", "s", "X", "^", "D", "P")

_FIRST = ("sgd", "normalized_sgd", "adam", "normalized_adam", "rmsprop")
_BASES = (alias.partition("_")[2] for alias in ALIASES)
_ORDER = dict.fromkeys([*_FIRST, *_BASES, *ALIASES])
_NUMBERS = {name: number for number, name in enumerate(_ORDER)}
_ALIAS_OF = {cls.__name__: alias for alias, cls in ALIASES.items()}


def of(labels):
    """Returns the style of each optimizer in a figure.

    Args:
        labels: Names of optimizers or their classes. Details may follow a blank or
            comma: `"normalized_sgd (l2), rate 0.1"` has the style of
            `"normalized_sgd"`.

    Returns:
        Dictionary from labels to dictionaries of `color`, `dashes` and `marker`.
        Unknown names, and further variants of an optimizer, get unused styles in order,
        and unused colours as long as there are any.
    """
    labels = list(dict.fromkeys(labels))
    numbers: dict[str, int | None] = {}
    for label in labels:
        name = label.replace(",", " ").replace("(", " ").split()[0]
        number = _NUMBERS.get(_ALIAS_OF.get(name, name.lower()))
        if number not in (None, *numbers.values()):
            numbers[label] = number
    for label in labels:
        if label not in numbers:
            numbers[label] = _unused(set(numbers.values()))
    return {label: _style(numbers[label]) for label in labels}


def _unused(used):
    """Returns the first number of an unused colour, or else the first unused number."""
    colours = {number % len(COLOURS) for number in used}
    of_new_colours = (i for i in range(len(COLOURS)) if i not in colours)
    others = (i for i in itertools.count() if i not in used)
    return next(itertools.chain(of_new_colours, others))


def _style(number):
    return {
        "color": COLOURS[number % len(COLOURS)],
        "dashes": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }
