"""What a few batches tell about the gradients of a model, before it is trained."""

import dataclasses
import math
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops, tree

from keras_normopt import _probe, advice, layers, sparse


@dataclasses.dataclass(frozen=True)
class Block:
    """The gradient of one variable, over some batches.

    Attributes:
        name: The path of the variable.
        shape: Its shape.
        dtype: The dtype in which its layer computes.
        norms: The l2 norm of the gradient in each batch that has one.
        weight_norm: The l2 norm of the variable.
        zeros: The share of entries that are zero, 0 to 1.
        underflow: The share of entries, of those that are not zero, that are below the
            smallest normal number of `dtype`, with the scale that the loss has. There
            they lose digits, and what is a little smaller is zero.
        not_finite: The share of entries that are NaN or infinite.
        missing: The number of batches that bring no gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    norms: tuple[float, ...]
    weight_norm: float
    zeros: float = 0.0
    underflow: float = 0.0
    not_finite: float = 0.0
    missing: int = 0

    @property
    def norm(self) -> float:
        """The median of `norms`, which no spike moves; NaN without any."""
        return float(np.median(self.norms)) if self.norms else math.nan

    @property
    def rms(self) -> float:
        """The root mean square of the entries that are not zero.

        Unlike the norm it does not grow with the size of the variable.
        """
        entries = math.prod(self.shape) * (1 - self.zeros)
        return self.norm / math.sqrt(entries) if entries else 0.0

    @property
    def relative(self) -> float:
        """The norm of the gradient over that of the weights, NaN if these are zero."""
        return self.norm / self.weight_norm if self.weight_norm else math.nan


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. `print` shows it; `pandas.DataFrame(d.blocks)` has all.

    Attributes:
        blocks: A `Block` for each trainable variable, in the order of the model.
        totals: The l2 norm of the whole gradient in each batch.
        logs: What `fit` logged over these batches, `{name: float}`.
        loss_scale: The factor that the loss was multiplied by, 1 without loss scaling.
            Norms are those without it.
        optimizer: The name of the class of the optimizer that gradients came to, of
            several the first; `None` for a model that is not compiled.
        findings: What was found, each a `Finding`, the gravest first.
    """

    blocks: tuple[Block, ...]
    totals: tuple[float, ...]
    logs: dict[str, float]
    loss_scale: float
    optimizer: str | None
    findings: tuple[advice.Finding, ...] = ()

    @property
    def ratio(self) -> float:
        """The `rms` of the kernel with the largest over that with the smallest.

        Kernels are the variables of two or more axes that are not called `bias`; 1 if
        there are none.
        """
        sizes = [block.rms for block in advice.kernels(self.blocks)]
        return max(sizes) / min(sizes) if sizes else 1.0

    def __str__(self) -> str:
        return advice.report(self)


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
    `train_step`, loss scale and dropout, and without making a step. Weights, optimizer,
    metrics, seeds and compiled functions are afterwards what they were. It runs
    eagerly, which takes longer than a compiled step.

    The findings say what was measured and what follows: where gradients are NaN, zero,
    too small for the dtype or for the optimizer, apart by orders of magnitude, or
    spikes; and if none of it is the case, that there is nothing to normalize. They are
    about these batches: at the start of training other things hold than later, so ask
    again after an epoch.

    Args:
        model: A `keras.Model`. If it has not been compiled, pass `loss`.
        x: What `fit` takes: arrays, or nested arrays, of which examples are drawn,
            always the same; or data that comes in batches, which are taken as they
            come. Of a generator they are used up.
        y: Targets, if `x` are arrays.
        sample_weight: As of `fit`.
        batch_size: Number of examples in a batch, if `x` are arrays. Defaults to 32.
        batches: How many batches to compute, at least 1. Three or more show spikes.
            Defaults to 4.
        class_weight: As of `fit`.
        loss: The loss, as `compile` takes it, of a model that has not been compiled, as
            for a training loop of one's own.

    Returns:
        A `Diagnosis`. Print it.

    Raises:
        ValueError: If `batches` or `batch_size` is below 1, if the model has no loss,
            or if no gradient came to an optimizer.

    Example:
        >>> import keras, keras_normopt
        >>> import numpy as np
        >>> hidden = [keras.layers.Dense(16, "sigmoid") for _ in range(12)]
        >>> model = keras.Sequential(
        ...     [keras.Input((8,)), *hidden, keras.layers.Dense(1)]
        ... )
        >>> model.compile("adam", "mse")
        >>> found = keras_normopt.diagnose(model, np.ones((64, 8)), np.ones((64, 1)))
        >>> found.blocks[0].norm < found.blocks[-1].norm
        True
        >>> [finding.name for finding in found.findings]
        ['apart', 'below_epsilon']
    """
    for name, value in {"batch_size": batch_size, "batches": batches}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")
    data = _drawn((x, y, sample_weight), batch_size * batches)
    records = _Records()
    logs = _probe.run(
        model if model.compiled else _compiled(model, loss),
        data,
        batch_size,
        batches,
        class_weight,
        records.receive,
    )
    if not records.totals:
        raise ValueError(
            "No gradient came to an optimizer of the model. If its `train_step` makes "
            "steps in another way, pass the model that it trains, and its loss. "
            f"Received: model={model!r}"
        )
    optimizer = records.optimizer if model.compiled else None
    found = Diagnosis(
        blocks=records.blocks(),
        totals=tuple(records.totals),
        logs=logs,
        loss_scale=records.scale,
        optimizer=type(optimizer).__name__ if optimizer else None,
    )
    return dataclasses.replace(found, findings=advice.findings(found, optimizer))


class _Around(keras.Model):
    """A model that can be compiled around one that shall not be."""

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
    """Examples of arrays, the same ones each time; other data as it is."""
    arrays = [leaf for leaf in tree.flatten(data) if leaf is not None]
    if not all(hasattr(array, "__array__") for array in arrays):
        return data
    chosen = np.random.default_rng(0).permutation(len(arrays[0]))[:number]

    def draw(array):
        if hasattr(array, "iloc"):  # Of pandas.
            return array.iloc[chosen]
        return np.asarray(_array(array))[chosen]

    return tree.map_structure(draw, data, none_is_leaf=False)


def _array(tensor):
    is_ours = ops.is_tensor(tensor) or isinstance(tensor, keras.Variable)
    return ops.convert_to_numpy(tensor) if is_ours else tensor


class _Records:
    """Takes in the gradients of each step, and keeps what is asked of them."""

    def __init__(self):
        self.optimizer = None
        self.scale = 1.0
        self.totals = []
        self._variables = {}
        self._dtypes = {}
        self._measured = {}

    def receive(self, optimizer, pairs, scale):
        if self.optimizer is None:
            self.optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        pairs = [
            (gradient, variable)
            for gradient, variable in pairs
            if not getattr(variable, "overwrite_with_gradient", False)
        ]
        self._get_to_know([variable for _, variable in pairs])
        self.scale = scale
        norms = []
        for gradient, variable in pairs:
            measured = None
            if gradient is not None:
                measured = _measure(gradient, self._dtypes[id(variable)], scale)
                norms.append(measured["norms"])
            self._measured[id(variable)].append(measured)
        self.totals.append(math.hypot(*norms))

    def _get_to_know(self, variables):
        new = [v for v in variables if id(v) not in self._variables]
        if not new:  # As in all steps but the first; a search for layers takes long.
            return
        for variable, around in zip(new, layers.around(new), strict=True):
            self._variables[id(variable)] = variable
            self._dtypes[id(variable)] = (
                around[0].compute_dtype if around else "float32"
            )
            self._measured[id(variable)] = []

    def blocks(self):
        return tuple(map(self._block, self._variables.values()))

    def _block(self, variable):
        all_steps = self._measured[id(variable)]
        steps = [measured for measured in all_steps if measured]
        shares = {
            name: float(np.mean([measured[name] for measured in steps]))
            for name in ("zeros", "underflow", "not_finite")
            if steps
        }
        return Block(
            name=variable.path,
            shape=tuple(variable.shape),
            dtype=self._dtypes[id(variable)],
            norms=tuple(measured["norms"] for measured in steps),
            weight_norm=float(np.linalg.norm(_array(variable).astype("float64"))),
            missing=len(all_steps) - len(steps),
            **shares,
        )


def _measure(gradient, dtype, scale):
    """What a `Block` tells of one gradient."""
    try:
        entries = np.abs(_array(sparse.densify(gradient)), dtype="float64")
    except Exception as error:  # Each backend has another for what is being traced.
        raise ValueError(
            "The model computes its gradients in a compiled function, where they "
            "cannot be seen. Take `tf.function` or `jax.jit` off its `train_step` to "
            "diagnose it."
        ) from error
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    some = np.count_nonzero(entries)
    return {
        "norms": float(np.linalg.norm(entries)) / scale,
        "zeros": 1 - some / max(entries.size, 1),
        "underflow": np.count_nonzero((entries > 0) & (entries < tiny)) / max(some, 1),
        "not_finite": 1 - np.isfinite(entries).mean(),
    }
