"""Which axes of the layers of KerasHub and KerasRS are matrices."""

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

#: Class, its arguments, and what is expected of variables by the end of their paths.
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
    """Returns a dict from paths to axes, and the paths of the guessed ones."""
    variables = list({id(v): v for v in layer.trainable_variables}.values())
    paths = [v.path for v in variables]
    found, guessed = axes.find(variables, paths, None)
    texts = ["embedding" if a.role == "embedding" else str(a) for a in found]
    return dict(zip(paths, texts, strict=True)), [paths[i] for i in guessed]


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_of_keras_hub(name):
    models = pytest.importorskip("keras_hub").models
    arguments, expected = BACKBONES[name]
    backbone = getattr(models, name)(**arguments)
    found, guessed = find(backbone)
    assert guessed == []
    for end, text in expected.items():
        assert {t for path, t in found.items() if path.endswith(end)} == {text}, end
    # Whatever is called a bias or a gain is a vector, and no dense kernel is one.
    for path, text in found.items():
        if path.endswith(("/bias", "/gamma", "/beta", "/scale")):
            assert text == "vector", path
        elif path.endswith("/kernel"):
            assert text.startswith("("), path
    optimizer = keras_normopt.NormalizedSGD(scope="unit")
    optimizer.build(backbone.trainable_variables)


def test_a_head_of_a_layer_of_its_own_is_guessed():
    keras_hub = pytest.importorskip("keras_hub")
    head = keras_hub.layers.MaskedLMHead(vocabulary_size=50)
    head(np.ones((1, 6, 8)), mask_positions=np.ones((1, 2), "int32"))
    found, guessed = find(head)
    assert [path.rpartition("/")[2] for path in guessed] == ["output_kernel"]
    assert found[guessed[0]] == "(0 | 1)"


def test_layers_of_keras_rs():
    rs = pytest.importorskip("keras_rs").layers
    ones = keras.ops.ones((2, 4))
    cross = rs.FeatureCross(projection_dim=3)
    cross(ones, ones)
    found, guessed = find(cross)
    assert sorted(found.values()) == ["(0 | 1)", "(0 | 1)", "vector"]
    reduce = rs.EmbedReduce(50, 4)
    reduce(keras.ops.ones((2, 4), "int32"))
    found_too, guessed_too = find(reduce)
    assert list(found_too.values()) == ["embedding"]
    assert guessed + guessed_too == []
