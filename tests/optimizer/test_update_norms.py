"""Tests `track_norms="all"` against float64 norms of weights before and after steps."""

import itertools
import re

import keras
import numpy as np
import pytest
from keras import ops
from matplotlib import pyplot

import keras_normopt
from helpers import by_hand
from helpers.variables import LAYERS, SHAPES, as_numpy, make_gradients, make_variables
from keras_normopt.callbacks import GradientNorms

pytestmark = pytest.mark.newest_keras

BACKEND = keras.backend.backend()
KINDS = {
    "weight_norm/": "weights",
    "update_norm/": "updates",
    "update_ratio/": "ratios",
}
# PyTorch takes seconds to compile, so only one test compiles there.
WAYS = ["eager"] if BACKEND == "torch" else ["eager", "compiled"]


def make(cls, rate=0.1, track_norms="all", **arguments):
    return getattr(keras_normopt, cls)(rate, track_norms=track_norms, **arguments)


def measured(before, after, blocks):
    """Returns `{kind: {block: value}}`, with the three kinds in `KINDS`."""
    result = {kind: {} for kind in KINDS.values()}
    for name, paths in {**blocks, "total": list(before)}.items():
        old, new = (
            np.concatenate([np.ravel(w[p]) for p in paths]).astype("float64")
            for w in (before, after)
        )
        norm, change = np.linalg.norm(old), np.linalg.norm(new - old)
        values = norm, change, change / norm if norm else 0.0
        for kind, value in zip(result, values, strict=True):
            result[kind][name] = value
    return result


def assert_statistics(optimizer, steps, rtol=1e-5):
    """Compares all statistics with results of `measured`, one for each step."""
    kept = optimizer.norm_tracker.statistics
    assert list(kept) == ["gradients", *KINDS.values()]
    for kind in KINDS.values():
        table = np.array([list(step[kind].values()) for step in steps])
        expected = {"last": table[-1], "mean": table.mean(0), "max": table.max(0)}
        for statistic, values in expected.items():
            actual = getattr(kept[kind], statistic)
            assert list(actual) == list(steps[0][kind])
            message = f"{kind} {statistic}"
            np.testing.assert_allclose(
                [*actual.values()], values, rtol, err_msg=message
            )
        assert kept[kind].count == len(steps)
    assert optimizer.update_ratios == kept["ratios"].last


def start(dtype="float32", scale=1.0):
    variables = make_variables(dtype)
    rng = np.random.default_rng(9)
    for variable in variables:
        variable.assign(scale * rng.normal(size=variable.shape))
    return variables


def stepper(optimizer, variables, way="eager"):
    """Returns a function that makes a step and returns the weights before and after."""
    optimizer.build(variables)

    def apply(*gradients):
        optimizer.apply(list(gradients), variables)

    if BACKEND == "jax" and way == "compiled":
        import jax

        jitted = jax.jit(optimizer.stateless_apply)

        def apply(*gradients):
            state = [v.value for v in optimizer.variables]
            values = jitted(state, list(gradients), [v.value for v in variables])
            every = [*variables, *optimizer.variables]
            for variable, value in zip(every, itertools.chain(*values), strict=True):
                variable.assign(value)

    elif BACKEND == "tensorflow" and way == "compiled":
        import tensorflow as tf

        apply = tf.function(apply)

    def weights():
        return {path: as_numpy(v) for path, v in zip(SHAPES, variables, strict=True)}

    def step(gradients):
        tensors = [
            g if g is None else ops.convert_to_tensor(g, v.dtype)
            for g, v in zip(gradients, variables, strict=True)
        ]
        before = weights()
        apply(*tensors)
        return before, weights()

    return step


VARIABLES = {path: [path] for path in SHAPES}
GROUPS = {
    "variable": VARIABLES,
    "unit": VARIABLES,
    "layer": {"a": LAYERS[0], "b": LAYERS[1], "offset": ["offset"], "a_2": ["a"]},
    "global": {"global": list(SHAPES)},
}
NO_BIAS = {"a": ["a/kernel"], "b": ["b/kernel"], "offset": ["offset"], "a_2": ["a"]}
EXCLUDED = {"bias": NO_BIAS, ".": {}}
ORTHOGONAL = {"axes": {"b/kernel": ((0, 1), (2,))}, "weight_decay": 0.5}
CASES = [
    ("NormalizedSGD", {"norm": None, "momentum": 0.9}),
    ("NormalizedSGD", {"momentum": 0.9, "scope": "unit", "centralize": True}),
    ("NormalizedSGD", {"exclude": "."}),
    ("NormalizedAdam", {"norm": "max", "weight_decay": 0.5, "scope": "layer"}),
    ("NormalizedAdamW", {"norm": None, "weight_decay": 0.5, "scope": "global"}),
    ("NormalizedNadam", {"norm": "max", "step_size": {"kernel": 3.0, "b/": 0.0}}),
    ("NormalizedAdam", {"apply_to": "update", "scope": "layer", "weight_decay": 0.5}),
    ("NormalizedSGD", {"apply_to": "update", "scope": "unit", "norm": "std"}),
    ("ClippedSGD", {"scope": "layer", "exclude": "bias", "max_norm": 0.3}),
    ("ClippedAdam", {"scope": "global", "weight_decay": 0.5}),
    ("OrthogonalSGD", ORTHOGONAL),
]


COMPILED = [3, 7, 8] if len(WAYS) > 1 else []


@pytest.mark.filterwarnings("ignore:exclude=.* excludes every variable")
@pytest.mark.parametrize(
    ("case", "way"),
    [(i, "eager") for i in range(len(CASES))] + [(i, "compiled") for i in COMPILED],
)
def test_tracked_norms_equal_those_of_weights_before_and_after_each_step(case, way):
    cls, arguments = CASES[case]
    blocks = GROUPS[arguments.get("scope", "variable")]
    blocks = EXCLUDED.get(arguments.get("exclude"), blocks)
    optimizer, steps = make(cls, **arguments), []
    assert optimizer.update_ratios == {}
    step = stepper(optimizer, start(), way)
    twin = stepper(make(cls, track_norms=False, **arguments), start(), way)
    for seed in range(3):
        gradients = make_gradients(seed=seed).values()
        before, after = step(gradients)
        steps.append(measured(before, after, blocks))
        assert_statistics(optimizer, steps)
        for path, value in twin(gradients)[1].items():  # Tracking changes no bit.
            np.testing.assert_array_equal(value, after[path])
    optimizer.norm_tracker.reset()
    after_reset = measured(*step(make_gradients(seed=3).values()), blocks)
    assert_statistics(optimizer, [after_reset])


SKIP = {"scope": "global", "max_norm": 1.0, "skip": True, "weight_decay": 0.5}
# Each value holds a base, its arguments, the scales of gradients, the steps that change
# weights, and the count of the tracker.
SKIPPING = {
    "accumulated": ("Adam", {"gradient_accumulation_steps": 2}, [1] * 5, [1, 3], 2),
    "skipped": ("SGD", SKIP, [1e30, 1e-7, 1e3, 1e-6, np.nan], [1, 3], 5),
    "loss scale": ("Adam", {"weight_decay": 0.5}, [1, np.inf, 1, np.nan], [0, 2], 2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("why", SKIPPING)
def test_only_steps_that_change_weights_are_measured(why, way):
    cls, arguments, scales, changed, count = SKIPPING[why]
    optimizer, variables = outer, _ = make(f"Clipped{cls}", **arguments), start()
    if why == "loss scale":
        if BACKEND == "jax" and way == "eager":
            pytest.skip("on JAX, Keras has only a stateless form of this optimizer")
        outer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=4.0)
    step, steps = stepper(outer, variables, way), []
    for i, scale in enumerate(scales):
        before, after = step(make_gradients(scale, i).values())
        if i in changed:
            blocks = GROUPS[arguments.get("scope", "variable")]
            steps.append(measured(before, after, blocks))
        assert (i in changed) == any((before[p] != after[p]).any() for p in SHAPES)
        if steps:
            assert_statistics(optimizer, steps)
    assert optimizer.norm_tracker.count == count


@pytest.mark.skipif(
    BACKEND != "torch" or keras.version() == "3.12.0",
    reason="PyTorch's compiler compiles newer versions of Keras as one graph",
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_pytorch_compiles_a_measured_step_as_one_graph():
    import torch
    from torch._dynamo.testing import CompileCounter

    optimizer = make("ClippedSGD", scope="global", skip=True, momentum=0.9)
    variable, counter, steps = keras.Variable([3.0, -4.0]), CompileCounter(), []
    optimizer.build([variable])
    torch._dynamo.reset()
    step = torch.compile(
        lambda g: optimizer.apply([g], [variable]), backend=counter, fullgraph=True
    )
    for value in (0.1, 8.0, 0.5):
        before = as_numpy(variable)
        with torch.no_grad():
            step(torch.full((2,), value))
        if value < 1:
            pair = {"a": before}, {"a": as_numpy(variable)}
            steps.append(measured(*pair, {"global": ["a"]}))
        assert_statistics(optimizer, steps)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_update_norms_are_those_of_rounded_weights(dtype, float64):
    optimizer, variables = make("NormalizedSGD", 1.0, norm=None), start(dtype)
    variables[0].assign(np.ones((3, 4)))
    gradients = make_gradients(1e-3)
    gradients["a/kernel"] = np.full((3, 4), 1e-4)
    gradients["a/kernel"][0] = 0.1
    before, after = stepper(optimizer, variables)(gradients.values())
    moves = before["a/kernel"] != after["a/kernel"]
    assert moves.sum() == (12 if dtype == "float64" else 4)
    # The difference of two numbers may need more digits than either number has.
    rtol = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-6}[dtype]
    expected = measured(before, after, VARIABLES)
    assert_statistics(optimizer, [expected], rtol)
    exact = pytest.approx(expected["ratios"]["a/kernel"], rel=1e-6)
    assert optimizer.update_ratios["a/kernel"] == exact


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e25])
def test_norms_of_zero_tiny_and_huge_weights_are_exact(scale):
    optimizer = make("NormalizedSGD", scale or 1.0, norm=None)
    step = stepper(optimizer, start(scale=scale))
    assert_statistics(
        optimizer, [measured(*step(make_gradients().values()), VARIABLES)]
    )
    assert (set(optimizer.update_ratios.values()) == {0.0}) == (scale == 0)


@pytest.mark.parametrize("scope", ["variable", "layer"])
def test_norms_of_updates_include_variables_without_a_gradient(scope):
    optimizer, gradients = make("NormalizedAdam", scope=scope), make_gradients()
    gradients["a/kernel"] = None
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        pair = stepper(optimizer, start())(gradients.values())
    assert_statistics(optimizer, [measured(*pair, GROUPS[scope])])


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's devices")
def test_norms_of_updates_on_two_devices_are_measured():
    import jax

    optimizer, variables = make("NormalizedAdam", scope="layer"), start()
    gradients = [np.asarray(g, "float32") for g in make_gradients().values()]
    for i, variable in enumerate(variables):
        device = jax.devices()[i % 2]
        variable._value = jax.device_put(variable.value, device)
        gradients[i] = jax.device_put(gradients[i], device)
    pair = stepper(optimizer, variables)(gradients)
    assert_statistics(optimizer, [measured(*pair, GROUPS["layer"])])


# In `fit`.


class Recorder(keras.callbacks.Callback):
    """Records the weights before and after each batch, and the logs of each batch."""

    def on_train_begin(self, logs=None):
        self.weights, self.logs = [self.model.get_weights()], []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self.model.get_weights())
        self.logs.append(dict(logs))

    @property
    def steps(self):
        numbered = [dict(enumerate(w)) for w in self.weights]
        blocks = {number: [number] for number in numbered[0]}
        return [measured(*pair, blocks) for pair in itertools.pairwise(numbered)]


def assert_logged(logs, steps):
    """Compares logs with means over steps. Both have the order of the weights."""
    for prefix, kind in KINDS.items():
        actual = {k: v for k, v in logs.items() if k.startswith(prefix)}
        assert [*actual][-1] == f"{prefix}total"
        means = np.mean([list(step[kind].values()) for step in steps], axis=0)
        np.testing.assert_allclose([*actual.values()], means, 2e-4, err_msg=prefix)


def epochs_of(history):
    rows = zip(*history.values(), strict=True)
    return [dict(zip(history, row, strict=True)) for row in rows]


EAGER = {"run_eagerly": True}
FITS = [({}, None, "epoch"), (EAGER, 2, 2), (EAGER, None, 2)]
if BACKEND != "torch":
    FITS += [({"steps_per_execution": 3, "jit_compile": False}, 2, "epoch")]


@pytest.mark.parametrize(("how", "accumulated", "frequency"), FITS)
def test_the_logs_of_fit_hold_norms_of_updates_and_weights(how, accumulated, frequency):
    arguments = {"weight_decay": 0.1, "gradient_accumulation_steps": accumulated}
    plain, seen = Recorder(), Recorder()
    model = by_hand.make_model(keras.optimizers.Adam(0.1, **arguments), **EAGER)
    by_hand.fit(model, batch_size=3, callbacks=[plain])
    optimizer = make("NormalizedAdam", norm=None, **arguments)
    callbacks = [GradientNorms(frequency), seen]
    model = by_hand.make_model(optimizer, **how)
    history = by_hand.fit(model, batch_size=3, callbacks=callbacks).history
    steps, every = plain.steps, accumulated or 1
    for i, logs in enumerate(epochs_of(history)):
        assert_logged(logs, steps[4 * i : 4 * i + 4][every - 1 :: every])
    for i, logs in enumerate(seen.logs):
        if frequency == 2 and i % 2:
            assert_logged(logs, steps[i - 1 : i + 1][every - 1 :])
        else:
            assert not any(key.startswith(tuple(KINDS)) for key in logs)


def test_replicas_log_the_norms_of_updates(strategy):
    recorder = Recorder()
    with strategy.scope():
        optimizer = make("NormalizedAdam", weight_decay=0.1)
        model = by_hand.make_model(optimizer, jit_compile=False)
        history = by_hand.fit(model, callbacks=[recorder, GradientNorms()]).history
    for i, logs in enumerate(epochs_of(history)):
        assert_logged(logs, recorder.steps[3 * i : 3 * i + 3])


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_updates_of_embeddings_in_mixed_precision_are_measured(dtype):
    """On TensorFlow, the gradient of an embedding is sparse."""
    optimizer, recorder = make("NormalizedAdam", scope="layer"), Recorder()
    outer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**22)
    # In mixed precision, the gradients of the first steps overflow.
    is_mixed = dtype != "float32"
    layers = [keras.layers.Embedding(9, 4, dtype=dtype), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((5,), dtype="int32"), *layers])
    model.compile(outer if is_mixed else optimizer, "mse", jit_compile=False)
    x, y = np.arange(60).reshape(12, 5) % 7, np.ones((12, 5, 3))
    callbacks = [recorder, GradientNorms()]
    history = model.fit(x, y, batch_size=1, verbose=0, callbacks=callbacks).history
    steps = [step for step in recorder.steps if step["updates"]["total"]]
    assert 0 < len(steps) <= 12
    assert (len(steps) < 12) == is_mixed
    for prefix, kind in KINDS.items():
        expected = np.mean([step[kind]["total"] for step in steps])
        assert history[f"{prefix}total"] == pytest.approx([expected], rel=1e-4)


def test_nan_reaches_the_logs():
    y = np.full_like(by_hand.Y, np.nan)
    model = by_hand.make_model(make("NormalizedSGD", norm=None), **EAGER)
    history = model.fit(by_hand.X, y, 4, verbose=0, callbacks=[GradientNorms()]).history
    actual = [v for key, v in history.items() if key.startswith(tuple(KINDS))]
    assert len(actual) == 9
    assert np.isnan(actual).all()


# Arguments and files.


@pytest.mark.parametrize("value", ["some", "All", "", None, 1, ["all"]])
def test_wrong_values_of_track_norms_are_refused(value):
    for cls in ("NormalizedSGD", "ClippedAdam"):
        # The message names the valid values.
        with pytest.raises(ValueError, match=r"track_norms.*['\"]all['\"].*Received:"):
            make(cls, track_norms=value)


@pytest.mark.parametrize("track_norms", [True, False])
def test_update_ratios_need_track_norms_all(track_norms):
    with pytest.raises(AttributeError, match='track_norms="all"'):
        _ = make("NormalizedSGD", track_norms=track_norms).update_ratios


def test_update_norms_resume_from_a_file(tmp_path):
    model = by_hand.make_model(make("NormalizedAdam", weight_decay=0.1), **EAGER)
    by_hand.fit(model, epochs=1)
    model.save(tmp_path / "model.keras")
    models = [model, keras.models.load_model(tmp_path / "model.keras")]
    one, other = (m.optimizer for m in models)
    assert one.get_config() == other.get_config()
    assert one.get_config()["track_norms"] == other.track_norms == "all"
    for epochs in (1, 2):
        pairs = [o.norm_tracker.statistics.values() for o in (one, other)]
        for a, b in zip(*pairs, strict=True):
            assert a.count == b.count == 3 * epochs
            for values in ("last", "mean", "max"):
                assert getattr(a, values) == pytest.approx(getattr(b, values), rel=1e-6)
        for m in models:
            by_hand.fit(m, epochs=1)


def trained(track_norms, **how):
    optimizer = make("ClippedAdam", track_norms=track_norms, weight_decay=0.1)
    model = by_hand.make_model(optimizer, **how)
    return model, by_hand.fit(model, callbacks=[GradientNorms()] * bool(track_norms))


def test_tracking_norms_does_not_change_training():
    (model, _), (plain, _) = (trained(value) for value in ("all", False))
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def stored(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return store


def test_track_norms_true_logs_and_saves_gradient_norms_only():
    model, history = trained(True, **EAGER)
    *names, total = model.optimizer.gradient_norms
    expected = [f"grad_norm{m}/{n}" for m in ("", "_max") for n in (*names, total)]
    expected += [f"clipped/{n}" for n in names]
    assert set(history.history) == {"loss", *expected}
    own = {f"gradient_norm_{s}" for s in ("last", "mean", "max", "count")}
    saved = stored(model.optimizer)
    assert {k for k in saved if not k.isdecimal()} == own | {"clipped_share"}
    # Every value of `track_norms` loads this file. Variables that are not in the file
    # keep their values.
    for value in ("all", True, False):
        other = make("ClippedAdam", track_norms=value, weight_decay=0.1)
        other.build(model.trainable_variables)
        new = stored(other)
        other.load_own_variables(saved)
        for key, actual in stored(other).items():
            np.testing.assert_array_equal(actual, saved.get(key, new[key]))
    config = model.optimizer.get_config()
    assert config["track_norms"] is True
    assert type(model.optimizer).from_config(config).get_config() == config


# Progress bar, plots and logs.


@pytest.mark.parametrize("everything", [False, True])
def test_the_progress_bar_shows_norms_of_updates_only_on_request(everything, capsys):
    callbacks = [GradientNorms(1, progress_bar=everything)]
    model = by_hand.make_model(make("NormalizedSGD"), **EAGER)
    history = by_hand.fit(model, callbacks=callbacks, verbose=2).history
    shown = set(re.findall(r"- (\S+): \d", capsys.readouterr().out))
    assert len(history) == 1 + 5 * 3
    assert shown == (set(history) if everything else {"loss", "grad_norm/total"})


LABELS = {"weight": "weight norm", "update": "update norm"}
LABELS["ratio"] = "ratio of update to weights"


def test_norms_of_updates_and_weights_are_plotted():
    model, history = trained("all", **EAGER)
    names = [model.trainable_variables[0].path, "total"]
    for (statistic, label), prefix in zip(LABELS.items(), KINDS, strict=True):
        ax = keras_normopt.plot_gradient_norms(history, statistic=statistic)
        actual = [a.get_images()[0].get_array() for a in (ax, ax.child_axes[-1])]
        expected = [[history.history[prefix + name]] for name in names]
        np.testing.assert_allclose(actual, expected)
        assert ax.child_axes[0].get_ylabel() == f"mean {label}"
        logs = {"grad_norm/a": [1.0], "grad_norm/total": [1.0]}
        with pytest.raises(ValueError, match="Train with `track_norms='all'`"):
            keras_normopt.plot_gradient_norms(logs, statistic=statistic)
    pyplot.close("all")


def test_an_epoch_without_steps_logs_nan():
    optimizer = keras_normopt.ClippedSGD(
        0.1, scope="global", max_norm=1e3, skip=True, track_norms="all"
    )
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    x, y = np.ones((4, 2)), np.ones((4, 1))
    callbacks = [GradientNorms()]
    for values in (x, np.full_like(x, np.nan), x):
        logs = model.fit(values, y, verbose=0, callbacks=callbacks).history
        [ratio] = logs["update_ratio/total"]
        assert np.isnan(ratio) == np.isnan(values).any()
