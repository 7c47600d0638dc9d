"""The model and the cases that scripts train on one or several devices."""

import keras
import numpy as np

import keras_normopt

BATCH, EPOCHS, STEPS = 16, 2, 4
OPTIMIZERS = {
    "SGD": {"learning_rate": 0.05, "momentum": 0.9},
    "Adam": {"learning_rate": 0.01},
    "RMSprop": {"learning_rate": 0.01},
}
OPTIONS = {
    "plain": {},
    "layer": {"scope": "layer", "exclude": "outputs/bias"},
    "global": {"scope": "global", "track_norms": True},
    "correlation": {"step_size": "gradient_correlation"},
    "update": {"scope": "layer", "step_size": "weight_norm", "apply_to": "update"},
    "running": {
        "scope": "unit",
        "max_norm": keras_normopt.RunningNorm(warmup=2),
        "apply_to": "update",
        "centralize": True,
        "track_norms": True,
    },
    "direction": {
        "direction": {"kernel": "orthogonal", "bias": "rows"},
        "apply_to": "update",
    },
}
# Bases receive only normalized gradients, so one norm for each base is enough.
CASES = [("SGD", "l2", "plain"), ("RMSprop", "max", "global")]
CASES += [
    ("Adam", "std", o) for o in OPTIONS if o not in ("plain", "global", "direction")
]
CASES += [("SGD", "none", "direction")]  # A direction replaces the norm.

_rng = np.random.default_rng(0)
X = _rng.normal(size=(STEPS * BATCH, 12)).astype("float32")
Y = np.sin(X @ _rng.normal(size=(12, 4))).astype("float32")


def make_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(8, "tanh", name="hidden"),
            keras.layers.Dense(4, name="outputs"),
        ]
    )


def make_optimizer(base, norm, option="plain"):
    kind = "Clipped" if "max_norm" in OPTIONS[option] else "Normalized"
    cls = getattr(keras_normopt, f"{kind}{base}")
    norm = None if norm == "none" else norm
    return cls(norm=norm, **OPTIMIZERS[base], **OPTIONS[option])


def fit(case, epochs=EPOCHS, callbacks=(), **compile_arguments):
    model = make_model()
    model.compile(make_optimizer(*case), "mse", **compile_arguments)
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **arguments)
    return model


def state(model):
    variables = [*model.weights, *model.optimizer.variables]
    return [keras.ops.convert_to_numpy(v) for v in variables]


def outcome(model, optimizer):
    """Returns the weights and norms that must be equal on all devices."""
    norms = optimizer.gradient_norms if optimizer.track_norms else {}
    return [*model.get_weights(), np.array(list(norms.values()))]


def batches():
    """Yields the batches of all epochs, in the order of `fit`."""
    for _ in range(EPOCHS):
        for start in range(0, len(X), BATCH):
            yield X[start : start + BATCH], Y[start : start + BATCH]


def save(path, outcomes):
    """Writes the arrays of all outcomes under their case and position."""
    np.savez(
        path,
        **{
            f"{'-'.join(case)}-{i}": array
            for case, arrays in outcomes.items()
            for i, array in enumerate(arrays)
        },
    )
