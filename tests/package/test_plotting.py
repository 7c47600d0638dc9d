"""Tests the plot of gradient norms."""

import itertools

import numpy as np
import pytest
from matplotlib import pyplot

import keras_normopt
from helpers import by_hand
from keras_normopt.callbacks import GradientNorms

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def deep(layers, epochs=12):
    """Returns the history of a network with vanishing gradients."""
    names = ["dense", *(f"dense_{i}" for i in range(1, layers))]
    history = {}
    for depth, name in enumerate(names, 1):
        norms = 10.0 ** (depth / layers + np.linspace(-3, 0, epochs))
        history[f"grad_norm/sequential_1/{name}/kernel"] = norms
        history[f"grad_norm/sequential_1/{name}/bias"] = norms / 10
    return history | {"grad_norm/total": norms}


def labels(axis):
    """Returns the visible labels of an axis."""
    low, high = sorted(axis.get_view_interval())
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [tick for at, tick in ticks if tick.get_text() and low <= at <= high]


def rows(history, **arguments):
    ax = keras_normopt.plot_gradient_norms(history, **arguments)
    return [label.get_text() for label in labels(ax.yaxis)]


def strip(ax):
    return ax.child_axes[-1]


@pytest.mark.parametrize("statistic", ["mean", "max"])
def test_rows_and_the_total_show_the_norms_of_each_epoch(statistic):
    optimizer = keras_normopt.NormalizedSGD(0.1, track_norms=True)
    model = by_hand.make_model(optimizer)
    history = by_hand.fit(model, callbacks=[GradientNorms()])
    ax = keras_normopt.plot_gradient_norms(history, statistic=statistic)
    prefix = {"mean": "grad_norm/", "max": "grad_norm_max/"}[statistic]
    kernel = history.history[prefix + model.trainable_variables[0].path]
    (image,) = ax.get_images()
    np.testing.assert_allclose(image.get_array(), [kernel])
    (image,) = strip(ax).get_images()
    np.testing.assert_allclose(image.get_array(), [history.history[f"{prefix}total"]])
    assert [label.get_text() for label in labels(strip(ax).yaxis)] == ["total"]
    assert [label.get_text() for label in labels(ax.xaxis)] == ["1", "2", "3"]
    colour_bar = ax.child_axes[0]
    assert colour_bar.get_ylabel() == f"{statistic} gradient norm"


def test_the_plot_uses_given_axes():
    _, ax = pyplot.subplots()
    assert keras_normopt.plot_gradient_norms(deep(3), ax=ax) is ax


@pytest.mark.parametrize("layout", [None, "constrained", "tight, afterwards"])
@pytest.mark.parametrize("layers", [3, 300])
def test_labels_are_large_enough_and_do_not_overlap(layers, layout):
    engine = layout if layout == "constrained" else None
    figure, axes = pyplot.subplots(2, 2, layout=engine)
    for ax in axes.flat:
        keras_normopt.plot_gradient_norms(deep(layers), ax=ax)
    if layout == "tight, afterwards":
        figure.tight_layout()
    figure.draw_without_rendering()
    for ax in axes.flat:
        visible = labels(ax.yaxis)
        assert len(visible) >= 2
        assert visible[0].get_text() == "dense"
        boxes = [label.get_window_extent() for label in visible]
        assert all(a.y0 >= b.y1 for a, b in itertools.pairwise(boxes))
        assert min(label.get_fontsize() for label in visible) >= 8
        whole = ax.get_tightbbox()
        assert whole.x0 >= 0
        assert whole.x1 <= figure.bbox.x1
        other_boxes = [
            other.get_window_extent() for other in axes.flat if other is not ax
        ]
        assert not whole.count_overlaps(other_boxes)


def test_all_rows_have_names_if_there_is_room():
    assert rows(deep(12)) == ["dense", *(f"dense_{i}" for i in range(1, 12))]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["net/a/kernel", "net/b/kernel"], ["a", "b"]),
        (["a/kernel", "a/recurrent_kernel"], ["kernel", "recurrent_kernel"]),
        (["net/words/embeddings", "net/d/kernel"], ["words/embeddings", "d/kernel"]),
        (["net/dense/kernel"], ["net/dense/kernel"]),
        (["net", "net/dense"], ["net", "net/dense"]),  # Names of layers.
        (["global"], ["global"]),
        (
            ["encoder_10/self_attention/query/kernel"],
            ["encoder_10/sel…on/query/kernel"],
        ),
    ],
)
def test_names_of_rows_are_shortened(names, shown):
    assert rows({f"grad_norm/{name}": [1.0] for name in names}) == shown


def test_patterns_leave_out_rows():
    kernels = ["kernel", "recurrent_kernel", "embeddings", "alphabeta", "upscale"]
    vectors = ["bias", "gamma", "beta", "scale", "bias_2"]
    history = {f"grad_norm/a/{name}": [1.0] for name in kernels + vectors}
    assert rows(history) == kernels
    assert rows(history, exclude=()) == kernels + vectors
    assert rows(history, exclude="a/.*e") == ["bias", "gamma", "bias_2"]
    assert rows(history, exclude=["kernel", "b"]) == ["upscale", "gamma", "scale"]
    with pytest.raises(ValueError, match=r"excludes all bl.*exclude='a/'.*'a/kernel'"):
        keras_normopt.plot_gradient_norms(history, exclude="a/")


def test_the_totals_of_several_optimizers_are_in_the_strip():
    names = ["d_opt/a/kernel", "d_opt/total", "g_opt/b/total", "g_opt/total"]
    history = {f"grad_norm/{name}": [1.0] for name in names}
    ax = keras_normopt.plot_gradient_norms(history)
    shown = [label.get_text() for label in labels(ax.yaxis)]
    assert shown == ["d_opt/a/kernel", "g_opt/b/total"]
    totals = [label.get_text() for label in strip(ax).get_yticklabels()]
    assert totals == ["d_opt/total", "g_opt/total"]


def test_zeros_and_non_finite_values_have_special_colours():
    history = {"grad_norm/a": [1.0, 0.0, 3.0], "grad_norm/b": [np.nan, np.inf, 2.0]}
    ax = keras_normopt.plot_gradient_norms(history)
    ax.figure.draw_without_rendering()
    (image,) = ax.get_images()
    colours = image.to_rgba(image.get_array())
    a_third = pyplot.get_cmap("viridis")(np.log(2) / np.log(3))
    np.testing.assert_allclose(colours[1, 2], a_third, atol=0.02)
    np.testing.assert_allclose(colours[0, 1], [0.8, 0.8, 0.8, 1])
    np.testing.assert_array_equal(colours[1, :2, 3], 0)  # These cells show the hatch.
    assert ax.patch.get_hatch()
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == ["zero", "not finite"]


@pytest.mark.parametrize("value", [0.0, 1e-30, 2.0, np.nan])
def test_a_single_value_can_be_drawn(value):
    ax = keras_normopt.plot_gradient_norms({"grad_norm/a": [value]})
    ax.figure.draw_without_rendering()
    (image,) = ax.get_images()
    assert 0 < image.norm.vmin < image.norm.vmax
    assert (ax.get_legend() is None) == (value > 0)


def test_a_history_without_norms_and_unknown_statistics_are_refused():
    with pytest.raises(ValueError, match=r"history has no 'grad_norm/' norms.*'loss'"):
        keras_normopt.plot_gradient_norms({"loss": [1.0]})
    with pytest.raises(ValueError, match=r"one of 'mean', 'max', .*statistic='median'"):
        keras_normopt.plot_gradient_norms(deep(1), statistic="median")
