"""Compares the matrices of each Keras layer with the outputs of the layer."""

import math

import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st
from keras import layers, ops

from helpers.matrices import assert_close, einsum_dense_qkv, find, to_numpy
from keras_normopt._blocks import axes

pytestmark = pytest.mark.once

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)


def build(layer, input_shape):
    """Builds a layer and gives its kernels random values."""
    layer.build(input_shape)
    randomize(layer)
    return layer


def randomize(layer):
    for variable in layer.trainable_variables:
        is_vector = any(word in variable.path for word in ("bias", "gamma", "beta"))
        values = RNG.normal(size=variable.shape)
        variable.assign(np.zeros(variable.shape) if is_vector else values)


def matrices_of(layer, name="kernel"):
    """Returns the matrices of a kernel, stacked in one NumPy array."""
    variable, kernel_axes = find(layer)[0][name]
    assert kernel_axes.role == "kernel"
    return to_numpy(kernel_axes.to_matrices(variable.value[None]))


def one_hot_response(layer, shape):
    """Returns the outputs for all one-hot inputs of a shape."""
    inputs = np.eye(math.prod(shape), dtype="float32").reshape(-1, *shape)
    return to_numpy(layer(ops.convert_to_tensor(inputs)))


def diagonal_blocks(blocks):
    """Returns the diagonal blocks of an array of shape (rows, n, columns, n).

    Asserts that all other blocks are zero.
    """
    count = blocks.shape[1]
    for i, j in np.argwhere(~np.eye(count, dtype=bool)):
        np.testing.assert_allclose(blocks[:, i, :, j], 0, atol=1e-6)
    return np.stack([blocks[:, i, :, i] for i in range(count)])


# A layer maps a one-hot input to a row of its matrix.


def test_dense_multiplies_by_one_matrix():
    layer = build(layers.Dense(3), (None, 4))
    assert_close(matrices_of(layer), one_hot_response(layer, (4,))[None])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolution_has_a_matrix_for_each_group(rank, groups):
    cls = (layers.Conv1D, layers.Conv2D, layers.Conv3D)[rank - 1]
    if BACKEND == "tensorflow" and rank == 3 and groups > 1:
        pytest.skip("TensorFlow has no grouped Conv3D on CPU")
    size = (2, 3, 2)[:rank]
    layer = build(cls(4, size, groups=groups), (None, *size, 6))
    outputs = one_hot_response(layer, (*size, 6))
    outputs = outputs.reshape(math.prod(size), groups, 6 // groups, groups, -1)
    outputs = outputs.transpose(0, 2, 1, 4, 3)
    outputs = outputs.reshape(-1, groups, 4 // groups, groups)
    assert_close(matrices_of(layer), diagonal_blocks(outputs))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolution_has_one_matrix_over_all_positions(rank):
    names = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
    layer = getattr(layers, names[rank - 1])(3, (2,) * rank)
    layer = build(layer, (None, *(2,) * rank, 4))
    outputs = one_hot_response(layer, (*(2,) * rank, 4))
    # All inputs reach the middle output. The last input meets the first weight.
    outputs = outputs[(slice(None), *(1,) * rank)].reshape(*(2,) * rank, 4, 3)
    outputs = np.flip(outputs, tuple(range(rank)))
    assert_close(matrices_of(layer), outputs.reshape(1, -1, 3))


def responses_by_channel(layer, shape):
    outputs = one_hot_response(layer, shape).reshape(-1, shape[-1], shape[-1], 2)
    return diagonal_blocks(outputs.transpose(0, 1, 3, 2))


@pytest.mark.parametrize("rank", [1, 2])
def test_depthwise_convolution_has_a_matrix_for_each_channel(rank):
    cls = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)[rank - 1]
    shape = (*(3,) * rank, 4)
    layer = build(cls((3,) * rank, depth_multiplier=2), (None, *shape))
    assert_close(matrices_of(layer), responses_by_channel(layer, shape))


@pytest.mark.parametrize("rank", [1, 2])
def test_separable_convolution_has_channel_matrices_and_a_pointwise_matrix(rank):
    cls = (layers.SeparableConv1D, layers.SeparableConv2D)[rank - 1]
    shape = (*(3,) * rank, 4)
    layer = build(cls(8, (3,) * rank, depth_multiplier=2), (None, *shape))
    pointwise = matrices_of(layer, "pointwise_kernel")
    layer.pointwise_kernel.assign(np.eye(8).reshape(layer.pointwise_kernel.shape))
    depthwise = responses_by_channel(layer, shape)
    assert_close(matrices_of(layer, "depthwise_kernel"), depthwise)
    layer = build(cls(3, (1,) * rank), (None, *(1,) * rank, 4))
    layer.depthwise_kernel.assign(np.ones(layer.depthwise_kernel.shape))
    outputs = one_hot_response(layer, (*(1,) * rank, 4)).reshape(1, 4, 3)
    assert_close(matrices_of(layer, "pointwise_kernel"), outputs)
    assert pointwise.shape == (1, 8, 8)


EINSUMS = {
    # Equation: the shapes of inputs and outputs, without the batch axis.
    "ab,bc->ac": ((3,), (4,)),
    "ab,cb->ac": ((3,), (4,)),
    "...x,xy->...y": ((3,), (4,)),
    "abc,cde->abde": ((1, 3), (1, 2, 5)),
    "abcd,cde->abe": ((1, 3, 2), (1, 5)),
    "abcd,ecd->abe": ((1, 3, 2), (1, 5)),
    "abc,dce->abde": ((1, 3), (1, 2, 5)),
}


def einsum_dense(equation, shape, output_shape):
    layer = layers.EinsumDense(equation, output_shape)
    return build(layer, (None, *shape))


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_dense_has_one_matrix_over_the_summed_axes(equation):
    shape, output_shape = EINSUMS[equation]
    layer = einsum_dense(equation, shape, output_shape)
    outputs = one_hot_response(layer, shape)
    assert_close(matrices_of(layer), outputs.reshape(1, len(outputs), -1))


@pytest.mark.parametrize("equation", ["abc,bcd->abd", "abc,cbd->abd", "abc,dbc->abd"])
def test_einsum_axes_in_inputs_and_outputs_are_batch_axes(equation):
    layer = einsum_dense(equation, (2, 3), (2, 4))
    outputs = one_hot_response(layer, (2, 3)).reshape(2, 3, 2, 4).transpose(1, 0, 3, 2)
    assert_close(matrices_of(layer), diagonal_blocks(outputs))


@pytest.mark.parametrize("equation", ["ab,b->ab", "abc,bc->abc"])
def test_the_kernel_of_an_einsum_without_a_sum_is_a_vector(equation):
    shape = (3,) if equation == "ab,b->ab" else (3, 2)
    layer = einsum_dense(equation, shape, shape)
    assert find(layer)[0]["kernel"][1].role == "vector"


ATTENTIONS = {
    "multi-head": lambda: layers.MultiHeadAttention(2, 3, value_dim=4),
    "grouped": lambda: layers.GroupQueryAttention(3, 4, 2),
}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_each_attention_projection_is_one_matrix_over_all_heads(attention):
    layer = ATTENTIONS[attention]()
    layer.build((None, 5, 6), (None, 5, 6))
    randomize(layer)
    for part in (layer._query_dense, layer._key_dense, layer._value_dense):
        outputs = one_hot_response(part, (1, 6)).reshape(1, 6, -1)
        assert_close(matrices_of(part), outputs)
    shape = layer._output_dense.kernel.shape[:2]
    outputs = one_hot_response(layer._output_dense, (1, *shape)).reshape(1, -1, 6)
    assert_close(matrices_of(layer._output_dense), outputs)
    roles = {v.path: a.role for v, a in find_all(layer)}
    biases = [role for path, role in roles.items() if path.endswith("bias")]
    assert len(roles) == 8
    assert biases == ["vector"] * 4


def find_all(layer):
    """Returns pairs of variables and axes. Asserts that no axes are guessed."""
    variables = layer.trainable_variables
    variable_axes, guessed = axes.find(variables, [v.path for v in variables], None)
    assert not guessed
    return list(zip(variables, variable_axes, strict=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def simple_rnn(inputs, recurrent, x, states):
    (h,) = states
    return np.tanh(x @ inputs[0] + h @ recurrent[0])


def lstm(inputs, recurrent, x, states):
    h, c = states
    i, f, candidate, o = (x @ inputs[n] + h @ recurrent[n] for n in range(4))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(candidate)
    return sigmoid(o) * np.tanh(c)


def gru(inputs, recurrent, x, states):
    (h,) = states
    from_x, from_h = (
        [a @ k[n] for n in range(3)] for a, k in ((x, inputs), (h, recurrent))
    )
    update, reset = sigmoid(from_x[0] + from_h[0]), sigmoid(from_x[1] + from_h[1])
    return update * h + (1 - update) * np.tanh(from_x[2] + reset * from_h[2])


CELLS = {
    "SimpleRNNCell": (simple_rnn, 1, 1),
    "LSTMCell": (lstm, 4, 2),
    "GRUCell": (gru, 3, 1),
}


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_cell_has_a_matrix_for_each_gate(name):
    function, gates, states = CELLS[name]
    cell = build(getattr(layers, name)(4), (None, 3))
    inputs, recurrent = matrices_of(cell), matrices_of(cell, "recurrent_kernel")
    assert (len(inputs), len(recurrent)) == (gates, gates)
    x, *states = (RNG.normal(size=(2, n)) for n in (3, *(4,) * states))
    output, _ = cell(
        ops.convert_to_tensor(x, "float32"),
        [ops.convert_to_tensor(s, "float32") for s in states],
    )
    assert_close(to_numpy(output), function(inputs, recurrent, x, states))
    assert find(cell)[0]["bias"][1].role == "vector"


def test_convolutional_lstm_has_a_matrix_for_each_gate():
    layer = build(layers.ConvLSTM2D(4, (2, 3), return_state=True), (None, 2, 2, 3, 2))
    x = RNG.normal(size=(5, 2, 2, 3, 2)).astype("float32")
    outputs = [to_numpy(o) for o in layer(ops.convert_to_tensor(x[:, :1]))[1:]]
    inputs = matrices_of(layer)
    first = lstm(inputs, np.zeros((4, 4, 4)), x[:, 0].reshape(5, -1), [np.zeros(4)] * 2)
    assert_close(outputs[0].reshape(5, 4), first)
    # The state has one position, so it meets one position of the recurrent kernel.
    recurrent = matrices_of(layer, "recurrent_kernel").reshape(4, 2, 3, 4, 4)
    states = [o.reshape(5, 4) for o in outputs]
    second = to_numpy(layer(ops.convert_to_tensor(x))[0]).reshape(5, 4)
    expected = [
        lstm(inputs, recurrent[:, i, j], x[:, 1].reshape(5, -1), states)
        for i in range(2)
        for j in range(3)
    ]
    assert sum(np.allclose(second, e, rtol=1e-4, atol=1e-5) for e in expected) == 1


WRAPPED = {
    "Bidirectional": lambda: layers.Bidirectional(layers.LSTM(4)),
    "RNN": lambda: layers.RNN(layers.LSTMCell(4)),
    "StackedRNNCells": lambda: layers.RNN([layers.LSTMCell(4), layers.LSTMCell(4)]),
    "TimeDistributed": lambda: layers.TimeDistributed(layers.Conv1D(4, 2, groups=2)),
    "SpectralNormalization": lambda: layers.SpectralNormalization(
        layers.Conv2D(4, 3, groups=2)
    ),
    "of an embedding": lambda: layers.SpectralNormalization(layers.Embedding(9, 4)),
}
SHAPES = {"TimeDistributed": (None, 3, 5, 2), "SpectralNormalization": (None, 5, 5, 2)}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_keep_the_axes_of_the_wrapped_layer(name):
    wrapper = WRAPPED[name]()
    wrapper.build(SHAPES.get(name, (None, 5, 4)))
    kernels = [(v, a) for v, a in find_all(wrapper) if v.name != "bias"]
    assert kernels
    for variable, kernel_axes in kernels:
        if name == "of an embedding":
            assert kernel_axes.role == "embedding"
            continue
        parts = 2 if name in SHAPES else 4
        assert kernel_axes.role == "kernel"
        rank = len(variable.shape)
        assert kernel_axes == axes.Axes(
            "kernel", tuple(range(rank - 1)), (rank - 1,), parts
        )


def test_an_embedding_layer_has_the_axes_of_a_table():
    layer = build(layers.Embedding(5, 3), (None, 2))
    table, kernel_axes = find(layer)[0]["embeddings"]
    assert (kernel_axes.role, kernel_axes.inputs, kernel_axes.outputs) == (
        "embedding",
        (0,),
        (1,),
    )
    rows = to_numpy(layer(ops.arange(5)))
    assert_close(to_numpy(kernel_axes.to_matrices(table.value[None])), rows[None])


def test_an_untied_reversible_embedding_has_a_table_and_a_matrix():
    layer = build(layers.ReversibleEmbedding(5, 3), (None, 2))
    assert [(v.name, a.role) for v, a in find_all(layer)] == [
        ("embeddings", "embedding")
    ]
    layer = build(layers.ReversibleEmbedding(5, 3, tie_weights=False), (None, 2))
    by_name, _ = find(layer)
    assert by_name["embeddings"][1].role == "embedding"
    outputs = to_numpy(layer(ops.eye(3), reverse=True))
    assert_close(matrices_of(layer, "reverse_embeddings"), outputs[None])


@pytest.mark.parametrize("own_first", [True, False])
def test_a_table_shared_with_a_custom_layer_is_an_embedding(own_first):
    class Head(keras.Layer):
        def __init__(self):
            super().__init__()
            self.table = None

    head = Head() if own_first else None
    embedding = build(layers.Embedding(5, 3), (None, 2))
    head = head or Head()
    head.table = embedding.embeddings
    assert [a.role for _, a in find_all(head)] == ["embedding"]


# LoRA adds the product of two matrices to a kernel.


def lora_change(layer, shape):
    """Returns the change of the outputs by LoRA, and its two matrices."""
    before = one_hot_response(layer, shape)
    layer.enable_lora(2)
    randomize_lora(layer)
    pair = [matrices_of(layer, f"lora_kernel_{side}") for side in "ab"]
    return one_hot_response(layer, shape) - before, *[matrices[0] for matrices in pair]


def randomize_lora(layer):
    for variable in layer.trainable_variables:
        if "lora" in variable.name:
            variable.assign(RNG.normal(size=variable.shape))


@pytest.mark.parametrize(
    ("cls", "shape"), [("Dense", (4,)), ("Conv1D", (2, 3)), ("Conv2D", (2, 3, 4))]
)
def test_the_product_of_the_lora_matrices_changes_the_outputs(cls, shape):
    sizes = (shape[:-1],) if len(shape) > 1 else ()
    layer = build(getattr(layers, cls)(5, *sizes), (None, *shape))
    change, a, b = lora_change(layer, shape)
    assert_close(change.reshape(-1, 5), a @ b)


def test_lora_matrices_multiply_if_an_einsum_kernel_ends_with_an_output_axis():
    layer = einsum_dense("abcd,cde->abe", (1, 3, 2), (1, 5))
    change, a, b = lora_change(layer, (1, 3, 2))
    assert_close(change.reshape(6, 5), a @ b)
    layer = einsum_dense("abc,cde->abde", (1, 3), (1, 2, 5))
    change, a, b = lora_change(layer, (1, 3))
    assert_close(change.reshape(3, 2, 5), a.reshape(3, 2, 2) @ b)


def test_lora_matrices_multiply_if_an_einsum_kernel_ends_with_an_input_axis():
    # The second matrix comes first: it maps the inputs to the low rank.
    layer = einsum_dense("ab,cb->ac", (3,), (4,))
    change, a, b = lora_change(layer, (3,))
    assert_close(change, b @ a)
    layer = einsum_dense("abcd,ecd->abe", (1, 3, 2), (1, 5))
    change, a, b = lora_change(layer, (1, 3, 2))
    inside = np.einsum("dr,cre->cde", b, a.reshape(3, 2, 5))
    assert_close(change.reshape(3, 2, 5), inside)


def test_lora_of_an_embedding_is_a_table_and_a_matrix():
    layer = build(layers.Embedding(5, 3), (None, 2))
    before = to_numpy(layer(ops.arange(5)))
    layer.enable_lora(2)
    randomize_lora(layer)
    table, kernel_axes = find(layer)[0]["lora_embeddings_a"]
    assert kernel_axes.role == "embedding"
    product = to_numpy(table) @ matrices_of(layer, "lora_embeddings_b")[0]
    assert_close(to_numpy(layer(ops.arange(5))) - before, product)


QUANTIZED = {"Dense": lambda: layers.Dense(4), "EinsumDense": einsum_dense_qkv}


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantization_keeps_the_axes_of_lora(name):
    layer = QUANTIZED[name]()
    layer.build((None, 1, 8))
    before = {v.name: a for v, a in find_all(layer)}
    layer.enable_lora(2)
    pair = {v.name: a for v, a in find_all(layer) if "lora" in v.name}
    layer.quantize("int8")
    after = {v.name: a for v, a in find_all(layer)}
    del before["kernel"]
    assert after == before | pair
    assert len(pair) == 2


@pytest.mark.parametrize("name", QUANTIZED)
def test_float8_scales_are_vectors(name):
    layer = QUANTIZED[name]()
    layer.build((None, 1, 8))
    before = {v.path: a for v, a in find_all(layer)}
    layer.quantize("float8")
    after = {v.path: a for v, a in find_all(layer)}
    added = {a.role for path, a in after.items() if path not in before}
    assert added == {"vector"}
    assert before.items() <= after.items()


VECTORS = {
    "GRU's bias": lambda: layers.GRU(3),
    "PReLU": layers.PReLU,
    "LayerNormalization": lambda: layers.LayerNormalization(axis=(1, 2)),
    "BatchNormalization": layers.BatchNormalization,
    "GroupNormalization": lambda: layers.GroupNormalization(2),
    "RMSNormalization": layers.RMSNormalization,
}


@pytest.mark.parametrize("name", VECTORS)
def test_biases_and_gains_of_any_rank_are_vectors(name):
    layer = VECTORS[name]()
    layer.build((None, 3, 4))
    vectors = [a for v, a in find_all(layer) if "kernel" not in v.name]
    assert vectors
    assert {a.role for a in vectors} == {"vector"}


# PyTorch modules. Most of them store the output axis of a kernel first.

on_torch = pytest.mark.skipif(BACKEND != "torch", reason="needs PyTorch")


def wrap(module):
    """Returns a wrapper of a module, and its axes and matrices by parameter name."""
    wrapper = layers.TorchModuleWrapper(module)
    names = [name for name, _ in module.named_parameters()]
    by_name = dict(zip(names, find_all(wrapper), strict=True))
    matrices = {
        name: to_numpy(a.to_matrices(v.value[None]))
        for name, (v, a) in by_name.items()
        if a.role != "vector"
    }
    return wrapper, {name: a for name, (_, a) in by_name.items()}, matrices


@on_torch
def test_torch_linear_multiplies_by_one_matrix():
    from torch import nn

    wrapper, by_name, matrices = wrap(nn.Sequential(nn.Linear(4, 3, bias=False)))
    assert_close(matrices["0.weight"], one_hot_response(wrapper, (4,))[None])
    _, by_name, _ = wrap(nn.LayerNorm((3, 4)))
    assert {a.role for a in by_name.values()} == {"vector"}


@on_torch
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_torch_convolution_has_a_matrix_for_each_group(groups):
    from torch import nn

    module = nn.Conv2d(4, 8, (2, 3), groups=groups, bias=False)
    wrapper, _, matrices = wrap(module)
    outputs = one_hot_response(wrapper, (4, 2, 3))
    outputs = outputs.reshape(groups, 4 // groups * 6, groups, -1)
    outputs = outputs.transpose(1, 0, 3, 2)
    assert_close(matrices["weight"], diagonal_blocks(outputs))


@on_torch
@pytest.mark.parametrize("groups", [1, 4])
def test_torch_transposed_convolution_has_one_matrix_or_one_per_channel(groups):
    from torch import nn

    module = nn.ConvTranspose1d(4, 8, 2, groups=groups, bias=False)
    wrapper, _, matrices = wrap(module)
    outputs = one_hot_response(wrapper, (4, 2))[:, :, 1].reshape(
        groups, -1, 2, groups, 8 // groups
    )
    outputs = np.flip(outputs, 2).reshape(groups, -1, groups, 8 // groups)
    assert_close(matrices["weight"], diagonal_blocks(outputs.transpose(1, 0, 3, 2)))


@on_torch
def test_axes_of_torch_transposed_convolution_with_larger_groups_are_guessed():
    from torch import nn

    wrapper = layers.TorchModuleWrapper(nn.ConvTranspose1d(4, 8, 2, groups=2))
    _, guessed = find(wrapper)
    assert len(guessed) == 1


@on_torch
def test_torch_lstm_has_a_matrix_for_each_gate():
    from torch import nn

    wrapper, by_name, matrices = wrap(nn.LSTM(3, 4, bias=False))
    x = RNG.normal(size=(2, 5, 3)).astype("float32")
    outputs, (_, cells) = wrapper(ops.convert_to_tensor(x[:1]))
    kernels = matrices["weight_ih_l0"], matrices["weight_hh_l0"]
    states = [to_numpy(outputs[0]), to_numpy(cells[0])]
    outputs, _ = wrapper(ops.convert_to_tensor(x))
    assert_close(to_numpy(outputs[1]), lstm(*kernels, x[1], states))
    _, by_name, matrices = wrap(nn.LSTM(3, 4, proj_size=2))
    assert matrices["weight_hr_l0"].shape == (1, 4, 2)
    assert by_name["bias_hh_l0"].role == "vector"


@on_torch
def test_torch_attention_has_three_matrices_in_one_parameter():
    from torch import nn

    wrapper, _, matrices = wrap(nn.MultiheadAttention(4, 2))
    x = ops.convert_to_tensor(np.eye(4, dtype="float32")[None])
    outputs, _ = wrapper(x, x, x)  # A single key has an attention weight of 1.
    expected = matrices["in_proj_weight"][2] @ matrices["out_proj.weight"][0]
    assert_close(to_numpy(outputs[0]), expected)
    assert matrices["in_proj_weight"].shape == (3, 4, 4)


@on_torch
@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_torch_table_is_an_embedding(head_first):
    from torch import nn

    table, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = table.weight
    module = nn.ModuleList([head, table] if head_first else [table, head])
    _, by_name, _ = wrap(module)
    assert [a.role for a in by_name.values()] == ["embedding"]


@on_torch
def test_torch_parametrizations_keep_the_axes_of_the_weight():
    from torch import nn

    normal = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, bias=False))
    _, by_name, _ = wrap(normal)
    assert [str(a) for a in by_name.values()] == ["vector", "(1 | 0)"]
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 3, 2, bias=False))
    _, by_name, _ = wrap(spectral)
    assert [str(a) for a in by_name.values()] == ["(1, 2 | 0)"]


@on_torch
def test_names_decide_the_axes_in_unknown_torch_modules():
    import torch
    from torch import nn

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
            self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
            self.gate_bias = nn.Parameter(torch.zeros(2, 4))

    class Wrapper(layers.TorchModuleWrapper):
        pass

    wrapper = Wrapper(Patches())
    roles = [a.role for _, a in find_all(wrapper)]
    assert roles == ["embedding", "vector", "vector"]


# The conversion to matrices and back is exact.


@st.composite
def arrangements(draw):
    """Draws the axes of a kernel, and its shape."""
    rank = draw(st.integers(1, 5))
    shape = [draw(st.integers(1, 4)) for _ in range(rank)]
    # The letters mean input, output and batch axes. Output axes are twice as likely.
    sides = [draw(st.sampled_from("ioob")) for _ in range(rank)]
    order = draw(st.permutations(range(rank)))
    inputs = tuple(i for i in order if sides[i] == "i")
    outputs = tuple(i for i in order if sides[i] == "o")
    size = math.prod(shape[i] for i in outputs)
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    return axes.Axes("kernel", inputs, outputs, draw(st.sampled_from(divisors))), shape


@hypothesis.given(arrangements(), st.integers(1, 3))
def test_matrices_give_the_same_products_as_the_kernel(arrangement, n):
    kernel_axes, shape = arrangement
    kernels = RNG.integers(-4, 5, size=(n, *shape)).astype("float32")
    matrices = kernel_axes.to_matrices(ops.convert_to_tensor(kernels))
    restored = kernel_axes.from_matrices(matrices, n, shape)
    np.testing.assert_array_equal(ops.convert_to_numpy(restored), kernels)
    batch = [
        i
        for i in range(len(shape))
        if i not in kernel_axes.inputs + kernel_axes.outputs
    ]
    letters = [
        ["abcde"[i] for i in side]
        for side in (batch, kernel_axes.inputs, kernel_axes.outputs)
    ]
    batch_letters, input_letters, output_letters = ("".join(side) for side in letters)
    sizes = [
        [shape[i] for i in s] for s in (batch, kernel_axes.inputs, kernel_axes.outputs)
    ]
    inputs = RNG.integers(-4, 5, size=(n, *sizes[0], *sizes[1]))
    kernel_letters = "abcde"[: len(shape)]
    inputs_and_kernel = f"n{batch_letters}{input_letters},n{kernel_letters}"
    equation = f"{inputs_and_kernel}->n{batch_letters}{output_letters}"
    expected = np.einsum(equation, inputs, kernels)
    rows = inputs.reshape(-1, 1, 1, math.prod(sizes[1]))
    matrices = to_numpy(matrices).reshape(
        len(rows), kernel_axes.parts, rows.shape[-1], -1
    )
    np.testing.assert_array_equal((rows @ matrices).reshape(expected.shape), expected)


@hypothesis.given(arrangements())
def test_one_value_per_unit_is_broadcast_over_the_input_axes(arrangement):
    kernel_axes, shape = arrangement
    kernel = RNG.integers(-4, 5, size=shape).astype("float32")
    units = kernel_axes.to_units(ops.convert_to_tensor(kernel))
    assert tuple(units.shape) == tuple(kernel_axes.units_shape(shape))
    restored = kernel_axes.from_units(units, shape)
    np.testing.assert_array_equal(ops.convert_to_numpy(restored), kernel)
    if len(shape) > 1:
        sums = np.sum(ops.convert_to_numpy(units), axis=tuple(range(units.ndim - 1)))
        broadcast = kernel_axes.broadcast(ops.convert_to_tensor(sums), shape)
        expected = np.sum(kernel, axis=kernel_axes.inputs, keepdims=True)
        full = np.broadcast_to(ops.convert_to_numpy(broadcast), shape)
        np.testing.assert_array_equal(full, np.broadcast_to(expected, shape))
