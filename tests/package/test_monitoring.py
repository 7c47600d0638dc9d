"""Tests the norms that optimizers track, and the callback that logs them."""

import csv
import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import by_hand, oracle
from helpers.stored import stored
from helpers.variables import LAYERS, SHAPES, make_gradients, make_variables
from keras_normopt.callbacks import GradientNorms

BACKEND = keras.backend.backend()
ON_TORCH = BACKEND == "torch"
BLOCKS = ["linear/kernel", "linear/bias"]


def make_model(optimizer, **arguments):
    dense = keras.layers.Dense(4, name="linear")
    return by_hand.make_model(optimizer, dense, **arguments)


def norms_by_hand(norm, plain, rescale=True):
    """Returns the norms of all gradients of a training by hand, one row per step."""
    rows = []

    def record(grads, weights):
        rows.append([float(oracle.norm(norm, g)) for g in grads])
        return grads

    def identity(gradient):
        return gradient

    by_hand.train(plain, norm if rescale else identity, change=record)
    return np.array(rows).reshape(by_hand.EPOCHS, -1, 2)


def total(gradients):
    return np.sqrt(sum(np.sum(g**2) for g in gradients.values()))


def blocks(model):
    """Returns the paths of kernel and bias, which may start with the model's name."""
    return [v.path for v in model.trainable_variables]


@pytest.mark.parametrize("norm", [*oracle.NORMS, None])
@pytest.mark.parametrize("cls", ["NormalizedSGD", "ClippedSGD"])
def test_tracked_norms_are_those_of_the_last_step(cls, norm):
    optimizer = getattr(keras_normopt, cls)(0.1, norm=norm, track_norms=True)
    assert optimizer.gradient_norms == {}
    variables = make_variables()
    for gradients in (make_gradients(seed=1), make_gradients(1e10)):
        tensors = [ops.convert_to_tensor(g, "float32") for g in gradients.values()]
        optimizer.apply(tensors, variables)
    tracked = optimizer.gradient_norms
    assert list(tracked) == [*SHAPES, "total"]
    assert tracked.pop("total") == pytest.approx(total(gradients), rel=1e-5)
    for path, value in tracked.items():
        expected = float(oracle.norm(norm or "l2", gradients[path]))
        assert value == pytest.approx(expected, rel=1e-4)
        assert type(value) is float


@pytest.mark.parametrize("scope", ["layer", "global", "unit"])
def test_tracked_norms_are_those_of_the_blocks_of_each_scope(scope):
    optimizer = keras_normopt.NormalizedSGD(0.1, scope=scope, track_norms=True)
    gradients = make_gradients()
    tensors = [ops.convert_to_tensor(g, "float32") for g in gradients.values()]
    optimizer.apply(tensors, make_variables())
    tracked = optimizer.gradient_norms
    assert tracked.pop("total") == pytest.approx(total(gradients), rel=1e-5)
    groups = {
        "layer": {"a": LAYERS[0], "b": LAYERS[1], "offset": ["offset"], "a_2": ["a"]},
        "global": {"global": list(SHAPES)},
        "unit": {path: [path] for path in SHAPES},
    }[scope]
    assert list(tracked) == list(groups)
    for name, paths in groups.items():
        flat = np.concatenate([gradients[p].ravel() for p in paths])
        expected = np.linalg.norm(flat)
        if scope == "unit" and gradients[name].ndim > 1:
            columns = gradients[name].reshape(-1, gradients[name].shape[-1])
            expected = np.linalg.norm(columns, axis=0).mean()
        assert tracked[name] == pytest.approx(expected, rel=1e-5)


def test_missing_gradients_have_norm_0_and_the_total_includes_excluded_gradients():
    optimizer = keras_normopt.NormalizedSGD(0.1, exclude="^b/", track_norms=True)
    variables = make_variables()
    tensors = [ops.ones(shape) for shape in SHAPES.values()]
    tensors[0] = None
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply(tensors, variables)
    tracked = optimizer.gradient_norms
    # The total includes all gradients that exist, excluded or not.
    entries = sum(np.prod(shape) for shape in list(SHAPES.values())[1:])
    assert tracked.pop("total") == pytest.approx(np.sqrt(entries), rel=1e-5)
    assert set(tracked) == {p for p in SHAPES if not p.startswith("b/")}
    assert tracked["a/kernel"] == 0
    assert tracked["a/bias"] == pytest.approx(2)


@pytest.mark.parametrize("cls", ["NormalizedSGD", "ClippedSGD"])
@pytest.mark.filterwarnings("ignore:exclude=.* excludes every variable")
def test_only_the_total_is_tracked_if_every_variable_is_excluded(cls):
    optimizer = getattr(keras_normopt, cls)(0.1, exclude=".", track_norms=True)
    gradients = make_gradients()
    tensors = [ops.convert_to_tensor(g, "float32") for g in gradients.values()]
    optimizer.apply(tensors, make_variables())
    assert optimizer.gradient_norms == {
        "total": pytest.approx(total(gradients), rel=1e-5)
    }


def test_gradient_norms_need_track_norms():
    with pytest.raises(AttributeError, match="track_norms=True"):
        _ = keras_normopt.NormalizedSGD().gradient_norms


class Own(keras.optimizers.SGD):
    """An optimizer for which this package has no ready-made class."""


@pytest.mark.parametrize(
    ("optimizer", "advice"),
    [
        (keras.optimizers.Adam, "keras_normopt.NormalizedAdam(..., norm=None, track"),
        (keras_normopt.ClippedSGD, "`ClippedSGD(..., track_norms=True)`"),
        (Own, "`keras_normopt.normalized(Own)(..., norm=None, track_norms=True)`"),
    ],
)
def test_an_optimizer_without_norms_is_refused_with_advice(optimizer, advice):
    for wrap in (lambda inner: inner, keras.optimizers.LossScaleOptimizer):
        model = by_hand.make_model(wrap(optimizer()))
        with pytest.raises(ValueError, match=r"GradientNorms needs.*Received") as info:
            by_hand.fit(model, callbacks=[GradientNorms()])
        assert advice in str(info.value)
        is_inside = wrap is keras.optimizers.LossScaleOptimizer
        name = "LossScaleOptimizer around " * is_inside + optimizer.__name__
        assert f"Received: model.optimizer = {name}." in str(info.value)
        where = "`model.optimizer.inner_optimizer.gradient_norms`"
        assert (where in str(info.value)) == is_inside


def test_a_model_without_an_optimizer_is_refused():
    callback = GradientNorms()
    callback.set_model(keras.Sequential())
    with pytest.raises(ValueError, match=r"Received: no optimizer\. Compile"):
        callback.on_train_begin()


@pytest.mark.parametrize("frequency", [0, -1, 1.5, True, None, "batch"])
def test_wrong_frequencies_are_refused(frequency):
    with pytest.raises(ValueError, match=r"`frequency` must be.*frequency="):
        GradientNorms(frequency)


MODES = {
    "default": {},
    "eager": {"run_eagerly": True},
    "several steps": {"steps_per_execution": 2},
}
if BACKEND == "torch":
    del MODES["several steps"]


@pytest.mark.parametrize(
    ("cls", "mode", "frequency"),
    [
        (cls, mode, ["epoch", 2][(i + j) % 2])
        for i, cls in enumerate(["NormalizedAdam", "ClippedAdam"])
        for j, mode in enumerate(MODES)
    ],
)
def test_the_logs_of_fit_hold_norms_of_gradients(cls, mode, frequency):
    optimizer = getattr(keras_normopt, cls)(0.1, norm="l2", track_norms=True)
    model = make_model(optimizer, **MODES[mode])
    callback = GradientNorms(frequency)
    history = by_hand.fit(model, callbacks=[callback]).history
    plain = keras.optimizers.Adam(0.1)
    if cls == "ClippedAdam":
        plain = keras_normopt.ClippedAdam(0.1)  # test_clipping tests this class.
    expected = norms_by_hand("l2", plain, rescale=cls == "NormalizedAdam")
    for i, name in enumerate(blocks(model)):
        mean, largest = history[f"grad_norm/{name}"], history[f"grad_norm_max/{name}"]
        np.testing.assert_allclose(mean, expected[:, :, i].mean(axis=1), rtol=1e-4)
        np.testing.assert_allclose(largest, expected[:, :, i].max(axis=1), rtol=1e-4)
    *last, whole = optimizer.gradient_norms.values()
    np.testing.assert_allclose(last, expected[-1, -1], rtol=1e-4)
    totals = np.linalg.norm(expected, axis=-1)
    assert whole == pytest.approx(totals[-1, -1], rel=1e-4)
    mean, largest = history["grad_norm/total"], history["grad_norm_max/total"]
    np.testing.assert_allclose(mean, totals.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(largest, totals.max(axis=1), rtol=1e-4)
    for i, name in enumerate(blocks(model)):
        if cls == "ClippedAdam":
            shares = (expected[:, :, i] > 1).mean(axis=1)
            np.testing.assert_allclose(history[f"clipped/{name}"], shares, rtol=1e-6)
        else:
            assert f"clipped/{name}" not in history


def test_the_logs_of_batches_hold_the_norms_of_each_step():
    seen = []

    class Spy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append({k: v for k, v in logs.items() if k.startswith("grad_norm/")})

    model = make_model(keras_normopt.NormalizedSGD(0.1, track_norms=True))
    by_hand.fit(model, callbacks=[GradientNorms(1), Spy()])
    expected = norms_by_hand("l2", keras.optimizers.SGD(0.1)).reshape(-1, 2)
    assert len(seen) == len(expected)
    for logs, row in zip(seen, expected, strict=True):
        values = [logs[f"grad_norm/{name}"] for name in blocks(model)]
        np.testing.assert_allclose(values, row, rtol=1e-4)


def test_csv_logger_writes_gradient_norms(tmp_path):
    model = make_model(keras_normopt.NormalizedSGD(0.1, track_norms=True))
    callbacks = [GradientNorms(), keras.callbacks.CSVLogger(tmp_path / "log.csv")]
    history = by_hand.fit(model, callbacks=callbacks).history
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    key = f"grad_norm/{blocks(model)[0]}"
    assert [float(row[key]) for row in rows] == pytest.approx(history[key], rel=1e-6)


# Each value of a parameter occurs with each value of every other parameter.
@pytest.mark.parametrize(
    ("everything", "whose", "verbose"),
    [
        (False, "Keras's", 1),
        (False, "one's own", 2),
        (True, "Keras's", 2),
        (True, "one's own", 1),
    ],
)
def test_the_progress_bar_shows_norms_of_blocks_only_on_request(
    everything, whose, verbose, capsys
):
    model = make_model(keras_normopt.ClippedSGD(0.1, track_norms=True))
    callbacks = [GradientNorms(1, progress_bar=everything)]
    if whose == "one's own":
        callbacks.append(keras.callbacks.ProgbarLogger())
    history = by_hand.fit(model, callbacks=callbacks, verbose=verbose).history
    shown = set(re.findall(r"- (\S+): \d", capsys.readouterr().out))
    assert len(history) == 9  # The loss, two blocks and the total.
    assert shown == (set(history) if everything else {"loss", "grad_norm/total"})


def test_a_progress_bar_shows_the_logs_of_other_callbacks(capsys):
    def add_log(epoch, logs):
        logs["clipped"] = 1.0  # This log belongs to no block.

    late = keras.callbacks.LambdaCallback(on_epoch_end=add_log)
    model = make_model(keras_normopt.ClippedSGD(0.1, track_norms=True))
    by_hand.fit(model, epochs=1, callbacks=[GradientNorms(), late], verbose=2)
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"loss: \S+ - grad_norm/total: \S+ - clipped: 1.0000$", line)


def test_accumulated_gradients_count_once():
    optimizer = keras_normopt.NormalizedSGD(
        0.1, gradient_accumulation_steps=3, track_norms=True
    )
    model = make_model(optimizer)
    history = by_hand.fit(model, epochs=1, callbacks=[GradientNorms()]).history
    gradients = by_hand.gradients(by_hand.X, by_hand.Y, *by_hand.START)
    for name, gradient in zip(blocks(model), gradients, strict=True):
        expected = [pytest.approx(np.linalg.norm(gradient), rel=1e-4)]
        assert history[f"grad_norm/{name}"] == expected


def test_norms_inside_a_loss_scale_optimizer_are_logged():
    inner = keras_normopt.NormalizedSGD(0.1, track_norms=True)
    model = make_model(keras.optimizers.LossScaleOptimizer(inner))
    history = by_hand.fit(model, callbacks=[GradientNorms()]).history
    expected = norms_by_hand("l2", keras.optimizers.SGD(0.1))
    mean = history[f"grad_norm/{blocks(model)[0]}"]
    np.testing.assert_allclose(mean, expected[:, :, 0].mean(axis=1), rtol=1e-4)
    last = model.optimizer.inner_optimizer.gradient_norms
    assert list(last) == [*blocks(model), "total"]


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="not in this Keras"
)
def test_norms_of_each_optimizer_inside_a_multi_optimizer_are_logged():
    def make(**arguments):
        return keras_normopt.NormalizedSGD(
            0.1, scope="global", track_norms=True, **arguments
        )

    by_path = keras.optimizers.OptimizerMap(make())
    by_path[".*kernel"] = make(norm="max")
    model = make_model(keras.optimizers.MultiOptimizer(by_path))
    logs = by_hand.fit(model, epochs=1, batch_size=12, callbacks=[GradientNorms()])
    of_kernel, of_bias = by_hand.gradients(by_hand.X, by_hand.Y, *by_hand.START)
    actual = {k: v[0] for k, v in logs.history.items() if k.startswith("grad_norm/")}
    names = ["global", "global_2", "total", "total_2"]
    assert set(actual) == {f"grad_norm/{name}" for name in names}
    of_blocks = [actual["grad_norm/global"], actual["grad_norm/global_2"]]
    expected = [np.abs(of_kernel).max(), np.linalg.norm(of_bias)]
    assert sorted(of_blocks) == pytest.approx(sorted(expected), rel=1e-4)
    # Each optimizer sees only its own variables.
    totals = [actual["grad_norm/total"], actual["grad_norm/total_2"]]
    expected = [np.linalg.norm(of_kernel), np.linalg.norm(of_bias)]
    assert sorted(totals) == pytest.approx(sorted(expected), rel=1e-4)


def test_without_tracking_no_variables_are_added():
    model = make_model(keras_normopt.NormalizedSGD(0.1))
    plain = make_model(keras.optimizers.SGD(0.1))
    for m in (model, plain):
        m.optimizer.build(m.trainable_variables)
    assert len(stored(model.optimizer)) == len(stored(plain.optimizer))


def test_nan_gradients_give_nan_norms():
    optimizer = keras_normopt.NormalizedSGD(0.1, track_norms=True)
    optimizer.apply([ops.convert_to_tensor([1.0, np.nan])], [keras.Variable([0.0, 0])])
    assert np.isnan(list(optimizer.gradient_norms.values())).all()
    assert np.isnan(list(optimizer.norm_tracker.max.values())).all()


# JAX has float64 only if the user enables it.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"] + ["float64"] * ON_TORCH)
@pytest.mark.parametrize("scope", ["variable", "layer", "global"])
def test_norms_without_normalization_do_not_overflow(dtype, scope):
    variables = make_variables(dtype)
    optimizer = keras_normopt.NormalizedSGD(norm=None, scope=scope, track_norms=True)
    optimizer.build(variables)
    # The squares of some gradients leave the range of float32.
    scales = dict(zip(SHAPES, [1e-30, 1e-25, 0.0, 1e-3, 1e-22, 1e25], strict=True))
    gradients = {
        path: ops.convert_to_tensor(scales[path] * g, dtype)
        for path, g in make_gradients().items()
    }
    optimizer.apply(list(gradients.values()), variables)
    blocks = {
        "variable": {path: [path] for path in SHAPES},
        "layer": {"a": LAYERS[0], "b": LAYERS[1], "offset": ["offset"], "a_2": ["a"]},
        "global": {"global": list(SHAPES)},
    }[scope]
    rounded = {
        path: ops.convert_to_numpy(ops.cast(g, "float32") if dtype == "bfloat16" else g)
        for path, g in gradients.items()
    }
    for name, paths in {**blocks, "total": list(SHAPES)}.items():
        values = np.concatenate([rounded[path].ravel() for path in paths])
        expected = np.linalg.norm(values.astype("float64"))
        assert optimizer.gradient_norms[name] == pytest.approx(expected, rel=1e-5)


def callback(base, name="Own"):
    # The check reads only names of classes and their bases, so no package is needed.
    return type(name, (type(base, (keras.callbacks.Callback,), {}),), {})()


def fit_with_norms_last(*callbacks):
    model = make_model(keras_normopt.NormalizedSGD(track_norms=True))
    harmless = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1)
    callbacks = [harmless, *callbacks, GradientNorms()]
    return by_hand.fit(model, epochs=1, callbacks=callbacks)


@pytest.mark.parametrize("base", ["WandbMetricsLogger", "MlflowCallback"])
def test_callbacks_of_other_packages_before_gradient_norms_cause_a_warning(base):
    with pytest.warns(UserWarning, match="^GradientNorms comes after Own in"):
        fit_with_norms_last(callback(base))


def test_callbacks_that_read_no_logs_may_come_before_gradient_norms():
    # A warning would fail the test.
    history = fit_with_norms_last(callback("Other")).history
    assert "grad_norm/total" in history


@pytest.mark.parametrize(
    ("names", "message"), [("CA", "A and C"), ("CAB", "A, B and C")]
)
def test_one_warning_names_all_callbacks_before_gradient_norms(names, message):
    with pytest.warns(UserWarning, match=f"^GradientNorms comes after {message} in"):
        fit_with_norms_last(*(callback("MlflowCallback", name) for name in names))


@pytest.mark.parametrize("name", ["csv", "stopping"])
def test_callbacks_of_keras_that_read_norms_too_early_cause_a_warning(name, tmp_path):
    def reader():
        if name == "csv":
            return keras.callbacks.CSVLogger(tmp_path / "log.csv")
        return keras.callbacks.EarlyStopping("grad_norm_max/global", mode="min")

    def fit(*callbacks):
        optimizer = keras_normopt.NormalizedSGD(track_norms=True, scope="global")
        by_hand.fit(by_hand.make_model(optimizer), callbacks=list(callbacks))

    norms = keras_normopt.callbacks.GradientNorms()
    fit(norms, reader(), keras.callbacks.TerminateOnNaN())
    if name == "csv":
        assert "grad_norm/global" in (tmp_path / "log.csv").read_text()
        with pytest.warns(UserWarning, match="GradientNorms comes after CSVLogger"):
            fit(reader(), norms)
    else:
        with (
            pytest.warns(UserWarning, match="GradientNorms comes after EarlyS"),
            pytest.warns(UserWarning, match="Early stopping conditioned on metric"),
        ):
            fit(reader(), norms)
