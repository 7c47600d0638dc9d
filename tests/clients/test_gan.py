"""Tests a model that calls two optimizers in its own train step."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from keras_normopt._optimizer.model_optimizers import named_trackers
from keras_normopt.callbacks import GradientNorms

pytestmark = pytest.mark.newest_keras

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
REAL = RNG.normal(2, 1, size=(12, 2)).astype("float32")
NOISE = RNG.normal(size=(12, 3)).astype("float32")


def length(gradients):
    return ops.sqrt(sum(ops.sum(ops.square(g)) for g in gradients))


def cross_entropy(logits, target):
    return ops.mean(ops.softplus(logits) - target * logits)


class Gan(keras.Model):
    """The discriminator makes two steps for each step of the generator."""

    def __init__(self, d_opt, g_opt):
        super().__init__()
        self.generator = keras.layers.Dense(2, name="generator")
        hidden, head = keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)
        self.discriminator = keras.Sequential([hidden, head], name="discriminator")
        self.discriminator(self.generator(NOISE))
        self.d_opt, self.g_opt = d_opt, g_opt
        self.d_opt.build(self.discriminator.trainable_variables)
        self.g_opt.build(self.generator.trainable_variables)
        self.built = True

    def compile(self, optimizer):
        super().compile(optimizer=optimizer)
        if BACKEND == "jax":
            # A step gets only the variables of the model and of its optimizer.
            other_optimizers = [
                o for o in (self.d_opt, self.g_opt) if o is not optimizer
            ]
            self.slots = [v for o in other_optimizers for v in o.variables]

    def d_loss(self, generator, discriminator, real, noise):
        return cross_entropy(discriminator(real), 1.0) + cross_entropy(
            discriminator(generator(noise)), 0.0
        )

    def g_loss(self, generator, discriminator, noise):
        return cross_entropy(discriminator(generator(noise)), 1.0)


if BACKEND == "jax":
    import jax

    def called(layer, variables):
        return lambda x: layer.stateless_call(variables, [], x)[0]

    def train_step(self, state, data):
        trainable, slots, optimizer_state, metric_state = state
        if self.optimizer is self.d_opt:
            slots, optimizer_state = [*optimizer_state, *slots], []
        real, noise = data[0]
        ends = len(self.generator.trainable_variables), len(self.d_opt.variables)
        g, d = trainable[: ends[0]], trainable[ends[0] :]
        d_state, g_state = slots[: ends[1]], slots[ends[1] :]

        def d_loss(d):
            networks = called(self.generator, g), called(self.discriminator, d)
            return self.d_loss(*networks, real, noise)

        def g_loss(g):
            networks = called(self.generator, g), called(self.discriminator, d)
            return self.g_loss(*networks, noise)

        lengths = []
        for _ in range(2):
            gradients = jax.grad(d_loss)(d)
            lengths.append(length(gradients))
            d, d_state = self.d_opt.stateless_apply(d_state, gradients, d)
        gradients = jax.grad(g_loss)(g)
        g, g_state = self.g_opt.stateless_apply(g_state, gradients, g)
        logs = {"d": ops.stack(lengths), "g": length(gradients)}
        slots = [*d_state, *g_state]
        if self.optimizer is self.d_opt:
            optimizer_state, slots = d_state, g_state
        return logs, ([*g, *d], slots, optimizer_state, metric_state)

else:
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def gradients_of(loss, variables):
            with tf.GradientTape() as tape:
                value = loss()
            return tape.gradient(value, variables)

    else:
        import torch

        def gradients_of(loss, variables):
            return torch.autograd.grad(loss(), [v.value for v in variables])

    def train_step(self, data):
        real, noise = data[0]
        networks = self.generator, self.discriminator
        lengths = []
        for _ in range(2):
            variables = self.discriminator.trainable_variables
            gradients = gradients_of(
                lambda: self.d_loss(*networks, real, noise), variables
            )
            lengths.append(length(gradients))
            self.d_opt.apply(gradients, variables)
        variables = self.generator.trainable_variables
        gradients = gradients_of(lambda: self.g_loss(*networks, noise), variables)
        self.g_opt.apply(gradients, variables)
        return {"d": ops.stack(lengths), "g": length(gradients)}


Gan.train_step = train_step


def fit(model, frequency, epochs=2, optimizer="rmsprop"):
    """Trains. Returns the history, the gradient norms and the logs of all batches."""
    seen, batches = {"d": [], "g": []}, []

    def record(batch, logs):
        for name, values in seen.items():
            values.append(ops.convert_to_numpy(logs.pop(name)))
        batches.append(logs)

    model.compile(optimizer)
    spy = keras.callbacks.LambdaCallback(on_train_batch_end=record)
    history = model.fit(
        (REAL, NOISE),
        batch_size=4,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[GradientNorms(frequency), spy],
    ).history
    seen = {k: np.reshape(v, (epochs, -1)) for k, v in seen.items()}
    return history, seen, batches


def make(cls=keras_normopt.NormalizedSGD, **arguments):
    return cls(0.01, **({"track_norms": True} | arguments))


# RMSprop is the default of `compile`. On JAX, Keras needs an optimizer to train.
CASES = [("rmsprop", "epoch"), ("d_opt", 1)]
if BACKEND != "jax":
    CASES.append((None, "epoch"))


@pytest.mark.parametrize(("optimizer", "frequency"), CASES)
def test_the_logs_hold_the_norms_of_both_optimizers(optimizer, frequency):
    model = Gan(make(keras_normopt.ClippedSGD, max_norm=0.3), make())
    before = model.discriminator.get_weights()
    optimizer = getattr(model, optimizer) if optimizer == "d_opt" else optimizer
    history, seen, batches = fit(model, frequency, optimizer=optimizer)
    for name, steps in (("d", 2), ("g", 1)):
        key, largest = f"grad_norm/{name}_opt/total", f"grad_norm_max/{name}_opt/total"
        lengths = seen[name]
        np.testing.assert_allclose(history[key], lengths.mean(axis=1), rtol=1e-5)
        np.testing.assert_allclose(history[largest], lengths.max(axis=1), rtol=1e-5)
        if frequency == 1:
            batch_means = lengths.reshape(-1, steps).mean(axis=1)
            actual = [logs[key] for logs in batches]
            np.testing.assert_allclose(actual, batch_means, rtol=1e-5)
    assert "grad_norm/g_opt/generator/kernel" in history
    paths = [v.path for v in model.discriminator.trainable_variables]
    assert {f"clipped/d_opt/{path}" for path in paths} == {
        key for key in history if key.startswith("clipped/")
    }
    after = model.discriminator.get_weights()
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def names_in_logs(model):
    return [name for _, names in named_trackers(model) for name in names.values()]


def test_names_have_no_prefix_if_only_one_optimizer_tracks_norms():
    model = Gan(make(track_norms=False), make())
    assert names_in_logs(model) == ["generator/kernel", "generator/bias", "total"]


def test_optimizers_in_lists_and_dictionaries_are_logged():
    model, variables = keras.Model(), [keras.Variable(1.0, name="w")]
    inner = [make(scope="global") for _ in range(3)]
    model.all = [keras.optimizers.SGD(), inner[0]]
    model.by_name = {"z": inner[1], "a": keras.optimizers.LossScaleOptimizer(inner[2])}
    for optimizer in inner:
        optimizer.build(variables)
    names = ["all_1", "by_name_z", "by_name_a"]
    expected = [f"{name}/{block}" for name in names for block in ("global", "total")]
    assert names_in_logs(model) == expected


def test_an_optimizer_with_two_names_is_logged_once():
    model, inner = keras.Model(), make(scope="global")
    model.optimizer, model.mine = keras.optimizers.LossScaleOptimizer(inner), inner
    inner.build([keras.Variable(1.0, name="w")])
    assert names_in_logs(model) == ["global", "total"]


def test_an_error_names_the_optimizers_of_the_model():
    plain = keras.optimizers.SGD()
    scaled = keras.optimizers.LossScaleOptimizer(keras_normopt.NormalizedSGD())
    model = Gan(scaled, plain)
    with pytest.raises(ValueError, match="GradientNorms needs") as caught:
        fit(model, "epoch", optimizer=plain)
    message = str(caught.value)
    assert "model.d_opt = LossScaleOptimizer around NormalizedSGD" in message
    assert "model.g_opt = SGD" in message
    assert "model.optimizer" not in message  # `g_opt` is the same object.
