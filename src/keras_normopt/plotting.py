"""Draws the norms of gradients that `GradientNorms` logged."""

import itertools
import re
import reprlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from keras_normopt._transforms.track_norms import TOTAL

__all__ = ["plot_gradient_norms"]

PREFIXES = {
    "mean": "grad_norm/",
    "max": "grad_norm_max/",
    "weight": "weight_norm/",
    "update": "update_norm/",
    "ratio": "update_ratio/",
}
LABELS = {
    "mean": "mean gradient norm",
    "max": "max gradient norm",
    "weight": "mean weight norm",
    "update": "mean update norm",
    "ratio": "mean ratio of update to weights",
}
ZERO = "0.8"
NOT_FINITE: dict[str, Any] = {
    "hatch": "xxxx",
    "facecolor": "w",
    "edgecolor": "tab:red",
    "linewidth": 0,
}
BIASES_AND_SCALES = r"(^|/)(bias|gamma|beta|scale)(_\d+)?$"


def plot_gradient_norms(
    history: Any,
    ax: Any = None,
    statistic: Literal["mean", "max", "weight", "update", "ratio"] = "mean",
    exclude: str | Sequence[str] = BIASES_AND_SCALES,
) -> Any:
    """Draws the norms that `GradientNorms` logged, with blocks down and epochs across.

    Colour shows the norm on a logarithmic scale. The strip above shows the norm of the
    whole gradient. Norms that are zero or not finite have their own colours, and a
    legend. Blocks without a gradient count as zero. Labels leave out what all names of
    blocks begin or end with, and the middle of long names. Labels that would overlap
    are left out.

    Args:
        history: The result of `fit`, or its dict `history.history`.
        ax: Matplotlib axes to draw on. They shrink to make room for labels and colour
            bar. Defaults to the axes of a new figure of 7 × 4.5 inches.
        statistic: What to draw. `"mean"` and `"max"` are statistics of the gradients'
            norms over the steps of an epoch. `"weight"`, `"update"` and `"ratio"` are
            means that need `track_norms="all"`. Defaults to `"mean"`.
        exclude: Regular expression, or list of regular expressions. If one of them is
            found in the name of a block, the block is not drawn. `()` draws all blocks.
            Defaults to biases and scales: names that end in `bias`, `gamma`, `beta` or
            `scale`.

    Returns:
        The axes.

    Raises:
        ValueError: If `statistic` is none of these, if the history has no such norms,
            or if `exclude` excludes all blocks.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> import keras_normopt
        >>> history = {"grad_norm/dense/kernel": [3.0, 0.2], "loss": [1.0, 0.5]}
        >>> ax = keras_normopt.plot_gradient_norms(history)
        >>> [label.get_text() for label in ax.get_yticklabels() if label.get_text()]
        ['dense/kernel']
    """
    import matplotlib.pyplot as plt

    if statistic not in PREFIXES:
        raise ValueError(
            f"`statistic` must be one of {', '.join(map(repr, PREFIXES))}. "
            f"Received: statistic={reprlib.repr(statistic)}"
        )
    blocks, totals = _select(history, PREFIXES[statistic], exclude)
    values = np.array([*blocks.values(), *totals.values()], "float64")
    norm = _color_scale(values)
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    image = _draw(ax, blocks, norm)
    ax.set_xlabel("epoch", fontsize="small")
    bar = ax.figure.colorbar(image, cax=ax.inset_axes([1.04, 0, 0.04, 1]))
    bar.set_label(LABELS[statistic], fontsize="small")
    bar.ax.tick_params(which="both", labelsize="small")
    if totals:
        strip = ax.inset_axes([0, 1.03, 1, 0.05 * len(totals)])
        _draw(strip, totals, norm)
        strip.set_xticks([])
        strip.set_yticks(range(len(totals)), list(totals))
        strip.yaxis.tick_right()  # On the left they would meet the first block's label.
    _add_legend(ax, values)
    if ax.figure.get_layout_engine() is None:
        _make_room(ax)
    return ax


def _select(history, prefix, exclude):
    """Returns the norms of the blocks to draw, and those of the whole gradient."""
    logs = getattr(history, "history", history)
    norms = {k.removeprefix(prefix): v for k, v in logs.items() if k.startswith(prefix)}
    if not norms:
        raise ValueError(
            f"The history has no {prefix!r} norms, only {sorted(logs)}. Train with "
            f"`track_norms={'True' if prefix.startswith('grad') else repr('all')}` and "
            "the callback `GradientNorms`."
        )
    # Each optimizer of a `MultiOptimizer` has a total. If a model holds several
    # optimizers, the name of the attribute comes first.
    total = r"total(_\d+)?" if TOTAL in norms else r"[^/]+/total(_\d+)?"
    totals = {k: v for k, v in norms.items() if re.fullmatch(total, k)}
    patterns = [exclude] if isinstance(exclude, str) else exclude
    blocks = {
        k: v
        for k, v in norms.items()
        if k not in totals and not any(re.search(p, k) for p in patterns)
    }
    if not blocks:
        raise ValueError(
            "`exclude` excludes all blocks. Pass `exclude=()` to draw all. "
            f"Received: exclude={exclude!r}, for the blocks {reprlib.repr(list(norms))}"
        )
    return blocks, totals


def _color_scale(values):
    from matplotlib.colors import LogNorm

    shown = values[np.isfinite(values) & (values > 0)]
    low, high = (shown.min(), shown.max()) if shown.size else (1.0, 1.0)
    return LogNorm(low, max(high, 2 * low))  # Small differences look small.


def _draw(ax, rows, norm):
    import matplotlib

    values = np.array(list(rows.values()), "float64")
    values[~np.isfinite(values)] = np.nan
    values[values == 0] = norm.vmin / 2
    count, epochs = values.shape
    image = ax.imshow(
        values,
        norm=norm,
        cmap=matplotlib.colormaps["viridis"].with_extremes(under=ZERO, bad="none"),
        aspect="auto",
        interpolation="none",
        extent=[0.5, epochs + 0.5, count - 0.5, -0.5],
    )
    ax.patch.set(**NOT_FINITE)  # It is visible where there is no colour.
    ax.tick_params(labelsize="small")
    names = _shorten(list(rows))
    _label_integers(ax.xaxis, epochs + 1, str)
    _label_integers(ax.yaxis, count, names.__getitem__)
    return image


def _label_integers(axis, count, label):
    """Labels as many of the integers below `count` as fit."""
    from matplotlib.ticker import MaxNLocator

    class Locator(MaxNLocator):
        def __call__(self):
            # While drawing, because the size of the axes may change before.
            axis: Any = self.axis
            self.set_params(nbins=max(1, axis.get_tick_space()))
            return super().__call__()

    axis.set_major_locator(Locator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axis.set_major_formatter(lambda x, _: label(int(x)) if x in range(count) else "")


def _shorten(names):
    """Returns the names without the parts that all of them begin or end with.

    Names that are still long lose their middle.
    """
    parts = [name.split("/") for name in names]
    first, last = _count_common(parts), _count_common([p[::-1] for p in parts])
    short = ["/".join(p[first : len(p) - last]) for p in parts]
    short = short if all(short) else names
    return [n if len(n) <= 30 else f"{n[:14]}…{n[-15:]}" for n in short]


def _count_common(lists):
    """Returns how many first items the lists have in common."""
    items = zip(*lists, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda i: len(set(i)) == 1, items))


def _add_legend(ax, values):
    """Adds a legend for norms off the scale, below the label of the epochs."""
    from matplotlib.patches import Patch

    patches = []
    if (values == 0).any():
        patches.append(Patch(facecolor=ZERO, label="zero"))
    if not np.isfinite(values).all():
        patches.append(Patch(**NOT_FINITE, label="not finite"))
    if patches:
        ax.legend(
            handles=patches,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            borderaxespad=4,
            ncols=2,
            frameon=False,
            fontsize="small",
        )


def _make_room(ax):
    """Shrinks axes to make room for their labels.

    Labels would otherwise lie outside the figure, or on other axes.
    """
    from matplotlib.transforms import Bbox

    figure = ax.figure
    inches = (ax.bbox.get_points() - ax.get_tightbbox().get_points()) / figure.dpi

    def locate(ax, renderer):
        place = ax.get_position(original=True).get_points()
        return Bbox(place + inches * figure.dpi / figure.bbox.size)

    # `tight_layout` uses this.
    locate.get_subplotspec = ax.get_subplotspec  # type: ignore[attr-defined]
    ax.set_axes_locator(locate)
