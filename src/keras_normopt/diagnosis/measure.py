"""Measures the gradients of each variable."""

import dataclasses
import math

import keras
import ml_dtypes
import numpy as np
from keras import ops, tree

from keras_normopt._backend import sparse
from keras_normopt._blocks import axes
from keras_normopt.diagnosis import baselines


@dataclasses.dataclass(frozen=True)
class Block:
    """The gradient of one variable, over some batches.

    Attributes:
        name: The path of the variable.
        shape: Its shape.
        dtype: The dtype in which its layer computes.
        norms: The l2 norm of the gradient, for each batch that has a gradient.
        weight_norm: The l2 norm of the variable.
        zeros: The share of entries that are zero, 0 to 1.
        underflow: The share of nonzero entries that, with the loss scale, are below the
            smallest normal number of `dtype`. Such entries lose digits, and even
            smaller entries become zero.
        not_finite: The share of entries that are NaN or infinite.
        missing: The number of batches without a gradient for the variable.
        variable_dtype: The dtype of the variable itself.
        update: The l2 norm of the optimizer's first update, at the largest rate of its
            schedule, times 1 / (1 - momentum). NaN if the update was not checked.
        unmoved: The share of entries with a gradient that the first update leaves
            unchanged.
        gain: The largest singular value of a recurrent kernel, or of any of its gates;
            NaN for other variables.
        concentration: The largest singular value of the gradient over its l2 norm. It
            is at most 1, and 1 for a gradient of rank 1. If the variable holds several
            matrices, this is the median over the matrices. NaN if the variable is no
            matrix.
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
    variable_dtype: str = "float32"
    update: float = math.nan
    unmoved: float = 0.0
    gain: float = math.nan
    concentration: float = math.nan

    @property
    def norm(self) -> float:
        """The median of `norms`, which ignores spikes. NaN if `norms` is empty."""
        return float(np.median(self.norms)) if self.norms else math.nan

    @property
    def rms(self) -> float:
        """The root mean square of the nonzero entries.

        Unlike the norm, it does not grow with the size of the variable.
        """
        entries = math.prod(self.shape) * (1 - self.zeros)
        return self.norm / math.sqrt(entries) if entries else 0.0

    @property
    def relative(self) -> float:
        """The ratio of `norm` to `weight_norm`, NaN if the weights are zero."""
        return self.norm / self.weight_norm if self.weight_norm else math.nan


class Records:
    """Records the gradients and targets of each step.

    Attributes:
        optimizer: The optimizer of the first step, without its loss scale.
        scale: The factor that the loss was multiplied by.
        totals: The l2 norm of the whole gradient in each step.
        first: Dictionary from the `id` of each optimizer to a tuple: the optimizer, and
            the pairs `(gradient, variable)` of its first step. A gradient is an array
            or `None`.
        batches: List with a `Batch` for each loss that was computed.
        x: The inputs of the first batch.
    """

    def __init__(self, model):
        self.model = model
        self.optimizer = None
        self.scale = 1.0
        self.totals = []
        self.first = {}
        self.batches = []
        self.x = None
        self._variables = {}
        self._dtypes = {}
        self._axes = {}
        self._measured = {}

    def receive_loss(self, x, y, y_pred, sample_weight):
        if self.x is None:
            self.x = x
        outputs = tree.flatten(y_pred)
        penalties = [v for v in self.model.trainable_variables if v.regularizer]
        self.batches.append(
            baselines.Batch(
                y=y,
                shapes=tuple(tuple(output.shape) for output in outputs),
                sample_weight=sample_weight,
                masked=any(hasattr(output, "_keras_mask") for output in outputs),
                adds_losses=len(self.model.losses) > len(penalties),
            )
        )

    def receive(self, optimizer, pairs, scale):
        if self.optimizer is None:
            self.optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        pairs = [
            (gradient, variable)
            for gradient, variable in pairs
            if not getattr(variable, "overwrite_with_gradient", False)
        ]
        self._add_variables([variable for _, variable in pairs], optimizer)
        self.scale = scale
        norms, arrays = [], []
        for gradient, variable in pairs:
            measured = array = None
            if gradient is not None:
                array = _dense(gradient)
                measured = _measure(array, self._dtypes[id(variable)], scale)
                measured["concentration"] = _concentration(
                    array, self._axes[id(variable)]
                )
                norms.append(measured["norms"])
                array = array / scale
            self._measured[id(variable)].append(measured)
            arrays.append((array, variable))
        self.first.setdefault(id(optimizer), (optimizer, arrays))
        self.totals.append(math.hypot(*norms))

    def _add_variables(self, variables, optimizer):
        new = [v for v in variables if id(v) not in self._variables]
        if not new:
            return
        computed = {
            id(variable): layer.compute_dtype
            for layer in self.model._flatten_layers()
            for variable in layer._trainable_variables
        }
        paths = [variable.path for variable in new]
        found, _ = axes.find(new, paths, getattr(optimizer, "axes", None))
        for variable, its_axes in zip(new, found, strict=True):
            self._axes[id(variable)] = its_axes
            self._variables[id(variable)] = variable
            self._dtypes[id(variable)] = computed.get(id(variable), variable.dtype)
            self._measured[id(variable)] = []

    def blocks(self, updates):
        """Returns a `Block` for each variable.

        Args:
            updates: Results of `first_update.measure`: a dictionary from ids of
                variables to dictionaries of fields of `Block`.
        """
        return tuple(
            self._block(v, updates.get(id(v), {})) for v in self._variables.values()
        )

    def _block(self, variable, update):
        all_steps = self._measured[id(variable)]
        steps = [measured for measured in all_steps if measured]
        shares = {
            name: float(np.mean([measured[name] for measured in steps]))
            for name in ("zeros", "underflow", "not_finite", "concentration")
            if steps
        }
        weights = array_of(variable).astype("float64")
        return Block(
            name=variable.path,
            shape=tuple(variable.shape),
            dtype=self._dtypes[id(variable)],
            norms=tuple(measured["norms"] for measured in steps),
            weight_norm=float(np.linalg.norm(weights)),
            missing=len(all_steps) - len(steps),
            variable_dtype=variable.dtype,
            gain=_gain(variable.path, weights),
            **shares,
            **update,
        )


def array_of(tensor):
    """Converts a tensor or a variable to an array. Returns other data unchanged."""
    is_ours = ops.is_tensor(tensor) or isinstance(tensor, keras.Variable)
    return ops.convert_to_numpy(tensor) if is_ours else tensor


def _dense(gradient):
    try:
        return np.array(array_of(sparse.densify(gradient)))
    except Exception as error:  # Backends raise different errors on traced values.
        raise ValueError(
            "The model computes its gradients in a compiled function, where "
            "`diagnose` cannot read them. Remove `tf.function` or `jax.jit` from its "
            "`train_step`."
        ) from error


def _measure(gradient, dtype, scale):
    """Returns a dictionary of the fields of `Block` that describe one gradient."""
    entries = np.abs(gradient, dtype="float64")
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    some = int(np.count_nonzero(entries))
    return {
        "norms": float(np.linalg.norm(entries)) / scale,
        "zeros": 1 - some / max(entries.size, 1),
        "underflow": int(np.sum((entries > 0) & (entries < tiny))) / max(some, 1),
        "not_finite": 1 - np.isfinite(entries).mean(),
    }


def _concentration(gradient, its_axes):
    """Returns the field `concentration` of a `Block` for one gradient."""
    if its_axes.role != "kernel" or not np.isfinite(gradient).all():
        return math.nan
    matrices = its_axes.to_matrices(ops.convert_to_tensor(gradient[None]))
    found = [_largest_share(matrix) for matrix in ops.convert_to_numpy(matrices)]
    return float(np.median(found))


def _largest_share(matrix, iterations=20):
    """Returns the largest singular value divided by the l2 norm, by power iteration.

    A singular value decomposition of a kernel of 4096 x 4096 would take a minute.
    """
    matrix = matrix.astype("float64")
    norm = np.linalg.norm(matrix)
    if not norm:
        return math.nan
    matrix = matrix / norm
    vector = matrix[np.argmax(np.linalg.norm(matrix, axis=1))]
    for _ in range(iterations):
        vector = matrix.T @ (matrix @ vector)
        vector /= np.linalg.norm(vector)
    return float(np.linalg.norm(matrix @ vector))


def _gain(path, weights):
    """Returns the largest factor by which a recurrent kernel can lengthen the state.

    The kernel of an LSTM has one part for each gate, side by side. The largest factor
    of a gate counts.
    """
    if not path.endswith("recurrent_kernel") or weights.ndim != 2:
        return math.nan
    gates = np.split(weights, weights.shape[1] // weights.shape[0], axis=1)
    return max(float(np.linalg.norm(gate, 2)) for gate in gates)
