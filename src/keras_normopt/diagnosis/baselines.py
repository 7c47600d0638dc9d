"""Measures the targets: range, classes, and the loss of constant predictions."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_normopt.diagnosis.first_layer import Range, range_of

# Losses whose best constant prediction is known, by name. The values are kinds of
# targets, or for regressions the best constant.
CROSSENTROPIES = {
    "sparsecategoricalcrossentropy": "sparse",
    "categoricalcrossentropy": "categorical",
    "binarycrossentropy": "binary",
}
REGRESSIONS = {
    "meansquarederror": "mean",
    "mse": "mean",
    "meanabsoluteerror": "median",
    "mae": "median",
}
_SMALL = 1e-7  # Keras clips probabilities at this value.


class NotCheckedError(Exception):
    """Raised if something cannot be checked. The message is the reason."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """The data for the loss of one batch.

    Attributes:
        y: The targets, a tensor, or nested tensors.
        shapes: The shape of each output of the model.
        sample_weight: A tensor or `None`.
        masked: Whether the model's outputs carry a mask.
        adds_losses: Whether layers of the model add losses.
    """

    y: Any
    shapes: tuple[tuple[int, ...], ...]
    sample_weight: Any
    masked: bool
    adds_losses: bool


@dataclasses.dataclass(frozen=True)
class Targets:
    """The targets of a model with one output and a known loss.

    Attributes:
        examples: The number of targets that were checked.
        classes: The number of classes that occur in the targets. `None` for a
            regression.
        outputs: The number of classes that the model can predict. `None` for a
            regression.
        range: The `Range` of the targets. Classes count as numbers.
    """

    examples: int
    classes: int | None
    outputs: int | None
    range: Range


@dataclasses.dataclass(frozen=True)
class Constants:
    """Losses of constant predictions on the same batches.

    Attributes:
        best: The loss of the best constant prediction: the frequencies of the classes,
            or the mean or median of the targets.
        zero: The loss if outputs are 0 before their activation: all classes are equally
            probable, or the prediction is 0. The loss of a new model is near this
            value.
        squared: Whether the loss is a squared error.
    """

    best: float
    zero: float
    squared: bool


def check(model, batches):
    """Raises `NotCheckedError` unless the model has one output and a known loss."""
    if not batches:
        raise NotCheckedError(
            "the `train_step` of the model does not call `compute_loss`"
        )
    if type(model).compute_loss is not keras.Model.compute_loss:
        raise NotCheckedError("the model has its own `compute_loss`")
    loss = getattr(model, "loss", None)
    if loss is None:
        raise NotCheckedError("the model is compiled without a loss")
    if len(batches[0].shapes) != 1 or len(tree.flatten(loss)) != 1:
        raise NotCheckedError("the model has several outputs")
    _kind(model)


def _kind(model):
    [loss] = tree.flatten(model.loss)
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", None)
    name = name or type(loss).__name__
    kind = (CROSSENTROPIES | REGRESSIONS).get(name.replace("_", "").lower())
    if kind is None or getattr(loss, "axis", -1) != -1:
        raise NotCheckedError(f"the loss is {name}")
    return kind, loss


def of_model(model, batches, y):
    """Measures the targets of a model.

    Args:
        model: A compiled model.
        batches: List of `Batch`.
        y: Array of all targets, or `None` to use the targets of the batches.

    Returns:
        `Targets`.
    """
    check(model, batches)
    kind, loss = _kind(model)
    if y is None:
        y = np.concatenate([ops.convert_to_numpy(batch.y) for batch in batches])
    y = np.asarray(y)
    if kind not in CROSSENTROPIES.values():
        return Targets(len(y), None, None, range_of(y))
    outputs = 2 if kind == "binary" else batches[0].shapes[0][-1]
    labels = np.argmax(y, axis=-1) if kind == "categorical" else y
    labels = labels[labels != getattr(loss, "ignore_class", None)]
    return Targets(len(y), len(np.unique(labels)), outputs, range_of(labels))


def constants(model, batches):
    """Computes the losses of constant predictions, with the model's own loss.

    Returns:
        `Constants`.
    """
    check(model, batches)
    if any(batch.adds_losses for batch in batches):
        raise NotCheckedError("layers add losses of their own")
    if any(batch.masked for batch in batches):
        raise NotCheckedError("the outputs are masked")
    kind, loss = _kind(model)
    best = _best(kind, loss, batches)
    zeros = {"sparse": 1 / best.size, "categorical": 1 / best.size, "binary": 0.5}
    zero = np.full(best.shape, zeros.get(kind, 0.0))
    return Constants(
        best=_loss(model, batches, _outputs(best, kind, loss)),
        zero=_loss(model, batches, _outputs(zero, kind, loss)),
        squared=kind == "mean",
    )


def _best(kind, loss, batches):
    """Returns the best constant prediction, a probability for a cross-entropy."""
    shape = batches[0].shapes[0]
    targets = np.concatenate([_rows(kind, loss, batch) for batch in batches])
    weights = np.concatenate([_weights(kind, batch) for batch in batches])
    if kind == "median":
        return np.median(targets, axis=0)
    mean = np.average(targets, axis=0, weights=weights)
    smoothing = getattr(loss, "label_smoothing", 0.0)
    if kind in ("sparse", "categorical"):
        return mean * (1 - smoothing) / mean.sum() + smoothing / shape[-1]
    if kind == "binary":
        return mean * (1 - smoothing) + smoothing / 2
    return mean


def _rows(kind, loss, batch):
    """Returns a batch's targets as the rows that the best constant averages."""
    y, shape = ops.convert_to_numpy(batch.y), batch.shapes[0]
    if kind == "categorical":
        return y.reshape(-1, shape[-1]).astype("float64")
    if kind != "sparse":
        return y.reshape(-1, *shape[1:]).astype("float64")
    labels = y.reshape(-1, 1)
    ignored = labels == getattr(loss, "ignore_class", None)
    return np.where(ignored, 0.0, labels == np.arange(shape[-1]))


def _weights(kind, batch):
    """Returns the weight of each row that `_rows` returns."""
    shape = batch.shapes[0]
    sequence = kind in ("sparse", "categorical")
    rows = int(np.prod(shape[:-1] if sequence else shape[:1]))
    if batch.sample_weight is None:
        return np.ones(rows)
    weights = ops.convert_to_numpy(batch.sample_weight).reshape(-1)
    if rows % len(weights):
        raise NotCheckedError("the sample weights do not fit the outputs")
    return np.repeat(weights, rows // len(weights))


def _outputs(prediction, kind, loss):
    if kind in REGRESSIONS.values():
        return prediction
    p = np.clip(prediction, _SMALL, 1 - _SMALL)
    if not getattr(loss, "from_logits", False):
        return p
    return np.log(p / (1 - p)) if kind == "binary" else np.log(p)


def _loss(model, batches, prediction):
    losses, sizes = [], []
    for batch in batches:
        outputs = np.broadcast_to(prediction, batch.shapes[0]).astype("float32")
        loss = model.compute_loss(
            y=batch.y,
            y_pred=ops.convert_to_tensor(outputs),
            sample_weight=batch.sample_weight,
        )
        losses.append(float(ops.convert_to_numpy(loss)))
        sizes.append(batch.shapes[0][0])
    return float(np.average(losses, weights=sizes))
