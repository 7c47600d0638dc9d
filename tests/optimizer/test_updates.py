"""Tests `apply_to="update"` against base optimizers whose updates NumPy rescales."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from helpers import by_hand, oracle
from helpers.classes import CLASSES, without_decay
from helpers.variables import LAYERS, SHAPES, as_numpy, make_gradients, make_variables
from keras_normopt import RunningNorm, WeightNorm, normalized
from keras_normopt._optimizer import update_capture

BACKEND = keras.backend.backend()
RATE = 0.01


def make_weights(seed=1):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape) for path, shape in SHAPES.items()}


def steps(number=3):
    # Moments remember the magnitudes of steps, so each step has another magnitude.
    return [make_gradients(10.0 ** (-2 * i), seed=i) for i in range(number)]


def variables_of(weights):
    variables = make_variables("float64")
    for variable, value in zip(variables, weights.values(), strict=True):
        variable.assign(value)
    return variables


def tensors(gradients):
    return [ops.convert_to_tensor(g, "float64") for g in gradients.values()]


def train(optimizer, weights, gradients):
    variables = variables_of(weights)
    for g in gradients:
        optimizer.apply(tensors(g), variables)
    return {p: as_numpy(v) for p, v in zip(SHAPES, variables, strict=True)}


def train_by_hand(base, weights, gradients, rescale):
    """Trains with a plain optimizer and rescales each of its updates in NumPy.

    Weights are float64, so that their differences are exact enough.
    """
    variables = variables_of(weights)
    for g in gradients:
        before = {p: as_numpy(v) for p, v in zip(SHAPES, variables, strict=True)}
        base.apply(tensors(g), variables)
        after = {p: as_numpy(v) for p, v in zip(SHAPES, variables, strict=True)}
        update = {p: (after[p] - before[p]) / RATE for p in SHAPES}
        update = rescale(update, before)
        for variable, path in zip(variables, SHAPES, strict=True):
            variable.assign(before[path] + RATE * update[path])
    return {p: as_numpy(v) for p, v in zip(SHAPES, variables, strict=True)}


def assert_same(actual, expected, rtol=1e-6, atol=1e-8):
    for path in SHAPES:
        np.testing.assert_allclose(actual[path], expected[path], rtol=rtol, atol=atol)


def units(path, array):
    """Returns the blocks of a variable under `scope="unit"`."""
    return np.moveaxis(array, -1, 0) if len(SHAPES[path]) > 1 else [array]


def by_block(scope, norm, update, change):
    """Multiplies each block by `change(norm, paths)`, with the norm of the block."""
    groups = {
        "variable": [[path] for path in SHAPES],
        "layer": LAYERS,
        "global": [list(SHAPES)],
    }
    if scope != "unit":
        result = {}
        for block in groups[scope]:
            flat = np.concatenate([update[path].ravel() for path in block])
            factor = change(float(oracle.norm(norm, flat)), block)
            result |= {path: update[path] * factor for path in block}
        return result
    result = {}
    for path in SHAPES:
        parts = [
            u * change(float(oracle.norm(norm, u)), path)
            for u in units(path, update[path])
        ]
        has_units = len(SHAPES[path]) > 1
        result[path] = np.moveaxis(np.stack(parts), 0, -1) if has_units else parts[0]
    return result


def base_of(cls):
    return getattr(keras.optimizers, cls.__name__.removeprefix(cls.PREFIX))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cls", CLASSES)
def test_updates_of_every_base_are_divided_by_their_norm(cls):
    arguments = without_decay(cls)
    if cls.__name__ == "NormalizedSGD":
        arguments |= {"momentum": 0.9, "nesterov": True}
    ours = cls(RATE, apply_to="update", **arguments)
    weights, gradients = make_weights(), steps()
    expected = train_by_hand(
        base_of(cls)(RATE, **arguments),
        weights,
        gradients,
        lambda u, _: by_block("variable", "l2", u, lambda norm, _: 1 / norm),
    )
    # Adafactor computes in float32, and Muon amplifies rounding errors.
    rough = cls.__name__ in ("NormalizedMuon", "NormalizedAdafactor")
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if rough else {}
    actual = train(ours, weights, gradients)
    assert_same(actual, expected, **tolerance)
    plain = train(base_of(cls)(RATE, **arguments), weights, gradients)
    with pytest.raises(AssertionError):  # The comparison can fail.
        assert_same(actual, plain, **tolerance)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scope", ["variable", "unit", "layer", "global"])
@pytest.mark.parametrize("norm", ["l2", "std", "avg_l1", "max"])
def test_updates_are_normalized_by_every_norm_and_scope(norm, scope):
    # This uses SGD. The first updates of Adam are ±1, so their std may be 0.
    ours = keras_normopt.NormalizedSGD(
        RATE, momentum=0.9, norm=norm, scope=scope, apply_to="update"
    )
    weights, gradients = make_weights(), steps()
    expected = train_by_hand(
        keras.optimizers.SGD(RATE, momentum=0.9),
        weights,
        gradients,
        lambda u, _: by_block(scope, norm, u, lambda norm, _: 1 / norm),
    )
    assert_same(train(ours, weights, gradients), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scope", ["variable", "layer"])
def test_updates_are_clipped_only_above_the_threshold(scope):
    # Entries of Adam's first update are about 1, so only some blocks are clipped.
    ours = keras_normopt.ClippedAdam(
        RATE, norm="avg_l2", max_norm=0.8, scope=scope, apply_to="update"
    )
    weights, gradients = make_weights(), steps()
    clipped = []

    def change(norm, _):
        clipped.append(norm > 0.8)
        return min(1, 0.8 / norm)

    expected = train_by_hand(
        keras.optimizers.Adam(RATE),
        weights,
        gradients,
        lambda u, _: by_block(scope, "avg_l2", u, change),
    )
    assert_same(train(ours, weights, gradients), expected)
    assert any(clipped)
    assert not all(clipped)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("norm", ["l2", None])
@pytest.mark.parametrize("scope", ["variable", "unit", "layer"])
def test_a_trust_ratio_multiplies_updates_by_the_norm_of_the_weights(scope, norm):
    ours = keras_normopt.NormalizedRMSprop(
        RATE, norm=norm, scope=scope, apply_to="update", step_size=WeightNorm(0.5)
    )
    weights = make_weights() | {"b/bias": np.zeros(SHAPES["b/bias"])}

    def rescale(update, before):
        sizes = iter(
            [np.linalg.norm(u) for p in SHAPES for u in units(p, before[p])]
            if scope == "unit"
            else ()
        )

        def change(size, block):
            if scope == "unit":
                weight_norm = next(sizes)
            else:
                flat = np.concatenate([before[path].ravel() for path in block])
                weight_norm = np.linalg.norm(flat)
            factor = 0.5 * weight_norm or 1.0
            return factor / size if norm else factor

        return by_block(scope, "l2", update, change)

    gradients = steps(2)
    base = keras.optimizers.RMSprop(RATE)
    expected = train_by_hand(base, weights, gradients, rescale)
    assert_same(train(ours, weights, gradients), expected, rtol=1e-5, atol=1e-7)


def test_a_base_that_scales_its_steps_may_have_a_trust_ratio():
    # With `apply_to="gradient"`, a ratio would scale the learning rate. These bases
    # refuse such a ratio.
    for name in ("NormalizedLamb", "NormalizedAdafactor"):
        cls = getattr(keras_normopt, name)
        optimizer = cls(RATE, apply_to="update", step_size="weight_norm")
        variable = keras.Variable(np.full((2, 2), 2.0))
        optimizer.apply([ops.convert_to_tensor([[3.0, 0.1], [1.0, 1.0]])], [variable])
        moved = np.linalg.norm(ops.convert_to_numpy(variable) - 2.0)
        assert moved == pytest.approx(RATE * 4.0, rel=1e-4)


@pytest.mark.usefixtures("float64")
def test_gradient_correlation_works_with_updates():
    from keras_normopt.step_sizes import GradientCorrelation

    weights, gradients = make_weights(), [make_gradients(seed=0)] * 3
    plain = keras_normopt.NormalizedSGD(RATE, step_size=GradientCorrelation(0.5))
    ours = keras_normopt.NormalizedSGD(
        RATE, apply_to="update", step_size=GradientCorrelation(0.5)
    )
    # Without momentum, normalized updates and gradients are the same.
    expected = train(plain, weights, gradients)
    assert_same(train(ours, weights, gradients), expected)


@pytest.mark.usefixtures("float64")
def test_norm_functions_get_updates_divided_by_the_rate():
    def shifted(gradient):  # This norm is not homogeneous.
        return 1.0 + ops.sum(ops.abs(gradient))

    weights, gradients = make_weights(), steps()
    ours = keras_normopt.NormalizedSGD(
        RATE, momentum=0.9, norm=shifted, apply_to="update"
    )
    expected = train_by_hand(
        keras.optimizers.SGD(RATE, momentum=0.9),
        weights,
        gradients,
        lambda update, _: {p: u / (1 + np.abs(u).sum()) for p, u in update.items()},
    )
    assert_same(train(ours, weights, gradients), expected)


@pytest.mark.usefixtures("float64")
def test_norm_functions_may_return_the_new_update(custom_norms):
    register = keras_normopt.NormalizedOptimizer.set_normalization_function
    register("signed_root", lambda g: ops.sign(g) * ops.sqrt(ops.abs(g)))
    weights, gradients = make_weights(), steps()
    ours = keras_normopt.NormalizedSGD(RATE, norm="signed_root", apply_to="update")
    expected = train_by_hand(
        keras.optimizers.SGD(RATE),
        weights,
        gradients,
        lambda update, _: {
            p: np.sign(u) * np.sqrt(np.abs(u)) for p, u in update.items()
        },
    )
    assert_same(train(ours, weights, gradients), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cls", CLASSES)
def test_without_a_norm_updates_equal_those_of_the_base(cls):
    weights, gradients = make_weights(), steps()
    ours = train(cls(RATE, norm=None, apply_to="update"), weights, gradients)
    expected = train(base_of(cls)(RATE), weights, gradients)
    assert_same(ours, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("float64")
def test_excluded_variables_and_weight_decay_are_not_normalized():
    weights, gradients = make_weights(), steps()
    ours = keras_normopt.NormalizedAdamW(
        RATE, weight_decay=0.1, exclude="bias", apply_to="update"
    )
    moved = train(ours, weights, gradients)
    base = train(keras.optimizers.AdamW(RATE, weight_decay=0.1), weights, gradients)
    for path in SHAPES:
        if "bias" in path:
            np.testing.assert_allclose(moved[path], base[path], rtol=1e-9)
    # Weight decay comes before the update and is not normalized.
    decayed = {p: w * (1 - 0.1 * RATE) for p, w in make_weights().items()}
    weights = make_weights()
    moved = train(
        keras_normopt.NormalizedAdamW(RATE, weight_decay=0.1, apply_to="update"),
        weights,
        gradients[:1],
    )
    for path in SHAPES:
        size = np.linalg.norm(moved[path] - decayed[path])
        assert size == pytest.approx(RATE, rel=1e-5)  # The rate is a float32.


def test_small_updates_of_large_weights_are_exact():
    # In float32, 1000 + 1e-6 is 1000.
    optimizer = keras_normopt.NormalizedSGD(1e-6, momentum=0.9, apply_to="update")
    variable = keras.Variable(np.full((3, 4), 1000.0))
    seen = []
    add = optimizer._add_updates

    def spy(variables, updates):
        seen.extend(ops.convert_to_numpy(u) for u in updates)
        add(variables, updates)

    optimizer._add_updates = spy
    for seed in range(2):
        gradient = np.random.default_rng(seed).normal(size=(3, 4)) * 1e-9
        optimizer.apply([ops.convert_to_tensor(gradient, "float32")], [variable])
    assert len(seen) == 2
    for update in seen:
        size = np.linalg.norm(update.astype("float64"))
        assert size == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("base", ["SGD", "RMSprop", "Lion"])
def test_updates_in_low_precision_have_the_length_of_the_rate(base, dtype):
    cls = getattr(keras_normopt, f"Normalized{base}")
    optimizer = cls(0.125, apply_to="update")
    variable = keras.Variable(np.zeros((3, 4)), dtype=dtype)
    gradient = np.random.default_rng(0).normal(size=(3, 4))
    optimizer.apply([ops.convert_to_tensor(gradient, dtype)], [variable])
    moved = ops.convert_to_numpy(ops.cast(variable, "float32"))
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    assert np.linalg.norm(moved) == pytest.approx(0.125, rel=tolerance)
    assert keras.backend.standardize_dtype(variable.dtype) == dtype


@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_a_rate_of_zero_changes_no_weight(base):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.0, 0.5])
    cls = getattr(keras_normopt, f"Normalized{base}")
    optimizer = cls(schedule, apply_to="update")
    variable = keras.Variable(np.ones(4))
    gradient = ops.convert_to_tensor([3.0, 4.0, 0.0, 0.0])
    optimizer.apply([gradient], [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), np.ones(4))
    optimizer.apply([gradient], [variable])
    moved = np.linalg.norm(ops.convert_to_numpy(variable) - 1)
    assert moved == pytest.approx(0.5, rel=1e-5)


def test_an_update_of_zero_stays_zero():
    optimizer = keras_normopt.NormalizedAdam(apply_to="update", step_size="weight_norm")
    variable = keras.Variable(np.ones(4))
    optimizer.apply([ops.zeros(4)], [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), np.ones(4))


def momentum_by_hand(epochs, average=1):
    """Trains with SGD with momentum and normalized updates, in NumPy."""
    velocity = [0.0, 0.0]

    def step(i, gradient):
        velocity[i] = 0.9 * velocity[i] + gradient
        return 0.1 * oracle.normalize("l2", velocity[i]).astype("float64")

    return by_hand.descend(epochs, step, average)


@pytest.mark.parametrize("accumulated", [None, 3])
@pytest.mark.parametrize("wrapped", [False, True])
def test_fit_normalizes_updates_and_resumes_from_a_file(wrapped, accumulated, tmp_path):
    optimizer = keras_normopt.NormalizedSGD(
        0.1,
        momentum=0.9,
        apply_to="update",
        gradient_accumulation_steps=accumulated,
    )
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = by_hand.make_model(optimizer)
    by_hand.fit(model)
    expected = momentum_by_hand(by_hand.EPOCHS, average=accumulated or 1)
    by_hand.assert_same(model.get_weights(), expected)
    # Saving and loading does not change the training that follows.
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    by_hand.fit(loaded)
    expected = momentum_by_hand(2 * by_hand.EPOCHS, average=accumulated or 1)
    by_hand.assert_same(loaded.get_weights(), expected)


def test_an_update_in_mixed_precision_is_as_long_as_the_rate():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = by_hand.make_model(keras_normopt.NormalizedAdam(0.1, apply_to="update"))
        before = model.get_weights()
        by_hand.fit(model, batch_size=12, epochs=1)
    finally:
        keras.config.set_dtype_policy("float32")
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.linalg.norm(new - old) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's sparse gradients")
@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_updates_of_sparse_gradients_equal_those_of_dense_ones(base):
    import tensorflow as tf

    table = np.linspace(-1, 1, 8).reshape(4, 2)
    slices = tf.IndexedSlices(
        tf.constant([[3.0, 0.0], [0.0, 4.0], [0.0, 8.0]]),
        tf.constant([1, 3, 1]),
        tf.constant([4, 2]),
    )
    cls = getattr(keras_normopt, f"Normalized{base}")
    moved = []
    for gradient in (slices, tf.convert_to_tensor(slices)):
        optimizer = cls(0.5, apply_to="update")
        variable = keras.Variable(table)
        optimizer.apply([gradient], [variable])
        moved.append(variable.numpy() - table)
        assert np.linalg.norm(moved[-1]) == pytest.approx(0.5, rel=1e-5)
    np.testing.assert_allclose(*moved, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's classes")
@pytest.mark.parametrize("cls", CLASSES)
def test_updates_with_foreach_equal_updates_one_by_one(cls, monkeypatch):
    gradients, results = steps(), []
    for with_foreach in (True, False):
        optimizer = cls(RATE, apply_to="update")
        names = {c.__name__: c for c in cls.__mro__}
        if "TorchParallelOptimizer" not in names:
            pytest.skip("has no foreach update")
        if not with_foreach:
            foreach = names["TorchParallelOptimizer"]
            monkeypatch.delattr(foreach, "_backend_update_step")
            monkeypatch.setattr(
                update_capture.UpdateCapture, "_is_foreach", lambda self: False
            )
        results.append(train(optimizer, make_weights(), gradients))
    assert_same(*results, rtol=1e-6, atol=1e-7)


# Bases that are refused.


@pytest.mark.parametrize("kind", ["Normalized", "Clipped"])
@pytest.mark.parametrize("base", ["Ftrl", "ScheduleFreeAdamW"])
def test_bases_that_compute_weights_from_slots_are_refused(base, kind):
    if not hasattr(keras.optimizers, base):
        pytest.skip("not in this Keras")
    factory = getattr(keras_normopt, kind.lower())
    cls = factory(getattr(keras.optimizers, base))
    with pytest.raises(
        ValueError, match=f"{base} computes weights from slots.*apply_to"
    ):
        cls(apply_to="update")
    cls()


def test_bases_that_update_all_variables_at_once_are_refused():
    class Together(keras.optimizers.SGD):
        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            pass

    with pytest.raises(ValueError, match=r"Together updates all.*apply_to"):
        normalized(Together)(apply_to="update")


class AssignsNewValue(keras.optimizers.Optimizer):
    def update_step(self, gradient, variable, learning_rate):
        self.assign(variable, variable - gradient)


class UpdatesTwice(keras.optimizers.Optimizer):
    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, gradient)
        self.assign_sub(variable, gradient)


class AssignsDirectly(keras.optimizers.Optimizer):
    def update_step(self, gradient, variable, learning_rate):
        variable.assign(variable - gradient)


class UpdatesOnce(keras.optimizers.Optimizer):
    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, ops.cast(learning_rate, "float32") * gradient)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (AssignsNewValue, "calls `assign` for a weight"),
        (UpdatesTwice, "updates a weight twice"),
        (AssignsDirectly, "by `self.assign_add` or `self.assign_sub`"),
    ],
)
def test_bases_that_change_weights_in_other_ways_are_refused(base, message):
    optimizer = normalized(base)(0.1, apply_to="update")
    variable = keras.Variable(np.ones(2), dtype="float32")
    with pytest.raises(RuntimeError, match=message):
        optimizer.apply([ops.ones(2)], [variable])


# These bases have no foreach class on PyTorch.
@pytest.mark.parametrize("base", ["Lamb", "Adafactor"])
def test_a_keras_whose_updates_cannot_be_captured_is_refused(base, monkeypatch):
    # The patch stands for a Keras with other private methods.
    optimizer = getattr(keras_normopt, f"Normalized{base}")(0.1, apply_to="update")
    owner, place = update_capture.UpdateCapture, "_distributed_tf_update_step"
    if BACKEND != "tensorflow":
        owner, place = base_of(type(optimizer)), "_backend_update_step"
    monkeypatch.setattr(owner, place, lambda *arguments: None, raising=False)
    variable = keras.Variable(np.zeros((2, 2)), dtype="float32")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"could not .* its updates"):
            optimizer.apply([ops.ones((2, 2))], [variable])


# Other bases and arguments.


def test_updates_of_a_users_own_base_are_normalized():
    optimizer = normalized(UpdatesOnce)(0.5, apply_to="update")
    variable = keras.Variable(np.zeros(2))
    optimizer.apply([ops.convert_to_tensor([3.0, 4.0])], [variable])
    moved = ops.convert_to_numpy(variable)
    np.testing.assert_allclose(moved, [-0.3, -0.4], rtol=1e-6)


@pytest.mark.parametrize("apply_to", ["updates", None, True, ["update"]])
def test_wrong_values_of_apply_to_are_refused(apply_to):
    with pytest.raises(ValueError, match=r"`apply_to` must be.*apply_to="):
        keras_normopt.NormalizedSGD(apply_to=apply_to)


@pytest.mark.usefixtures("float64")
def test_updates_are_clipped_at_a_multiple_of_the_mean_of_earlier_norms():
    rule = RunningNorm(1.25, decay=0.5, warmup=2)
    ours = keras_normopt.ClippedSGD(
        RATE, momentum=0.9, apply_to="update", max_norm=rule
    )
    weights = make_weights()
    gradients = [make_gradients(s, seed=i) for i, s in enumerate([1, 2, 9, 1, 30])]
    seen = {path: [] for path in SHAPES}

    def rescale(update, _):
        result = {}
        for path, u in update.items():
            norm, limit = (
                np.linalg.norm(u),
                1.25 * by_hand.running_mean(rule, seen[path]),
            )
            seen[path].append(min(norm, limit))
            result[path] = u * min(1, limit / norm)
        return result

    base = keras.optimizers.SGD(RATE, momentum=0.9)
    expected = train_by_hand(base, weights, gradients, rescale)
    assert_same(train(ours, weights, gradients), expected, rtol=1e-5, atol=1e-6)
