"""Measures how far the outputs of each layer move in the first training steps."""

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
import pandas as pd
from keras import tree

from keras_normopt._backend.tracing import concrete_value
from keras_normopt.experiments import comparing, runs

STEPS = (1, 10)


def coordinate_check(
    make_model: Callable[[Any], Any],
    x: Any,
    y: Any = None,
    *,
    sizes: Iterable[float],
    optimizers: Any,
    steps: Iterable[int] = STEPS,
    seed: int = 0,
    **fit_arguments: Any,
) -> pd.DataFrame:
    """Measures how far the outputs of each layer move in the first training steps.

    A learning rate that suits a small model suits a large one if the outputs of each
    layer move equally far in both. For each size and optimizer, `coordinate_check`
    trains a new model for some steps. It calls the model on one fixed batch before and
    after these steps. A layer's change is the root mean square of the difference
    between its outputs.

    Args:
        make_model: Function from a size to a new, compiled model, as for `transfer`.
        x, y: For `fit`. `x` also gives the batch that the model is called on.
        sizes: List of two or more numbers above 0, the sizes of the models.
        optimizers: As for `compare`. Each must have its own learning rate, such as
            `"adam:0.001"`.
        steps: List of positive integers, the numbers of steps after which to measure.
            Defaults to `(1, 10)`.
        seed: Integer, the seed of the weights and of the order of the data. Defaults to
            0.
        **fit_arguments: More arguments of `fit`, such as `batch_size`.

    Returns:
        DataFrame with a row for each optimizer, number of steps and layer, and a column
        for each size. The column `power` is p in "change ∝ size^p", fitted to the
        sizes: 0 if the change does not depend on the size. Only layers with weights
        count. Layers of equal names are numbered within each model. A size that lacks a
        layer has NaN there.

    Raises:
        ValueError: If an argument is not as above, or if a callback ends `fit` before
            the last of `steps`.

    Source: the coordinate check of μP, "Tensor Programs V" (arXiv 2203.03466).

    Example:
        >>> import keras
        >>> import numpy as np
        >>> from keras_normopt import experiments
        >>> x = np.random.default_rng(0).normal(size=(64, 3))
        >>> y = x.sum(axis=1)
        >>> def make_model(width):
        ...     hidden, output = keras.layers.Dense(width), keras.layers.Dense(1)
        ...     model = keras.Sequential([keras.Input((3,)), hidden, output])
        ...     model.compile(loss="mse")
        ...     return model
        >>> changes = experiments.coordinate_check(
        ...     make_model, x, y, sizes=(16, 64), optimizers=["adam:0.001"], steps=[1]
        ... )
        >>> list(changes.columns)
        [16, 64, 'power']
    """
    sizes = check_sizes(sizes)
    named = comparing.parse(optimizers)
    if without := [label for label, _, rate in named if rate is None]:
        raise ValueError(
            "`optimizers` must each have a learning rate, as 'adam:0.001' or the pair "
            f"('adam', 0.001). Received without one: {', '.join(without)}"
        )
    steps = sorted(set(steps))
    if not steps or not all(isinstance(n, int) and n > 0 for n in steps):
        raise ValueError(
            f"`steps` must be one or more positive integers. Received: steps={steps!r}"
        )
    makers = {size: functools.partial(make_model, size) for size in sizes}
    arguments = {"x": x, "y": y} | fit_arguments
    comparing.check_data(arguments)
    return measure(makers, arguments, named, steps, seed)


def check_sizes(sizes):
    """Returns the sizes from the smallest to the largest.

    Raises:
        ValueError: If they are not two or more numbers above 0.
    """
    found = list(sizes)
    if (
        not all(isinstance(n, int | float) and n > 0 for n in found)
        or len(set(found)) < 2
    ):
        raise ValueError(
            "`sizes` must be two or more different numbers above 0. "
            f"Received: sizes={found!r}"
        )
    return sorted(set(found))


def measure(makers, fit_arguments, optimizers, steps=STEPS, seed=0):
    """Returns the DataFrame of `coordinate_check`.

    Args:
        makers: Dictionary from each size to a function that makes a model.
        fit_arguments: Dictionary of arguments of `fit`.
        optimizers: List of triples: a label, an identifier and a rate.
        steps: Sorted list of positive integers.
        seed: Integer.
    """
    found: dict[Any, dict[float, float]] = {}
    for label, identifier, rate in optimizers:
        for size, make in makers.items():
            optimizer = runs.make_optimizer(identifier, rate)
            for step, changes in _changes(make, fit_arguments, optimizer, steps, seed):
                for layer, change in changes.items():
                    row = found.setdefault((f"{label} at {rate:g}", step, layer), {})
                    row[size] = change
    names = ["optimizer", "steps", "layer"]
    index = pd.MultiIndex.from_tuples(list(found), names=names)
    table = pd.DataFrame(list(found.values()), index, list(makers))
    return table.assign(power=[_power(row) for row in found.values()])


def _changes(make, fit_arguments, optimizer, steps, seed):
    """Trains one model. Yields pairs of a number of steps and `{layer: change}`."""
    keras.utils.set_random_seed(seed)
    model = runs.compiled(make())
    runs.replace_optimizer(model, optimizer)
    batch = _first_batch(fit_arguments["x"], fit_arguments.get("batch_size") or 32)
    model(batch, training=False)  # Builds the model if necessary.
    before = _outputs(model, batch)
    after: dict[int, Any] = {}

    def look(step):
        if step in steps:
            after[step] = _outputs(model, batch)

    data = {k: v for k, v in fit_arguments.items() if not k.startswith("validation")}
    ending = _Looking(look, max(steps))
    callbacks = [*tree.flatten(data.get("callbacks") or []), ending]
    # An epoch has at least one step, so this number of epochs is enough.
    settings = {"epochs": max(steps), "verbose": 0, "callbacks": callbacks}
    model.fit(**data | settings)
    if missing := [step for step in steps if step not in after]:
        raise ValueError(
            f"`fit` ended after {ending.step} steps. Leave out callbacks that end it, "
            f"or ask for fewer `steps`. Received: steps={missing!r}"
        )
    for step in steps:
        pairs = zip(before.items(), after[step].values(), strict=True)
        yield step, {name: _rms(new - old) for (name, old), new in pairs}


class _Looking(keras.callbacks.Callback):
    """Calls a function after each step, and ends `fit` after some steps."""

    def __init__(self, look, steps):
        super().__init__()
        self.look, self.steps, self.step = look, steps, 0

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if keras.backend.backend() == "jax":  # `fit` keeps the weights elsewhere.
            self.model.jax_state_sync()
        self.look(self.step)
        if self.step >= self.steps:
            self.model.stop_training = True


def _first_batch(x, size):
    """Returns the inputs of the first batch of any data that `fit` takes."""
    if isinstance(x, keras.utils.PyDataset):
        return x[0][0]
    leaves = tree.flatten(x)
    if all(hasattr(leaf, "shape") for leaf in leaves):
        return tree.map_structure(lambda array: array[:size], x)
    batch = next(iter(x))
    return batch[0] if isinstance(batch, tuple | list) else batch


def _outputs(model, batch):
    """Calls a model eagerly. Returns the outputs of each layer with weights."""
    recorded: dict[Any, list[Any]] = {}
    layers = _measured_layers(model)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            record = functools.partial(_call, layer.call, recorded, layer)
            object.__setattr__(layer, "call", record)
            stack.callback(object.__delattr__, layer, "call")
        model(batch, training=False)
    found: dict[str, Any] = {}
    for layer, values in recorded.items():
        found[_numbered(layer.name, found)] = np.concatenate(values)
    return found


def _measured_layers(model):
    """Returns the layers with weights of their own, not only of inner layers."""
    layers = [layer for layer in model._flatten_layers() if "call" not in vars(layer)]
    recurrent = [layer for layer in layers if isinstance(layer, keras.layers.RNN)]
    cells = [cell for rnn in recurrent for cell in rnn._flatten_layers(False)]
    found = list(recurrent)
    for layer in layers:
        inside = {id(w) for child in layer._layers for w in child.weights}
        has_weights = any(id(w) not in inside for w in layer.weights)
        if has_weights and not any(layer is other for other in (*cells, *recurrent)):
            found.append(layer)
    return found


def _call(call, recorded, layer, *args, **kwargs):
    outputs = call(*args, **kwargs)
    values = [concrete_value(leaf) for leaf in tree.flatten(outputs)]
    # Some layers call inner layers in a traced loop, where outputs have no values.
    if all(value is not None for value in values):
        flat = [np.ravel(value).astype("float64") for value in values]
        recorded.setdefault(layer, []).extend(flat)
    return outputs


def _numbered(name, taken):
    """Numbers equal names in one model. Keras counts in all models of a process."""
    base = name.rstrip("0123456789").rstrip("_")
    names = (f"{base}_{i}" if i else base for i in range(len(taken) + 1))
    return next(name for name in names if name not in taken)


def _rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


def _power(row):
    """Returns p of a fit of "value ∝ size^p", or NaN if there is no such fit."""
    values = np.array(list(row.values()))
    if len(row) < 2 or not np.isfinite(values).all() or not (values > 0).all():
        return np.nan
    return float(np.polyfit(np.log(list(row)), np.log(values), 1)[0])
