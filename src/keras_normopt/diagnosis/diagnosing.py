"""Measures a model on a few batches before training, and says what to repair."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_normopt.diagnosis import (
    baselines,
    first_layer,
    first_update,
    probe,
    report,
)
from keras_normopt.diagnosis.baselines import Constants, Targets
from keras_normopt.diagnosis.finding import Finding, kernels
from keras_normopt.diagnosis.first_layer import Range
from keras_normopt.diagnosis.gradient_findings import findings
from keras_normopt.diagnosis.measure import Block, Records, array_of


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`. `print` shows it.

    `pandas.DataFrame(diagnosis.blocks)` is a table of all blocks.

    Attributes:
        blocks: A `Block` for each trainable variable, in the order of the model.
        totals: The l2 norm of the whole gradient in each batch.
        logs: What `fit` logged over these batches, `{name: float}`.
        loss_scale: The factor that the loss was multiplied by, 1 without loss scaling.
            Norms do not include it.
        optimizer: The class name of the first optimizer that received gradients. `None`
            if the model is not compiled.
        inputs: The `Range` of the values that reach the first layer with a kernel.
            `None` if the range was not checked, or if an embedding comes first.
        targets: The `Targets`. `None` if the targets were not checked.
        constants: The losses of constant predictions. `None` if these losses were not
            computed.
        frozen: Tuple of the paths of the variables that the model does not train.
        unchecked: Tuple of texts: what was not checked, and why.
        findings: Tuple of `Finding` objects, the gravest first.
    """

    blocks: tuple[Block, ...]
    totals: tuple[float, ...]
    logs: dict[str, float]
    loss_scale: float
    optimizer: str | None
    inputs: Range | None = None
    targets: Targets | None = None
    constants: Constants | None = None
    frozen: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def ratio(self) -> float:
        """The largest `rms` of a kernel divided by the smallest.

        Kernels are variables with two or more axes whose names do not end in `bias`. If
        no kernel has a nonzero, finite gradient, the ratio is 1.
        """
        sizes = [block.rms for block in kernels(self.blocks)]
        return max(sizes) / min(sizes) if sizes else 1.0

    def __str__(self) -> str:
        return report.report(self)


def diagnose(
    model: Any,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int = 32,
    batches: int = 4,
    class_weight: dict[int, float] | None = None,
    loss: Any = None,
) -> Diagnosis:
    """Measures the gradients of a model, and says what they suggest.

    The model computes the gradients of some batches as in `fit`, with its own
    `train_step`, loss scale and dropout. It makes no step. Afterwards its weights,
    optimizer, metrics, seeds and compiled functions are unchanged. The model runs
    eagerly, which takes longer than a compiled step.

    Each finding says what was measured and what to do. `diagnose` checks the gradients,
    the scale of inputs and targets, the first loss, frozen variables, the dtype, and
    the optimizer's first update. If all is well, the only finding is `"nothing"`. If
    something cannot be checked, the report says so. Gradients change during training,
    so call `diagnose` again after an epoch.

    Args:
        model: A `keras.Model`. If it has not been compiled, pass `loss`.
        x: As for `fit`. `diagnose` draws examples from arrays or nested arrays, always
            the same ones. If data come in batches, it uses the first batches. If `x` is
            a generator, these batches are lost to `fit`.
        y: Targets, if `x` are arrays and the loss needs targets.
        sample_weight: As for `fit`.
        batch_size: Number of examples in a batch, if `x` are arrays. Defaults to 32.
        batches: How many batches to compute, at least 1. Three or more show spikes.
            Defaults to 4.
        class_weight: As for `fit`.
        loss: The loss, as for `compile`, if the model has not been compiled. Models in
            custom training loops often are not.

    Returns:
        A `Diagnosis`. Print it.

    Raises:
        ValueError: If `batches` or `batch_size` is below 1, if the loss or the targets
            that it needs are missing, or if no gradient reaches an optimizer.

    Example:
        >>> import keras, keras_normopt
        >>> import numpy as np
        >>> hidden = [keras.layers.Dense(16, "sigmoid") for _ in range(12)]
        >>> model = keras.Sequential(
        ...     [keras.Input((8,)), *hidden, keras.layers.Dense(1)]
        ... )
        >>> model.compile("adam", "mse")
        >>> x = np.random.default_rng(0).normal(size=(64, 8))
        >>> found = keras_normopt.diagnose(model, x, x[:, :1])
        >>> found.blocks[0].norm < found.blocks[-1].norm
        True
        >>> found.findings[0].name
        'vanishing'
    """
    for name, value in {"batch_size": batch_size, "batches": batches}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")
    data = _drawn((x, y, sample_weight), batch_size * batches)
    probed = model if model.compiled else _compiled(model, loss)
    records = Records(probed)
    with probe.unchanged(probed):
        logs = probe.run(
            probed,
            data,
            batch_size,
            batches,
            class_weight,
            records.receive,
            records.receive_loss,
        )
        if not records.totals and probed.trainable_variables:
            raise ValueError(
                "No optimizer of the model received a gradient. If the `train_step` "
                "updates weights without an optimizer, pass the inner model that it "
                f"trains, and the loss. Received: model={model!r}"
            )
        found = _measured(probed, records, logs, y, compiled=model.compiled)
    optimizer = records.optimizer if model.compiled else None
    return dataclasses.replace(found, findings=findings(found, optimizer))


def _measured(model, records, logs, y, compiled):
    """Measures everything that needs the model. This may change its state."""
    unchecked = []

    def check(what, measure, *arguments):
        try:
            return measure(*arguments)
        except Exception as error:  # Models and losses of users may raise anything.
            reason = (
                error if isinstance(error, baselines.NotCheckedError) else repr(error)
            )
            unchecked.append(f"{what} ({reason})")
            return None

    all_targets = y if hasattr(y, "__array__") else None
    targets = check("targets", baselines.of_model, model, records.batches, all_targets)
    constants = check("first loss", baselines.constants, model, records.batches)
    inputs = check("range of the inputs", first_layer.range_of_inputs, model, records.x)
    updates: dict[str, float] = {}
    for optimizer, pairs in records.first.values():
        first = check("first update", first_update.measure, optimizer, pairs)
        updates |= first or {}
    return Diagnosis(
        blocks=records.blocks(updates),
        totals=tuple(records.totals),
        logs=logs,
        loss_scale=records.scale,
        optimizer=type(records.optimizer).__name__ if compiled else None,
        inputs=inputs,
        targets=targets,
        constants=constants,
        frozen=_frozen(model),
        unchecked=tuple(unchecked),
    )


def _frozen(model):
    """Returns the paths of frozen variables that training could change."""
    trained = {id(variable) for variable in model.trainable_variables}
    found = {
        id(variable): variable.path
        for layer in model._flatten_layers()
        for variable in layer._trainable_variables
    }
    return tuple(path for key, path in found.items() if key not in trained)


class _Around(keras.Model):
    """Wraps a model, so that the model itself stays uncompiled."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)


def _compiled(model, loss):
    if loss is None:
        raise ValueError(
            "The model has not been compiled, so it has no loss. Compile it, or pass "
            f"`loss`. Received: model={model!r}"
        )
    around = _Around(model)
    around.compile("sgd", loss)
    return around


def _drawn(data, number):
    """Draws the same examples from arrays each time. Returns other data as it is."""
    arrays = [leaf for leaf in tree.flatten(data) if leaf is not None]
    if not all(hasattr(array, "__array__") for array in arrays):
        return data
    chosen = np.random.default_rng(0).permutation(len(arrays[0]))[:number]

    def draw(array):
        if hasattr(array, "iloc"):  # An object of pandas.
            return array.iloc[chosen]
        return np.asarray(array_of(array))[chosen]

    return tree.map_structure(draw, data, none_is_leaf=False)
