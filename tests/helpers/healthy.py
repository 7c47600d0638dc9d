"""Makes models that train well, from Keras's guides, `keras.applications` and KerasHub.

Each function returns a compiled model, inputs and targets. Weights are random. Inputs
have the shape and the range of the original data.
"""

import keras
import numpy as np
from keras import layers, ops

_rng = np.random.default_rng(0)
N = 64


def _pixels(*shape, high=1.0):
    return (high * _rng.uniform(size=(N, *shape))).astype("float32")


def _tokens(length, vocabulary):
    return _rng.integers(0, vocabulary, size=(N, length)).astype("int32")


def _labels(classes):
    return _rng.integers(0, classes, size=N)


def _sparse():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def dense():
    """A dense network on standardized columns."""
    x = _rng.normal(size=(N, 20)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(32, "relu"),
            layers.Dense(32, "relu"),
            layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    return model, x, x[:, :3].sum(axis=1)


def mnist_convnet():
    """keras.io/examples/vision/mnist_convnet."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    return model, _pixels(28, 28, 1), np.eye(10)[_labels(10)]


def imdb_bidirectional_lstm():
    """keras.io/examples/nlp/bidirectional_lstm_imdb, on shorter texts."""
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(2000, 128),
            layers.Bidirectional(layers.LSTM(64, return_sequences=True)),
            layers.Bidirectional(layers.LSTM(64)),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model, _tokens(40, 2000), _labels(2)


class _TokensAndPositions(layers.Layer):
    def __init__(self, length, vocabulary, width):
        super().__init__()
        self.tokens = layers.Embedding(vocabulary, width)
        self.positions = layers.Embedding(length, width)

    def call(self, x):
        return self.tokens(x) + self.positions(ops.arange(ops.shape(x)[-1]))


def text_transformer():
    """keras.io/examples/nlp/text_classification_with_transformer."""
    inputs = keras.Input((50,), dtype="int32")
    x = _TokensAndPositions(50, 2000, 32)(inputs)
    attention = layers.MultiHeadAttention(2, 32)(x, x)
    x = layers.LayerNormalization(epsilon=1e-6)(x + layers.Dropout(0.1)(attention))
    dense = layers.Dense(32)(layers.Dense(32, "relu")(x))
    x = layers.LayerNormalization(epsilon=1e-6)(x + layers.Dropout(0.1)(dense))
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dropout(0.1)(layers.Dense(20, "relu")(layers.Dropout(0.1)(x)))
    model = keras.Model(inputs, layers.Dense(2, activation="softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, _tokens(50, 2000), _labels(2)


def timeseries_transformer():
    """keras.io/examples/timeseries/timeseries_classification_transformer."""
    inputs = x = keras.Input((100, 1))
    for _ in range(4):
        attention = layers.MultiHeadAttention(4, 256, dropout=0.25)(x, x)
        attention = layers.LayerNormalization(epsilon=1e-6)(attention)
        residual = attention + x
        dense = layers.Conv1D(4, 1, activation="relu")(residual)
        dense = layers.Conv1D(1, 1)(layers.Dropout(0.25)(dense))
        x = layers.LayerNormalization(epsilon=1e-6)(dense) + residual
    x = layers.GlobalAveragePooling1D(data_format="channels_last")(x)
    x = layers.Dropout(0.4)(layers.Dense(128, "relu")(x))
    model = keras.Model(inputs, layers.Dense(2, activation="softmax")(x))
    optimizer = keras.optimizers.Adam(1e-4)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return model, _rng.normal(size=(N, 100, 1)).astype("float32"), _labels(2)


def timeseries_convnet():
    """keras.io/examples/timeseries/timeseries_classification_from_scratch."""
    inputs = x = keras.Input((200, 1))
    for _ in range(3):
        x = layers.BatchNormalization()(layers.Conv1D(64, 3, padding="same")(x))
        x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, layers.Dense(2, activation="softmax")(x))
    model.compile("adam", "sparse_categorical_crossentropy")
    return model, _rng.normal(size=(N, 200, 1)).astype("float32"), _labels(2)


def small_xception():
    """keras.io/examples/vision/image_classification_from_scratch, on smaller images."""
    inputs = keras.Input((64, 64, 3))
    x = layers.Rescaling(1.0 / 255)(inputs)
    x = layers.Conv2D(128, 3, strides=2, padding="same")(x)
    previous = x = layers.Activation("relu")(layers.BatchNormalization()(x))
    for size in (256, 512, 728):
        for _ in range(2):
            x = layers.Activation("relu")(x)
            x = layers.SeparableConv2D(size, 3, padding="same")(x)
            x = layers.BatchNormalization()(x)
        x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
        previous = x = x + layers.Conv2D(size, 1, strides=2, padding="same")(previous)
    x = layers.SeparableConv2D(1024, 3, padding="same")(x)
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    x = layers.Dropout(0.25)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, layers.Dense(1)(x))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-4), loss)
    return model, _pixels(64, 64, 3, high=255.0), _labels(2)


def transfer_learning():
    """keras.io/guides/transfer_learning: a frozen backbone, a new head."""
    backbone = keras.applications.Xception(
        weights=None, input_shape=(71, 71, 3), include_top=False
    )
    backbone.trainable = False
    inputs = keras.Input((71, 71, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = layers.GlobalAveragePooling2D()(backbone(x, training=False))
    model = keras.Model(inputs, layers.Dense(1)(layers.Dropout(0.2)(x)))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(), loss)
    return model, _pixels(71, 71, 3, high=255.0), _labels(2)


def structured_data():
    """keras.io/examples/structured_data/imbalanced_classification: 1 % of one class."""
    model = keras.Sequential(
        [
            keras.Input((30,)),
            layers.Dense(256, "relu"),
            layers.Dense(256, "relu"),
            layers.Dropout(0.3),
            layers.Dense(256, "relu"),
            layers.Dropout(0.3),
            layers.Dense(1, "sigmoid"),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy")
    y = np.zeros((2000, 1))
    y[::100] = 1
    return model, _rng.normal(size=(2000, 30)).astype("float32"), y


def autoencoder():
    """keras.io/examples/vision/autoencoder: its targets are its inputs."""
    inputs = keras.Input((28, 28, 1))
    x = inputs
    for _ in range(2):
        x = layers.Conv2D(32, 3, activation="relu", padding="same")(x)
        x = layers.MaxPooling2D(2, padding="same")(x)
    for _ in range(2):
        x = layers.Conv2DTranspose(32, 3, 2, activation="relu", padding="same")(x)
    x = layers.Conv2D(1, 3, activation="sigmoid", padding="same")(x)
    model = keras.Model(inputs, x)
    model.compile("adam", "binary_crossentropy")
    x = _pixels(28, 28, 1)
    return model, x, x


def addition_rnn():
    """keras.io/examples/nlp/addition_rnn: a sequence to a sequence."""
    model = keras.Sequential(
        [
            keras.Input((7, 12)),
            layers.LSTM(128),
            layers.RepeatVector(4),
            layers.LSTM(128, return_sequences=True),
            layers.Dense(12, activation="softmax"),
        ]
    )
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    y = np.eye(12)[_rng.integers(0, 12, size=(N, 4))]
    return model, np.eye(12)[_rng.integers(0, 12, size=(N, 7))].astype("float32"), y


def normalization_layer():
    """House prices: a layer scales large inputs, and the targets are scaled, too."""
    x = _rng.normal(1500, 400, size=(N, 5)).astype("float32")
    scale = layers.Normalization()
    scale.adapt(x)
    model = keras.Sequential(
        [keras.Input((5,)), scale, layers.Dense(32, "relu"), layers.Dense(1)]
    )
    model.compile("rmsprop", "mae")
    y = x.mean(axis=1)
    return model, x, (y - y.mean()) / y.std()


def wide_and_deep():
    """A network with two inputs, and two outputs with one loss each."""
    left, right = keras.Input((10,), name="left"), keras.Input((5,), name="right")
    x = layers.Dense(32, "relu")(layers.Dense(32, "relu")(left))
    x = layers.Concatenate()([x, right])
    outputs = {
        "price": layers.Dense(1, name="price")(x),
        "kind": layers.Dense(3, "softmax", name="kind")(x),
    }
    model = keras.Model({"left": left, "right": right}, outputs)
    loss = {"price": "mse", "kind": "sparse_categorical_crossentropy"}
    model.compile("adam", loss)
    x = {"left": _rng.normal(size=(N, 10)), "right": _rng.normal(size=(N, 5))}
    return model, x, {"price": _rng.normal(size=N), "kind": _labels(3)}


class _Sampling(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(0)

    def call(self, inputs):
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        kl = 1 + log_variance - ops.square(mean) - ops.exp(log_variance)
        self.add_loss(-0.5 * ops.mean(ops.sum(kl, axis=1)))
        return mean + ops.exp(0.5 * log_variance) * noise


def variational_autoencoder():
    """A variational autoencoder on digits, which adds its own loss."""
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(32, 3, activation="relu", strides=2, padding="same")(inputs)
    x = layers.Conv2D(64, 3, activation="relu", strides=2, padding="same")(x)
    x = layers.Dense(16, activation="relu")(layers.Flatten()(x))
    x = _Sampling()([layers.Dense(2)(x), layers.Dense(2)(x)])
    x = layers.Reshape((7, 7, 64))(layers.Dense(7 * 7 * 64, "relu")(x))
    x = layers.Conv2DTranspose(64, 3, 2, activation="relu", padding="same")(x)
    x = layers.Conv2DTranspose(32, 3, 2, activation="relu", padding="same")(x)
    x = layers.Conv2DTranspose(1, 3, activation="sigmoid", padding="same")(x)
    model = keras.Model(inputs, x)
    model.compile("adam", "binary_crossentropy")
    x = _pixels(28, 28, 1)
    return model, x, x


def _application(name, size, high, optimizer="adam"):
    def make():
        model = getattr(keras.applications, name)(
            weights=None,
            input_shape=(size, size, 3),
            classes=10,
            classifier_activation=None,
        )
        model.compile(optimizer, _sparse())
        x = _pixels(size, size, 3, high=high)
        return model, x if high > 1 else 2 * x - 1, _labels(10)

    make.__name__ = f"applications.{name}"
    return make


def _hub(function):
    def make():
        import keras_hub

        task, optimizer, x, y = function(keras_hub)
        # `fit` of a task needs packages for preprocessing, even without a preprocessor.
        model = keras.Model(task.input, task.output)
        model.compile(optimizer, _sparse())
        return model, x, y

    make.__name__ = f"keras_hub.{function.__name__}"
    return make


@_hub
def bert_classifier(hub):
    backbone = hub.models.BertBackbone(
        vocabulary_size=1000,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        intermediate_dim=512,
        max_sequence_length=64,
    )
    model = hub.models.BertTextClassifier(
        backbone=backbone, num_classes=4, preprocessor=None
    )
    x = {
        "token_ids": _tokens(64, 1000),
        "padding_mask": np.ones((N, 64), "bool"),
        "segment_ids": np.zeros((N, 64), "int32"),
    }
    return model, keras.optimizers.AdamW(5e-5), x, _labels(4)


@_hub
def gpt2(hub):
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=1000,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        intermediate_dim=512,
        max_sequence_length=64,
    )
    model = hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    tokens = _tokens(65, 1000)
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((N, 64), "bool")}
    return model, keras.optimizers.Adam(3e-4), x, tokens[:, 1:]


@_hub
def resnet(hub):
    backbone = hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[2, 2, 2, 2],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="basic_block",
        image_shape=(64, 64, 3),
    )
    model = hub.models.ResNetImageClassifier(
        backbone=backbone, num_classes=10, preprocessor=None
    )
    return model, "adam", _pixels(64, 64, 3), _labels(10)


@_hub
def vit(hub):
    backbone = hub.models.ViTBackbone(
        image_shape=(64, 64, 3),
        patch_size=8,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=512,
    )
    model = hub.models.ViTImageClassifier(
        backbone=backbone, num_classes=10, preprocessor=None
    )
    return model, keras.optimizers.AdamW(1e-4), _pixels(64, 64, 3), _labels(10)


@_hub
def gemma(hub):
    backbone = hub.models.GemmaBackbone(
        vocabulary_size=1000,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=128,
        intermediate_dim=512,
        head_dim=32,
    )
    model = hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    tokens = _tokens(33, 1000)
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones((N, 32), "bool")}
    return model, keras.optimizers.AdamW(3e-4), x, tokens[:, 1:]


QUICK = [dense, addition_rnn, normalization_layer, wide_and_deep]
NIGHTLY = [
    mnist_convnet,
    imdb_bidirectional_lstm,
    text_transformer,
    timeseries_transformer,
    timeseries_convnet,
    small_xception,
    transfer_learning,
    structured_data,
    autoencoder,
    variational_autoencoder,
    _application("MobileNetV2", 96, 1.0),
    _application("EfficientNetB0", 96, 255.0),
    _application("ResNet50V2", 64, 1.0, "sgd"),
    _application("DenseNet121", 64, 1.0),
    _application("ConvNeXtTiny", 64, 255.0),
]
HUB = [bert_classifier, gpt2, resnet, vit, gemma]
