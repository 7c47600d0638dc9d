"""`track_norms="all"`, against float64 norms of the weights before and after steps."""

import json
import re

import keras
import numpy as np
import pytest
from keras import ops
from matplotlib import pyplot

import by_hand
import keras_normopt
from keras_normopt.callbacks import GradientNorms
from stored import stored
from test_blocks import LAYERS, SHAPES, as_numpy, make_gradients, make_variables

BACKEND = keras.backend.backend()
KINDS = {"weight_norm": "weights", "update_norm": "updates", "update_ratio": "ratios"}
# Compiling a whole Adam takes the oldest Keras more than it can do on PyTorch.
WAYS = ["eager", "compiled"]


def measured(before, after, blocks):
    """The three values of each block, `{kind: {block: value}}`."""
    found = {kind: {} for kind in KINDS.values()}
    for name, paths in {**blocks, "total": list(before)}.items():
        old, new = (
            np.concatenate([np.ravel(w[p]).astype("float64") for p in paths])
            for w in (before, after)
        )
        size, change = np.linalg.norm(old), np.linalg.norm(new - old)
        values = size, change, change / size if size else 0.0
        for kind, value in zip(found, values, strict=True):
            found[kind][name] = value
    return found


def assert_statistics(optimizer, steps, rtol=1e-5):
    """Compares all statistics with those of a list of results of `measured`."""
    kept = optimizer.norm_tracker.statistics
    assert list(kept) == ["gradients", *KINDS.values()]
    for kind in KINDS.values():
        rows = [step[kind] for step in steps]
        names = list(rows[0])
        table = np.array([list(row.values()) for row in rows])
        wanted = {"last": table[-1], "mean": table.mean(0), "max": table.max(0)}
        for statistic, values in wanted.items():
            found = getattr(kept[kind], statistic)
            assert list(found) == names
            np.testing.assert_allclose(
                list(found.values()), values, rtol, err_msg=f"{kind} {statistic}"
            )
        assert kept[kind].count == len(rows)
    assert optimizer.update_ratios == kept["ratios"].last


def start(dtype="float32", seed=9):
    variables = make_variables(dtype)
    rng = np.random.default_rng(seed)
    for variable in variables:
        variable.assign(rng.normal(size=variable.shape))
    return variables


def weights_of(variables):
    return {path: as_numpy(v) for path, v in zip(SHAPES, variables, strict=True)}


def stepper(optimizer, variables, way="eager"):
    """Returns a function that makes one step with a list of gradients."""
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
            for variable, value in zip(every, [*values[0], *values[1]], strict=True):
                variable.assign(value)

    elif BACKEND == "tensorflow" and way == "compiled":
        import tensorflow as tf

        apply = tf.function(apply)
    elif BACKEND == "torch" and way == "compiled":
        import torch

        torch._dynamo.reset()
        compiled = torch.compile(apply, backend="eager", fullgraph=True)

        def apply(*gradients):
            with torch.no_grad():
                compiled(*gradients)

    def step(gradients):
        tensors = [
            g if g is None else ops.convert_to_tensor(g, v.dtype)
            for g, v in zip(gradients, variables, strict=True)
        ]
        before = weights_of(variables)
        apply(*tensors)
        return before, weights_of(variables)

    return step


def make(cls, rate=0.1, **arguments):
    return getattr(keras_normopt, cls)(rate, track_norms="all", **arguments)


VARIABLES = {path: [path] for path in SHAPES}
GROUPS = {
    "variable": VARIABLES,
    "unit": VARIABLES,
    "layer": {"a": LAYERS[0], "b": LAYERS[1], "offset": ["offset"], "a_2": ["a"]},
    "global": {"global": list(SHAPES)},
}
NO_BIAS = {"a": ["a/kernel"], "b": ["b/kernel"], "offset": ["offset"], "a_2": ["a"]}
CASES = [
    ("NormalizedSGD", {"norm": None, "momentum": 0.9}),
    ("NormalizedSGD", {"momentum": 0.9, "scope": "unit", "centralize": True}),
    ("NormalizedAdam", {"norm": "max", "weight_decay": 0.5, "scope": "layer"}),
    ("NormalizedAdamW", {"norm": None, "weight_decay": 0.5, "scope": "global"}),
    ("NormalizedNadam", {"norm": "max", "step_size": {"kernel": 3.0, "b/": 0.0}}),
    ("NormalizedAdam", {"apply_to": "update", "scope": "layer", "weight_decay": 0.5}),
    ("NormalizedSGD", {"apply_to": "update", "scope": "unit", "norm": "std"}),
    ("ClippedSGD", {"scope": "layer", "exclude": "bias", "max_norm": 0.3}),
    ("ClippedAdam", {"scope": "global", "weight_decay": 0.5}),
    ("OrthogonalSGD", {"weight_decay": 0.5}),
]


@pytest.fixture(params=WAYS)
def way(request):
    if BACKEND == "torch" and request.param == "compiled":
        if keras.version() == "3.12.0":
            pytest.skip("cannot compile its own optimizers whole")
        request.node.add_marker(
            pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
        )
        request.node.add_marker(
            pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
        )
    return request.param


@pytest.mark.filterwarnings("ignore:.*OrthogonalSGD.*guesses which axes")
@pytest.mark.parametrize(("cls", "arguments"), CASES)
def test_each_step(cls, arguments, way):
    if (
        BACKEND == "torch"
        and way == "compiled"
        and (cls, arguments) not in CASES[2:9:3]
    ):
        pytest.skip("a second or more for each")
    blocks = GROUPS[arguments.get("scope", "variable")]
    blocks = NO_BIAS if "exclude" in arguments else blocks
    optimizer, variables = make(cls, **arguments), start()
    assert optimizer.update_ratios == {}
    step, steps = stepper(optimizer, variables, way), []
    for seed in range(3):
        before, after = step(make_gradients(seed=seed).values())
        steps.append(measured(before, after, blocks))
        assert_statistics(optimizer, steps)
    optimizer.norm_tracker.reset()
    before, after = step(make_gradients(seed=3).values())
    assert_statistics(optimizer, [measured(before, after, blocks)])


def test_only_real_steps_count(way):
    optimizer = make("NormalizedAdam", gradient_accumulation_steps=2, weight_decay=0.5)
    step, steps = stepper(optimizer, start(), way), []
    for seed in range(5):
        before, after = step(make_gradients(seed=seed).values())
        if seed % 2:
            steps.append(measured(before, after, VARIABLES))
        else:
            assert all((before[p] == after[p]).all() for p in SHAPES)
        if steps:
            assert_statistics(optimizer, steps)
    assert len(steps) == optimizer.norm_tracker.count == 2


def test_skipped_steps_do_not_count(way):
    optimizer = make("ClippedSGD", scope="global", skip=True, weight_decay=0.5)
    step, steps = stepper(optimizer, start(), way), []
    for seed, scale in enumerate([1e30, 1e-7, 1e3, 1e-6, np.nan]):
        before, after = step(make_gradients(scale, seed).values())
        if scale < 1:
            steps.append(measured(before, after, GROUPS["global"]))
        else:
            assert all((before[p] == after[p]).all() for p in SHAPES)
        if steps:
            assert_statistics(optimizer, steps)
    assert optimizer.norm_tracker.statistics["weights"].count == 2
    assert optimizer.norm_tracker.count == 5
    assert optimizer.skipped_steps == 3


def test_steps_that_a_loss_scale_optimizer_leaves_out():
    inner = make("NormalizedAdam", weight_decay=0.5)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    # Which is the only way to call it on JAX.
    step = stepper(outer, start(), "compiled" if BACKEND == "jax" else "eager")
    steps = []
    for seed, scale in enumerate([1.0, np.inf, 1.0, np.nan]):
        before, after = step(make_gradients(scale, seed).values())
        if np.isfinite(scale):
            steps.append(measured(before, after, VARIABLES))
        assert_statistics(inner, steps)
    assert len(steps) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_what_rounding_leaves(dtype, float64):
    optimizer = make("NormalizedSGD", rate=0.0, norm=None, weight_decay=None)
    optimizer.learning_rate = 1.0
    variables = start(dtype)
    variables[0].assign(np.ones((3, 4)))
    gradients = make_gradients(1e-3)
    gradients["a/kernel"] = np.full((3, 4), 1e-4)
    gradients["a/kernel"][0] = 0.1
    before, after = stepper(optimizer, variables)(gradients.values())
    moves = before["a/kernel"] != after["a/kernel"]
    assert moves.sum() == (12 if dtype == "float64" else 4)
    # A difference may need one digit more than the variables have.
    rtol = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-5}[dtype]
    assert_statistics(optimizer, [measured(before, after, VARIABLES)], rtol)
    ratio = np.linalg.norm((after["a/kernel"] - 1)[0]) / np.sqrt(12)
    exact = 1e-3 if dtype == "float64" else 1e-6
    assert optimizer.update_ratios["a/kernel"] == pytest.approx(ratio, rel=exact)


def test_weights_of_zero(way):
    optimizer = make("NormalizedSGD")
    variables = make_variables()
    step, steps = stepper(optimizer, variables, way), []
    steps.append(measured(*step(make_gradients().values()), VARIABLES))
    assert_statistics(optimizer, steps)
    assert set(optimizer.update_ratios.values()) == {0.0}
    assert optimizer.norm_tracker.statistics["updates"].last["a"] > 0.09
    steps.append(measured(*step(make_gradients().values()), VARIABLES))
    assert_statistics(optimizer, steps)
    assert optimizer.update_ratios["a"] == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_that_leave_the_range_of_float32(scale):
    variables = start()
    for variable in variables:
        variable.assign(ops.convert_to_numpy(variable) * scale)
    optimizer = make("NormalizedSGD", norm=None, rate=scale)
    before, after = stepper(optimizer, variables)(make_gradients().values())
    assert_statistics(optimizer, [measured(before, after, VARIABLES)])


@pytest.mark.parametrize("scope", ["variable", "layer"])
def test_a_variable_without_a_gradient(scope):
    optimizer, variables = make("NormalizedAdam", scope=scope), start()
    gradients = [*make_gradients().values()]
    gradients[0] = None
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        before, after = stepper(optimizer, variables)(gradients)
    assert (before["a/kernel"] == after["a/kernel"]).all()
    assert_statistics(optimizer, [measured(before, after, GROUPS[scope])])


@pytest.mark.filterwarnings("ignore:exclude=.* excludes every variable")
def test_only_the_total_if_every_variable_is_excluded():
    optimizer = make("NormalizedSGD", exclude=".")
    step = stepper(optimizer, start())
    before, after = step(make_gradients().values())
    assert_statistics(optimizer, [measured(before, after, {})])


# In `fit`.


class Recorder(keras.callbacks.Callback):
    """Notes the weights after each batch, and what the logs of the batch hold."""

    def __init__(self):
        super().__init__()
        self.weights, self.logs = [], []

    def on_train_begin(self, logs=None):
        self.weights.append(self.model.get_weights())

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(self.model.get_weights())
        self.logs.append(dict(logs or {}))

    def steps(self, model):
        """What was measured from each batch to the next, by the names in logs."""
        paths = [v.path for v in model.trainable_variables]
        named = [dict(zip(paths, w, strict=True)) for w in self.weights]
        pairs = zip(named, named[1:], strict=False)
        return [measured(*pair, {path: [path] for path in paths}) for pair in pairs]


def assert_logged(logs, steps, rtol=1e-4):
    """Compares logs with the mean over some steps."""
    for prefix, kind in KINDS.items():
        for name in steps[0][kind]:
            wanted = np.mean([step[kind][name] for step in steps])
            assert logs[f"{prefix}/{name}"] == pytest.approx(wanted, rel=rtol), name


def epochs_of(history):
    return [dict(zip(history, row, strict=True)) for row in zip(*history.values())]


MODES = {"default": {}, "eager": {"run_eagerly": True}}
if BACKEND != "torch":
    MODES["several steps"] = {"steps_per_execution": 3}


@pytest.mark.parametrize("mode", MODES)
def test_the_logs_of_fit(mode):
    recorder = Recorder()
    plain = by_hand.make_model(keras.optimizers.Adam(0.1, weight_decay=0.1))
    by_hand.fit(plain, callbacks=[recorder])
    steps = recorder.steps(plain)
    optimizer = make("NormalizedAdam", norm=None, weight_decay=0.1)
    model = by_hand.make_model(optimizer, **MODES[mode])
    history = by_hand.fit(model, callbacks=[GradientNorms()]).history
    # The other model has other names.
    names = dict(zip(steps[0]["weights"], optimizer.update_ratios, strict=True))
    steps = [
        {k: {names[n]: v for n, v in row.items()} for k, row in step.items()}
        for step in steps
    ]
    for i, logs in enumerate(epochs_of(history)):
        assert_logged(logs, steps[3 * i : 3 * i + 3])
