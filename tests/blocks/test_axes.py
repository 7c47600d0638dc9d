"""Tests which axes of a variable count as inputs, and which count as outputs.

The tests cover custom layers, axes that the user gives, and axes in saved configs.
"""

import json

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_normopt
from helpers.matrices import assert_close, einsum_dense_qkv, find, to_numpy
from helpers.stored import stored
from helpers.variables import as_numpy
from keras_normopt import RunningNorm, WeightNorm
from keras_normopt._blocks import axes

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)


# Custom layers.


class Custom(keras.Layer):
    """A layer that only holds variables of the given shapes."""

    num_experts = None

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, self.add_weight(shape=shape, name=name))


def axes_by_name(layer):
    by_name, guessed = find(layer)
    return {n: (str(a), a.role, n in guessed) for n, (_, a) in by_name.items()}


def test_name_and_shape_decide_the_axes_in_unknown_layers():
    assert axes_by_name(
        Custom(
            w=(3, 4),
            v=(2, 3, 4),
            gate_up_proj_bias=(3, 4),
            layer_scale2=(3, 4),
            class_token=(1, 1, 4),
            probe=(1, 1, 4),
            one_input_kernel=(1, 4),
            position_embeddings=(6, 4),
            pos_embed=(1, 2, 2, 4),
            pos_proj=(3, 4),
            relative_bias_table=(5, 4),
            tokenizer=(3, 4),
        )
    ) == {
        "w": ("(0 | 1)", "kernel", True),
        "v": ("(0, 1 | 2)", "kernel", True),
        "gate_up_proj_bias": ("vector", "vector", False),
        "layer_scale2": ("vector", "vector", False),
        "class_token": ("vector", "vector", False),
        "probe": ("vector", "vector", False),
        "one_input_kernel": ("(0 | 1)", "kernel", True),
        "position_embeddings": ("(0 | 1)", "embedding", False),
        "pos_embed": ("(0, 1, 2 | 3)", "embedding", False),
        "pos_proj": ("(0 | 1)", "kernel", True),
        "relative_bias_table": ("(0 | 1)", "embedding", False),
        "tokenizer": ("(0 | 1)", "kernel", True),
    }


def test_each_expert_has_its_own_matrix():
    class Mixture(Custom):
        num_experts = 5

    layer = Mixture(w1=(5, 3, 4), w2=(4, 3, 5), bias=(5, 4))
    assert axes_by_name(layer)["w1"] == ("(1 | 2)", "kernel", False)
    assert axes_by_name(layer)["w2"] == ("(0, 1 | 2)", "kernel", True)
    assert axes_by_name(layer)["bias"] == ("vector", "vector", False)
    # Inputs of an expert reach only the outputs of the same expert.
    variable, variable_axes = find(layer)[0]["w1"]
    variable.assign(RNG.normal(size=(5, 3, 4)))
    inputs = np.eye(3)[[0, 1, 2, 0, 1]]
    outputs = np.einsum("ei,eio->eo", inputs, to_numpy(variable))
    matrices = to_numpy(variable_axes.to_matrices(variable.value[None]))
    assert_close(matrices[np.arange(5), [0, 1, 2, 0, 1]], outputs)
    assert (
        axes_by_name(Custom(expert_kernel=(5, 3, 4)))["expert_kernel"][0] == "(1 | 2)"
    )


def test_axes_from_a_base_class_are_kept_and_axes_of_new_kernels_are_guessed():
    class Filters(layers.DepthwiseConv2D):
        def build(self, input_shape):
            super().build(input_shape)
            self.mix = self.add_weight(shape=(3, 4, 2), name="mix")

    layer = Filters(3)
    layer.build((None, 5, 5, 4))
    by_name, guessed = find(layer)
    assert str(by_name["kernel"][1]) == "(0, 1 | 3)"
    assert guessed == ["mix"]


@pytest.mark.skipif(BACKEND != "jax", reason="needs JAX")
def test_axes_in_a_jax_layer_are_guessed():
    params = {"kernel": np.ones((2, 3, 4)), "scale": np.ones(4)}
    layer = layers.JaxLayer(lambda params, inputs: inputs, params=params)
    layer.build((None, 3))
    variable_axes, guessed = axes.find(layer.trainable_variables, ["a", "b"], None)
    assert list(map(str, variable_axes)) == ["(0, 1 | 2)", "vector"]
    assert guessed == {0: layer}


def test_one_warning_names_the_variables_of_unknown_layers(recwarn):
    layer = Custom(first=(2, 3, 4), second=(2, 3))
    optimizer = keras_normopt.NormalizedSGD(scope="unit")
    for _ in range(2):
        optimizer.apply(
            [ops.ones(v.shape) for v in layer.trainable_variables],
            layer.trainable_variables,
        )
    (warning,) = recwarn
    assert "first of shape (2, 3, 4) in Custom: (0, 1 | 2)" in str(warning.message)
    # Every rule gives a kernel of rank 2 the same axes, so no warning is needed.
    assert "second" not in str(warning.message)


# Axes that the user gives.


GIVEN = {
    "embedding": axes.Axes("embedding", (0,), (1, 2)),
    "vector": axes.Axes("vector"),
    ((0,), (1, 2)): axes.Axes("kernel", (0,), (1, 2)),
    ((1,), (-1,)): axes.Axes("kernel", (1,), (2,)),
    ((0, 1), (2,), 2): axes.Axes("kernel", (0, 1), (2,), 2),
}


@pytest.mark.parametrize("value", GIVEN)
def test_given_axes_override_those_of_the_layer(value):
    layer = layers.Conv1D(4, 2)
    layer.build((None, 5, 3))
    by_name, _ = find(
        layer, given={"no/such/kernel|conv1d.*kernel": value, ".*": "vector"}
    )
    assert by_name["kernel"][1] == GIVEN[value]
    optimizer = keras_normopt.NormalizedSGD(scope="unit", axes={"kernel": value})
    optimizer.build(layer.trainable_variables)
    config = json.loads(json.dumps(optimizer.get_config()))
    loaded = keras_normopt.NormalizedSGD.from_config(config)
    loaded.build(layer.trainable_variables)
    assert loaded._variable_axes == optimizer._variable_axes
    assert loaded._variable_axes[0] == GIVEN[value]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (((0,), (3,)), "no such axes"),
        (((-4,), (1,)), "no such axes"),
        (((0,), (-3,)), "named twice"),
        (((0,), (2,), 3), "cannot be split into 3"),
    ],
)
def test_axes_that_do_not_fit_a_variable_are_refused(value, problem):
    optimizer = keras_normopt.NormalizedSGD(scope="unit", axes={"w": value})
    with pytest.raises(ValueError, match=rf"{problem}.*Received: axes=\{{'w'"):
        optimizer.build([keras.Variable(np.ones((2, 3, 4)), name="w")])


def test_axes_for_a_pattern_without_a_match_cause_a_warning():
    optimizer = keras_normopt.NormalizedSGD(scope="unit", axes={"x": "vector"})
    with pytest.warns(UserWarning, match=r"`axes`.*'x' matches none.*'w'"):
        optimizer.build([keras.Variable(np.ones((2, 3)), name="w")])


def test_axes_for_a_pattern_that_an_earlier_pattern_hides_cause_a_warning():
    patterns = {"w": "embedding", "w_2": "vector"}
    optimizer = keras_normopt.NormalizedSGD(scope="unit", axes=patterns)
    variables = [keras.Variable(np.ones((2, 3)), name=name) for name in ("w_2", "k")]
    with pytest.warns(UserWarning, match=r"'w_2' has no effect.*first match counts"):
        optimizer.build(variables)
    assert optimizer._variable_axes[0].role == "embedding"


def test_axes_without_an_effect_cause_a_warning():
    optimizer = keras_normopt.NormalizedSGD(axes={"w": "vector"})
    with pytest.warns(UserWarning, match=r"`axes`.*has no effect.*'w': 'vector'"):
        optimizer.build([keras.Variable(np.ones((2, 3)), name="w")])


def test_axes_of_a_weight_added_to_a_keras_layer_are_guessed():
    layer = layers.Dense(4)
    with layer._open_name_scope():
        layer.adapter = keras.Variable(np.ones((3, 2, 4)), name="adapter")
    layer.build((None, 3))
    optimizer = keras_normopt.NormalizedSGD(scope="unit")
    with pytest.warns(UserWarning, match=r"adapter of shape \(3, 2, 4\) in Dense"):
        optimizer.build(layer.trainable_variables)
    by_name = {
        v.name: a
        for v, a in zip(
            layer.trainable_variables, optimizer._variable_axes, strict=True
        )
    }
    assert by_name["bias"].role == "vector"
    assert by_name["adapter"] == axes.Axes("kernel", (0, 1), (2,))


# Options that use the units of a layer.


def torch_linear():
    from torch import nn

    return layers.TorchModuleWrapper(nn.Linear(4, 3))


LAYERS = {
    # Each value: the layer, its input shape, and the input axes of its kernel.
    "depthwise": (lambda: layers.DepthwiseConv2D(3), (None, 5, 5, 4), (0, 1)),
    "transposed": (lambda: layers.Conv2DTranspose(3, 2), (None, 5, 5, 4), (0, 1, 3)),
    "query": (einsum_dense_qkv, (None, 1, 8), (0,)),
    "torch": (torch_linear, (None, 4), (1,)),
}


@pytest.fixture(params=LAYERS)
def kernel(request):
    """Returns a kernel, a gradient for it, and its input axes."""
    if request.param == "torch" and BACKEND != "torch":
        pytest.skip("needs PyTorch")
    make, shape, inputs = LAYERS[request.param]
    layer = make()
    request.node.layer = layer  # Keeps the layer alive until the optimizer reads it.
    if not layer.built:
        layer.build(shape)
    variable = layer.trainable_variables[0]
    gradient = RNG.normal(size=variable.shape) + 0.5
    return variable, gradient.astype("float32"), inputs


def step_of(optimizer, variable, gradient):
    """Returns what one step subtracts from a variable."""
    before = as_numpy(variable)
    optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
    return before - as_numpy(variable)


def l2_norm(array, inputs):
    return np.sqrt(np.sum(array.astype("float64") ** 2, axis=inputs, keepdims=True))


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_units_are_normalized_over_the_input_axes(kernel, apply_to):
    variable, gradient, inputs = kernel
    optimizer = keras_normopt.NormalizedSGD(1.0, scope="unit", apply_to=apply_to)
    expected = gradient / l2_norm(gradient, inputs)
    assert_close(step_of(optimizer, variable, gradient), expected)


def test_gradients_are_centered_over_the_input_axes(kernel):
    variable, gradient, inputs = kernel
    optimizer = keras_normopt.NormalizedSGD(1.0, norm=None, centralize=True)
    expected = gradient - gradient.mean(axis=inputs, keepdims=True)
    assert_close(step_of(optimizer, variable, gradient), expected)


def test_agc_computes_norms_over_the_input_axes(kernel):
    variable, gradient, inputs = kernel
    weight = RNG.normal(size=gradient.shape)
    variable.assign(weight)
    ratio = l2_norm(weight, inputs) / l2_norm(gradient, inputs)
    coefficient = float(1 / np.median(ratio))  # Half of the units are clipped.
    optimizer = keras_normopt.ClippedSGD(
        1.0, scope="unit", max_norm=WeightNorm(coefficient, minimum=1e-3)
    )
    expected = gradient * np.minimum(1, coefficient * ratio)
    np.testing.assert_allclose(
        step_of(optimizer, variable, gradient), expected, rtol=1e-4, atol=1e-5
    )


def test_weight_norm_as_step_size_computes_norms_over_the_input_axes(kernel):
    variable, gradient, inputs = kernel
    weight = RNG.normal(size=gradient.shape)
    variable.assign(weight)
    optimizer = keras_normopt.NormalizedSGD(1.0, scope="unit", step_size="weight_norm")
    expected = gradient / l2_norm(gradient, inputs) * l2_norm(weight, inputs)
    np.testing.assert_allclose(
        step_of(optimizer, variable, gradient), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.skipif(BACKEND != "jax", reason="Optax needs JAX")
@pytest.mark.parametrize("inputs", [(0,), (1,), (0, 2), (1, 2), (0, 1)])
def test_agc_over_given_axes_equals_optax(inputs):
    import optax

    weight, gradient = RNG.normal(size=(2, 2, 3, 4)).astype("float32")
    transform = optax.adaptive_grad_clip(0.8, eps=1e-3, axis=inputs)
    expected, _ = transform.update(gradient, transform.init(weight), weight)
    outputs = tuple(i for i in range(3) if i not in inputs)
    optimizer = keras_normopt.ClippedSGD(
        1.0,
        scope="unit",
        max_norm=WeightNorm(0.8, minimum=1e-3),
        axes={"w": (inputs, outputs)},
    )
    actual = step_of(optimizer, keras.Variable(weight, name="w"), gradient)
    assert np.abs(actual - gradient).max() > 0.01
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# Saved configs.


def transposed_convolution():
    layer = layers.Conv1DTranspose(3, 2, use_bias=False, name="layer")
    layer.build((None, 5, 4))
    return layer


def kernel_of(path, shape=(2, 3, 4)):
    """Returns a kernel with a path that belongs to no layer."""
    variable = keras.Variable(np.zeros(shape), name="kernel")
    variable._path = path
    return variable


@pytest.fixture
def saved_config():
    optimizer = keras_normopt.NormalizedSGD(1.0, scope="unit")
    layer = transposed_convolution()
    optimizer.build(layer.trainable_variables)
    return json.loads(json.dumps(optimizer.get_config()))


def test_saved_axes_apply_to_a_variable_of_the_same_path_and_shape(saved_config):
    assert saved_config["variable_paths"] == ["layer/kernel"]
    optimizer = keras_normopt.NormalizedSGD.from_config(saved_config)
    # Without its layer, the variable is recognized by path and shape.
    variable = kernel_of("model/layer/kernel")
    gradient = RNG.normal(size=(2, 3, 4)).astype("float32")
    expected = gradient / l2_norm(gradient, (0, 2))
    assert_close(step_of(optimizer, variable, gradient), expected)
    assert optimizer.get_config() == saved_config


@pytest.mark.parametrize(
    ("path", "shape"), [("layer/kernel", (2, 3, 5)), ("other/kernel", (2, 3, 4))]
)
def test_saved_axes_do_not_apply_to_another_path_or_shape(saved_config, path, shape):
    optimizer = keras_normopt.NormalizedSGD.from_config(saved_config)
    variable = kernel_of(path, shape)
    gradient = RNG.normal(size=shape).astype("float32")
    with pytest.warns(UserWarning, match="other paths or shapes") as caught:
        actual = step_of(optimizer, variable, gradient)
    assert len([w for w in caught if "NormalizedSGD" in str(w.message)]) == 1
    assert_close(actual, gradient / l2_norm(gradient, (0, 1)))


def config_of_an_earlier_version(config):
    """Returns the config that a version without axes and directions would save."""
    new = ("axes", "direction", "variable_axes", "variable_shapes")
    return {k: v for k, v in config.items() if k not in new}


@pytest.mark.parametrize("centralize", [False, True])
def test_a_config_of_an_earlier_version_keeps_units_on_the_last_axis(
    saved_config, centralize
):
    layer = transposed_convolution()
    gradient = RNG.normal(size=(2, 3, 4)).astype("float32")
    config = config_of_an_earlier_version(saved_config) | {"centralize": centralize}
    expected = gradient - centralize * gradient.mean(axis=(0, 1))
    expected = expected / l2_norm(expected, (0, 1))
    for _ in range(2):  # The second pass loads a config that was saved again.
        optimizer = keras_normopt.NormalizedSGD.from_config(config)
        assert_close(step_of(optimizer, layer.kernel, gradient), expected)
        config = optimizer.get_config()
        assert "axes" not in config
        assert "variable_axes" not in config


def test_running_norms_continue_with_a_config_of_an_earlier_version():
    gradients = RNG.normal(size=(4, 2, 3, 4)).astype("float32")
    gradients[2] *= 5
    saved = keras_normopt.ClippedSGD(
        1.0, scope="unit", max_norm=RunningNorm(1.1, warmup=2)
    )
    layer = transposed_convolution()
    saved.build(layer.trainable_variables)
    config = config_of_an_earlier_version(saved.get_config())
    loaded = keras_normopt.ClippedSGD.from_config(config)
    # The earlier version always took the last axis as the output axis.
    plain = keras.Variable(np.zeros((2, 3, 4)), name="plain")
    peer = keras_normopt.ClippedSGD(
        1.0,
        scope="unit",
        max_norm=RunningNorm(1.1, warmup=2),
        axes={"plain": ((0, 1), (2,))},
    )
    for gradient in gradients[:2]:
        assert_close(
            step_of(loaded, layer.kernel, gradient), step_of(peer, plain, gradient)
        )
    reloaded = keras_normopt.ClippedSGD.from_config(loaded.get_config())
    reloaded.build([layer.kernel])
    store = {}
    loaded.save_own_variables(store)
    reloaded.load_own_variables(store)
    assert (4,) in [a.shape for a in stored(reloaded)]
    for gradient in gradients[2:]:
        actual = step_of(reloaded, layer.kernel, gradient)
        assert_close(actual, step_of(peer, plain, gradient))
    assert np.abs(actual).max() > 0


# Replicas and square kernels.


def fit_convolutions(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 2)),
            layers.DepthwiseConv2D(2, depth_multiplier=2),
            layers.Conv2DTranspose(3, 2),
        ]
    )
    optimizer = keras_normopt.NormalizedSGD(0.1, **options)
    model.compile(optimizer, "mse", jit_compile=False)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4, 4, 2)), rng.normal(size=(8, 4, 4, 3))
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    return model.get_weights()


def test_replicas_find_the_axes_of_each_variable(strategy):
    options = {"scope": "unit", "centralize": True}
    expected = fit_convolutions(**options)
    with strategy.scope():
        actual = fit_convolutions(**options)
    for actual_weight, weight in zip(actual, expected, strict=True):
        np.testing.assert_allclose(actual_weight, weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("track_norms", [False, True])
@pytest.mark.parametrize("cls", [keras_normopt.NormalizedSGD, keras_normopt.ClippedSGD])
def test_units_of_a_square_kernel_may_lie_along_its_first_axis(cls, track_norms):
    gradient = RNG.normal(size=(4, 4)).astype("float32")
    limit = {"max_norm": 0.5} if cls is keras_normopt.ClippedSGD else {}
    axes = {"kernel": ((1,), (0,))}
    optimizer = cls(1.0, scope="unit", axes=axes, track_norms=track_norms, **limit)
    variable = keras.Variable(np.zeros((4, 4)), name="kernel")
    norms = np.linalg.norm(gradient, axis=1, keepdims=True)
    divisors = np.maximum(norms / 0.5, 1) if limit else norms
    assert_close(step_of(optimizer, variable, gradient), gradient / divisors)
    if track_norms:
        assert_close(optimizer.gradient_norms["kernel"], norms.mean())


# More configs.


def test_a_short_config_does_not_select_the_axes_of_an_earlier_version():
    config = {"learning_rate": 0.1, "track_norms": True}
    optimizer = keras_normopt.OrthogonalSGD.from_config(config)
    layer = keras.layers.LSTM(2)
    layer.build((None, 3, 4))
    optimizer.build(layer.trainable_variables)
    assert optimizer.get_config()["variable_axes"][0] == ["kernel", [0], [1], 4]


def test_given_axes_override_those_of_a_saved_config(saved_config):
    config = saved_config | {"axes": {"kernel": ((0, 1), (2,))}}
    optimizer = keras_normopt.NormalizedSGD.from_config(config)
    variable = kernel_of("layer/kernel")
    gradient = RNG.normal(size=(2, 3, 4)).astype("float32")
    expected = gradient / l2_norm(gradient, (0, 1))
    assert_close(step_of(optimizer, variable, gradient), expected)
