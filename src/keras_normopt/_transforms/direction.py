"""Replaces a gradient by a direction: a step of a set length, best aligned with it.

Each direction maximizes <gradient, step> over the steps of length 1 in one norm: the
linear minimization oracle of that norm, turned around (arXiv 2502.07529).
"""

import math
import re
import reprlib
import warnings
from typing import Any

import numpy as np
from keras import ops

from keras_normopt._backend import sparse
from keras_normopt._backend.devices import device_of, near
from keras_normopt._backend.tensors import constant_like, divide, dtype_of, safe_sqrt
from keras_normopt._transforms.config import (
    Configured,
    check_pattern,
    config_of,
    find,
    is_real,
)

#: The root mean square of the entries of a step under `scale="match_rms_adamw"`.
RMS = 0.2

#: More entries than these are not stacked: a stack is a copy.
_STACK_ENTRIES = 2**22

JORDAN = (3.4445, -4.7750, 2.0315)
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_NAMED: dict[str, Any] = {"quintic": QUINTIC, "jordan": JORDAN}


def _checked_scale(scale, choices):
    if scale is not None and not (isinstance(scale, str) and scale in choices):
        raise ValueError(
            f"`scale` must be None or one of {', '.join(map(repr, choices))}. "
            f"Received: scale={reprlib.repr(scale)}"
        )
    return scale


class Sign(Configured):
    """Replaces each entry by its sign: u ← scale · sign(u).

    This is steepest descent in the largest entry. Of the momentum it is Signum. An
    entry whose magnitude is below `norm_epsilon` is divided by `norm_epsilon` instead,
    and zeros stay zeros.

    Args:
        scale: The magnitude of each entry: `None`, 1; `"match_rms_adamw"`, .2, about
            that of a step of AdamW; or `"operator"`, for a kernel 1 / inputs, and 1 for
            all else (arXiv 2502.07529). Defaults to `None`.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        >>> import keras_normopt
        >>> signum = keras_normopt.NormalizedSGD(
        ...     0.001, momentum=0.9, apply_to="update", direction="sign"
        ... )

    References:
        - [Bernstein et al., 2018, signSGD: Compressed Optimisation for Non-Convex
          Problems](https://arxiv.org/abs/1802.04434)
    """

    __module__ = "keras_normopt.directions"
    name = "sign"

    def __init__(self, scale: str | None = None) -> None:
        self.scale = _checked_scale(scale, ("match_rms_adamw", "operator"))

    def get_config(self):
        """The arguments, by name."""
        return {"scale": self.scale}

    def of_role(self, role):
        """Returns what acts on variables of a role, or `None`."""
        return self

    def is_by_row(self, axes):
        """Whether each row of a gradient has a direction of its own."""
        return True

    def point(self, stack, axes, floor):
        """Returns the directions of equal gradients.

        Args:
            stack: Tensor of shape `(n, *shape)`, in float32 or float64.
            axes: The `Axes` of the variables.
            floor: Scalar tensor. Where the gradient is shorter, so is the step.
        """
        magnitude = ops.abs(stack)
        # NaN stays: the sign of NaN is 0 on PyTorch.
        sign = ops.where(ops.equal(stack, stack), ops.sign(stack), stack)
        signs = ops.where(magnitude < floor, stack / floor, sign)
        return signs * self._factor(axes, tuple(stack.shape[1:]))

    def _factor(self, axes, shape):
        if self.scale == "operator":
            inputs = axes.sizes(shape)[1] if axes.role == "kernel" else 1
            return 1 / max(inputs, 1)
        return RMS if self.scale else 1.0


class Rows(Configured):
    """Gives each row of a matrix the same length: u ← scale · u / ‖u‖₂.

    A row of an embedding belongs to one token. A row of a kernel is what leads to one
    output unit, as in the layout (out, in) of PyTorch. A vector is a single row. A row
    whose norm is below `norm_epsilon` is divided by `norm_epsilon` instead, and zeros
    stay zeros.

    Args:
        scale: The length of a row of n entries: `None`, 1; `"match_rms_adamw"`, .2 √n,
            so that its root mean square is .2; or `"operator"`, √n for an embedding or
            a vector, so that its root mean square is 1, and 1 / √n for a kernel (arXiv
            2502.07529). Defaults to `None`.
        over: The axes that a length is measured over: `"inputs"` or `"outputs"` of the
            layer; or `"auto"`, the outputs for an embedding and the inputs for a
            kernel. Defaults to `"auto"`.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        >>> import keras_normopt
        >>> from keras_normopt import directions
        >>> rows = directions.Rows("match_rms_adamw")
        >>> optimizer = keras_normopt.NormalizedAdam(
        ...     apply_to="update", direction={"embeddings": rows, ".*": None}
        ... )

    References:
        - [Pethick et al., 2025, Training Deep Learning Models with Norm-Constrained
          LMOs](https://arxiv.org/abs/2502.07529)
    """

    __module__ = "keras_normopt.directions"
    name = "rows"

    def __init__(self, scale: str | None = None, over: str = "auto") -> None:
        self.scale = _checked_scale(scale, ("match_rms_adamw", "operator"))
        if over not in ("auto", "inputs", "outputs"):
            raise ValueError(
                "`over` must be 'auto', 'inputs' or 'outputs'. "
                f"Received: over={reprlib.repr(over)}"
            )
        self.over = over

    def get_config(self):
        """The arguments, by name."""
        return {"scale": self.scale, "over": self.over}

    def of_role(self, role):
        """Returns what acts on variables of a role, or `None`."""
        return self

    def is_by_row(self, axes):
        """Whether each row of a gradient has a direction of its own."""
        return axes.role == "embedding" and self.over != "inputs"

    def point(self, stack, axes, floor):
        """Returns the directions of equal gradients: see `Sign`."""
        over = tuple([i + 1 for i in self._axes(axes, len(stack.shape) - 1)])
        unit, norms, largest = _unit(stack, over)
        return unit * (_fade(norms, largest, floor) * self._factor(axes, stack, over))

    def _axes(self, axes, rank):
        """Returns the axes that the length of a row is measured over."""
        if axes.role == "vector":
            return tuple(range(rank))
        over = self.over
        if over == "auto":
            over = "outputs" if axes.role == "embedding" else "inputs"
        return getattr(axes, over)

    def _factor(self, axes, stack, over):
        entries = math.prod([stack.shape[i] for i in over])
        if self.scale == "match_rms_adamw":
            return RMS * math.sqrt(entries)
        if self.scale == "operator":
            is_unit = axes.role == "kernel" and self.over != "outputs"
            return 1 / math.sqrt(entries) if is_unit else math.sqrt(entries)
        return 1.0


class Orthogonal(Configured):
    """Replaces each kernel's gradient by its orthogonal factor.

    With the kernel seen as a matrix (inputs | outputs), and its singular value
    decomposition U S Vᵀ,

        u ← scale · U Vᵀ · min(1, ‖u‖₂ / norm_epsilon)

    so that all singular values become equal. This is steepest descent in the spectral
    norm, and of the momentum it is Muon. The layer that created a kernel decides which
    axes are inputs: see the argument `axes` of the optimizer. Gates, groups and heads
    that are separate matrices are treated apart.

    Newton-Schulz iteration computes U Vᵀ by matrix products alone, in float32 (float64
    for float64 gradients), at any magnitude of u:

        X ← u / ‖u‖₂,  then X ← aX + (bA + cA²)X with A = XXᵀ, for each (a, b, c)

    With the default coefficients, singular values of at least .005 ‖u‖₂ come out
    between .95 and 1.15. Smaller ones come out smaller. A matrix of zeros stays zero,
    and a matrix with a NaN becomes NaN.

    Args:
        scale: The singular values of a step, for a kernel of `in` inputs and `out`
            outputs: `None`, 1; `"original"`, √max(1, out / in);
            `"match_rms_adamw"`, .2 √max(in, out), which makes the root mean square of
            a step of full rank .2; or `"operator"`, √(out / in). A convolution counts
            its spatial entries as inputs. Defaults to `"match_rms_adamw"`.
        coefficients: The polynomials: `"quintic"`, five triples; `"jordan"`,
            (3.4445, −4.7750, 2.0315), whose results are between .68 and 1.15; or a
            triple (a, b, c), or a list of triples. Defaults to `"quintic"`.
        steps: Integer of at least 1, or `None`, how many polynomials to apply. A single
            triple is used again. Of a list, the first ones are used, and the last one
            again. Defaults to `None`: as many as there are, or 5 of a single triple.
        embeddings: What acts on embeddings: `None`, a name, or an object of
            `keras_normopt.directions`. Defaults to `None`, their raw gradient.
        vectors: What acts on biases, gains and scalars, as for `embeddings`. Defaults
            to `None`, their raw gradient.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        >>> import keras_normopt
        >>> from keras_normopt import directions
        >>> optimizer = keras_normopt.OrthogonalSGD(
        ...     0.01, direction=directions.Orthogonal(scale="operator")
        ... )

    References:
        - [Jordan et al., 2024, Muon: An optimizer for hidden layers in neural
          networks](https://kellerjordan.github.io/posts/muon/), the method and
          `"jordan"`
        - [Liu et al., 2025, Muon is Scalable for LLM
          Training](https://arxiv.org/abs/2502.16982), `"match_rms_adamw"`
        - [Bernstein, Newhouse, 2024, Old Optimizer, New Norm: An
          Anthology](https://arxiv.org/abs/2409.20325)
        - [NVIDIA, Emerging-Optimizers](https://github.com/NVIDIA-NeMo/Emerging-Optimizers),
          `"quintic"`
    """

    __module__ = "keras_normopt.directions"
    name = "orthogonal"

    def __init__(
        self,
        scale: str | None = "match_rms_adamw",
        coefficients: Any = "quintic",
        steps: int | None = None,
        embeddings: Any = None,
        vectors: Any = None,
    ) -> None:
        choices = ("original", "match_rms_adamw", "operator")
        self.scale = _checked_scale(scale, choices)
        self.coefficients = _checked_coefficients(coefficients)
        self.steps = _checked_steps(steps)
        self.embeddings = _get_one(embeddings, "embeddings")
        self.vectors = _get_one(vectors, "vectors")

    def get_config(self):
        """The arguments, by name."""
        return {
            "scale": self.scale,
            "coefficients": self.coefficients,
            "steps": self.steps,
            "embeddings": config_of(self.embeddings),
            "vectors": config_of(self.vectors),
        }

    def of_role(self, role):
        """Returns what acts on variables of a role, or `None`."""
        return {"kernel": self, "embedding": self.embeddings, "vector": self.vectors}[
            role
        ]

    def is_by_row(self, axes):
        """Whether each row of a gradient has a direction of its own."""
        return False

    def point(self, stack, axes, floor):
        """Returns the directions of equal gradients: see `Sign`."""
        n, *shape = stack.shape
        matrices = axes.to_matrices(stack)
        _, inputs, outputs = matrices.shape
        wide = inputs <= outputs
        if not wide:
            matrices = ops.transpose(matrices, (0, 2, 1))
        unit, norms, largest = _unit(matrices, (1, 2))
        result = newton_schulz(unit, self._polynomials())
        result = result * (_fade(norms, largest, floor) * self._factor(inputs, outputs))
        if not wide:
            result = ops.transpose(result, (0, 2, 1))
        return axes.from_matrices(result, n, shape)

    def _polynomials(self):
        named = isinstance(self.coefficients, str)
        triples = _NAMED[self.coefficients] if named else self.coefficients
        if is_real(triples[0]):
            return [triples] * (self.steps or 5)
        steps = self.steps or len(triples)
        return [triples[min(i, len(triples) - 1)] for i in range(steps)]

    def _factor(self, inputs, outputs):
        if self.scale == "original":
            return math.sqrt(max(1.0, outputs / inputs))
        if self.scale == "match_rms_adamw":
            return RMS * math.sqrt(max(inputs, outputs))
        if self.scale == "operator":
            return math.sqrt(outputs / inputs)
        return 1.0


def _checked_coefficients(coefficients):
    """Returns a name, one triple, or a list of triples.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(coefficients, str) and coefficients in _NAMED:
        return coefficients
    if isinstance(coefficients, list | tuple):
        if _is_triple(coefficients):
            return [float(c) for c in coefficients]
        if coefficients and all(map(_is_triple, coefficients)):
            return [[float(c) for c in triple] for triple in coefficients]
    raise ValueError(
        f"`coefficients` must be {' or '.join(map(repr, _NAMED))}, three finite "
        "numbers (a, b, c), or a list of such triples. "
        f"Received: coefficients={reprlib.repr(coefficients)}"
    )


def _is_triple(value):
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(is_real(c) and math.isfinite(c) for c in value)
    )


def _checked_steps(steps):
    is_right = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
    if steps is not None and not is_right:
        raise ValueError(
            "`steps` must be None or an integer of at least 1. "
            f"Received: steps={reprlib.repr(steps)}"
        )
    return steps


def newton_schulz(matrices, polynomials):
    """Moves singular values towards 1, by odd polynomials of the matrices.

    X ← aX + (bA + cA²)X with A = XXᵀ.

    Args:
        matrices: Tensor of shape `(n, rows, columns)`, no more rows than columns, each
            with a Frobenius norm of at most 1.
        polynomials: List of (a, b, c).
    """
    for a, b, c in polynomials:
        gram = ops.matmul(matrices, ops.transpose(matrices, (0, 2, 1)))
        gram = b * gram + c * ops.matmul(gram, gram)
        matrices = a * matrices + ops.matmul(gram, matrices)
    return matrices


def _unit(tensor, axes):
    """Divides by the Euclidean norm over some axes, at any magnitude.

    Returns:
        The quotients, 0 where the norm is 0; the largest magnitudes; and the norms,
        divided by these.
    """
    # The result does not depend on the scale, so its derivative is left out.
    largest = ops.stop_gradient(ops.amax(ops.abs(tensor), axis=axes, keepdims=True))
    tensor = divide(tensor, ops.where(ops.equal(largest, 0), 1.0, largest))
    norms = safe_sqrt(ops.sum(ops.square(tensor), axis=axes, keepdims=True))
    return tensor / ops.where(ops.equal(norms, 0), 1.0, norms), norms, largest


def _fade(norms, largest, floor):
    """Returns min(1, norm / floor) of norms = `norms` · `largest`."""
    # The norm itself may overflow.
    ratio = norms * (ops.where(largest < floor, largest, floor) / floor)
    return ops.where(ratio < 1, ratio, ops.ones_like(ratio))


def point(gradients, directions, axes, epsilon):
    """Replaces each gradient by its direction.

    Args:
        gradients: The `Gradients`.
        directions: List of what acts on each variable of the optimizer, or `None`.
        axes: List of the `Axes` of each variable.
        epsilon: Scalar tensor, variable or float. Shorter gradients make shorter steps.
    """
    equal: dict[Any, list[int]] = {}
    for position in gradients.positions:
        number = gradients.indices[position]
        tensor = gradients.tensors[position]
        direction, of_variable = directions[number], axes[number]
        if direction is None or not math.prod(tensor.shape):
            continue
        key = (
            id(direction),
            of_variable,
            tuple(tensor.shape),
            tensor.dtype,
            position if sparse.is_sparse(tensor) else device_of(tensor),
        )
        equal.setdefault(key, []).append(position)
    for (_, of_variables, shape, *_), positions in equal.items():
        direction = directions[gradients.indices[positions[0]]]
        size = max(1, _STACK_ENTRIES // math.prod(shape))

        def function(stack, direction=direction, of_variables=of_variables):
            return direction.point(stack, of_variables, _floor(epsilon, stack))

        for start in range(0, len(positions), size):
            gradients.replace(
                function,
                positions[start : start + size],
                by_row=direction.is_by_row(of_variables),
            )


def _floor(epsilon, tensor):
    """Returns a floor above 0 in the dtype of a tensor."""
    floor, smallest = ops.cast(epsilon, dtype_of(tensor)), np.finfo(dtype_of(tensor))
    tiny = constant_like(floor, smallest.tiny)
    return near(ops.where(floor < tiny, tiny, floor), tensor)


_CLASSES = {cls.name: cls for cls in (Sign, Rows, Orthogonal)}


class ByPattern(Configured):
    """The direction of each variable by the first pattern that its path contains.

    Args:
        patterns: List of pairs of a regular expression and a direction or `None`.
    """

    def __init__(self, patterns):
        self.patterns = patterns

    def get_config(self):
        """The arguments, by name."""
        return {"patterns": [[p, config_of(d)] for p, d in self.patterns]}

    def of(self, path):
        """Returns the direction for a path."""
        return next((d for p, d in self.patterns if re.search(p, path)), None)


def get(identifier: Any) -> Any:
    """Returns what `direction=` stands for.

    Args:
        identifier: `None`, a name, an object, what `serialize` made of one, or a
            dictionary from regular expressions to these.

    Raises:
        TypeError: If a key of the dictionary is not a string.
        ValueError: If it is none of these, or its arguments are wrong.
    """
    if isinstance(identifier, ByPattern):
        return identifier
    patterns = identifier
    if isinstance(identifier, dict) and set(identifier) == {"patterns"}:
        patterns = dict(identifier["patterns"])
    elif isinstance(identifier, dict) and set(identifier) == {"name", "config"}:
        patterns = None
    if not isinstance(patterns, dict):
        return _get_one(identifier, "direction")
    if not patterns:
        raise ValueError("`direction` must not be an empty dictionary.")
    for pattern in patterns:
        check_pattern("direction", pattern, identifier)
    return ByPattern([(p, _get_one(d, "direction")) for p, d in patterns.items()])


def serialize(direction: Any) -> Any:
    """Returns what `get` makes the same direction of, in types that JSON has."""
    if isinstance(direction, ByPattern):
        return direction.get_config()
    return config_of(direction)


def resolve(direction: Any, paths: list[str], axes: list[Any]) -> list[Any]:
    """Returns what acts on each variable, or `None`.

    Args:
        direction: What `get` returned.
        paths: The paths of the variables.
        axes: Their `Axes`.
    """
    of_each = [direction] * len(paths)
    if isinstance(direction, ByPattern):
        of_each = [direction.of(path) for path in paths]
        for pattern, _ in direction.patterns:
            if not any(re.search(pattern, path) for path in paths):
                warnings.warn(
                    f"direction={{{pattern!r}: …}} matches none of the variables. "
                    f"Their paths are {reprlib.repr(paths)}.",
                    stacklevel=5,
                )
    return [d and d.of_role(a.role) for d, a in zip(of_each, axes, strict=True)]


def _get_one(identifier, argument):
    found = find(identifier, argument, _CLASSES)
    if found is None and identifier is not None:
        raise ValueError(
            f"`{argument}` must be None, {', '.join(map(repr, _CLASSES))}, or an "
            "object of `keras_normopt.directions`. "
            f"Received: {argument}={reprlib.repr(identifier)}"
        )
    return found
