"""Tests the axes of variables in KerasHub and KerasRS."""

import keras
import numpy as np
import pytest

import keras_normopt
from keras_normopt._blocks import axes

pytestmark = [pytest.mark.once, pytest.mark.nightly]

SIZES = {"vocabulary_size": 50, "num_layers": 1, "hidden_dim": 8}
SIZES |= {"intermediate_dim": 16}
GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 3, "top_k": 2}

#: Each class has arguments, and the expected axes of some variables. The key of a
#: variable is the end of its path.
BACKBONES = {
    "BertBackbone": (
        SIZES | {"num_heads": 2, "max_sequence_length": 6},
        {
            "query/kernel": "(0 | 1, 2)",
            "attention_output/kernel": "(0, 1 | 2)",
            "token_embedding/embeddings": "embedding",
            "position_embedding/embeddings": "embedding",
        },
    ),
    "GemmaBackbone": (
        SIZES | GROUPED | {"head_dim": 4},
        {
            "query/kernel": "(1 | 0, 2)",
            "key/kernel": "(1 | 0, 2)",
            "attention_output/kernel": "(0, 1 | 2)",
            "token_embedding/embeddings": "embedding",
        },
    ),
    "T5Backbone": (
        SIZES | {"num_heads": 2},
        {"self_attention/embeddings": "embedding", "query_projector/kernel": "(0 | 1)"},
    ),
    "XLNetBackbone": (
        SIZES | {"num_heads": 2},
        {
            "attention_output/kernel": "(1, 2 | 0)",
            "content_attention_bias": "vector",
            "mask_emb": "vector",
        },
    ),
    "MixtralBackbone": (
        SIZES | GROUPED | EXPERTS,
        {
            "expert_feedforward_gate_dense": "(1 | 2)",
            "expert_feedforward_output_dense": "(1 | 2)",
        },
    ),
    "GptOssBackbone": (
        SIZES | GROUPED | EXPERTS,
        {
            "experts/gate_up_proj": "(1 | 2)",
            "experts/down_proj": "(1 | 2)",
            "experts/down_proj_bias": "vector",
        },
    ),
    "ViTBackbone": (
        {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 16}
        | {"patch_size": 4, "image_shape": (8, 8, 3)},
        {"patch_embedding/kernel": "(0, 1, 2 | 3)", "class_token": "vector"},
    ),
    "ViTDetBackbone": (
        {"image_shape": (32, 32, 3), "patch_size": 8, "num_layers": 1}
        | {"hidden_size": 8, "intermediate_dim": 16, "num_heads": 2}
        | {"global_attention_layer_indices": [0], "window_size": 2},
        {"pos_embed": "embedding", "rel_pos_h": "embedding"},
    ),
    "XceptionBackbone": (
        {"stackwise_conv_filters": [[4, 8], [8, 8]], "image_shape": (64, 64, 3)}
        | {"stackwise_pooling": [True, False]},
        {
            "depthwise_kernel": "(0, 1 | 3)",
            "pointwise_kernel": "(0, 1, 2 | 3)",
        },
    ),
}


def find(layer):
    """Returns the axes by path, and the paths of variables with guessed axes."""
    variables = list({id(v): v for v in layer.trainable_variables}.values())
    paths = [v.path for v in variables]
    variable_axes, guessed = axes.find(variables, paths, None)
    texts = ["embedding" if a.role == "embedding" else str(a) for a in variable_axes]
    return dict(zip(paths, texts, strict=True)), [paths[i] for i in guessed]


@pytest.mark.parametrize("name", BACKBONES)
def test_axes_of_keras_hub_backbones_are_known(name):
    models = pytest.importorskip("keras_hub").models
    arguments, expected = BACKBONES[name]
    backbone = getattr(models, name)(**arguments)
    by_path, guessed = find(backbone)
    assert guessed == []
    for end, text in expected.items():
        assert {t for path, t in by_path.items() if path.endswith(end)} == {text}, end
    # Every bias and gain is a vector. No kernel is a vector.
    for path, text in by_path.items():
        if path.endswith(("/bias", "/gamma", "/beta", "/scale")):
            assert text == "vector", path
        elif path.endswith("/kernel"):
            assert text.startswith("("), path
    optimizer = keras_normopt.NormalizedSGD(scope="unit")
    optimizer.build(backbone.trainable_variables)


def test_axes_of_the_kernel_of_a_masked_language_model_head_are_guessed():
    keras_hub = pytest.importorskip("keras_hub")
    head = keras_hub.layers.MaskedLMHead(vocabulary_size=50)
    head(np.ones((1, 6, 8)), mask_positions=np.ones((1, 2), "int32"))
    by_path, guessed = find(head)
    assert [path.rpartition("/")[2] for path in guessed] == ["output_kernel"]
    assert by_path[guessed[0]] == "(0 | 1)"


def test_axes_of_keras_rs_layers_are_known():
    rs = pytest.importorskip("keras_rs").layers
    ones = keras.ops.ones((2, 4))
    cross = rs.FeatureCross(projection_dim=3)
    cross(ones, ones)
    cross_axes, cross_guessed = find(cross)
    assert sorted(cross_axes.values()) == ["(0 | 1)", "(0 | 1)", "vector"]
    reduce = rs.EmbedReduce(50, 4)
    reduce(keras.ops.ones((2, 4), "int32"))
    reduce_axes, reduce_guessed = find(reduce)
    assert list(reduce_axes.values()) == ["embedding"]
    assert cross_guessed + reduce_guessed == []
