"""Replaces the gradients of matrices by their orthogonal factors."""

import math
import reprlib
from typing import Any

from keras_normopt._backend.tensors import transposed
from keras_normopt._backend.tracing import fold
from keras_normopt._transforms.config import config_of, is_real
from keras_normopt._transforms.direction import (
    RMS,
    Direction,
    checked_scale,
    get_direction,
    unit_vectors,
)
from keras_normopt._transforms.vector_directions import Rows

JORDAN = (3.4445, -4.7750, 2.0315)
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_ROWS = Rows("operator")
_NAMED: dict[str, Any] = {"quintic": QUINTIC, "jordan": JORDAN}


class Orthogonal(Direction):
    """The orthogonal factor of each kernel's gradient.

    A kernel's gradient u is a matrix (inputs | outputs) with the singular value
    decomposition U S Vᵀ:

        u ← scale · U Vᵀ · min(1, max |u| / norm_epsilon)

    The singular values become nearly equal. This is steepest descent in the spectral
    norm. Applied to the momentum, it is Muon. The layer that created a kernel decides
    which axes are inputs: see the argument `axes` of the optimizer. Each gate and each
    group is a separate matrix.

    Newton-Schulz iteration computes U Vᵀ with matrix products only, in float32 (float64
    for float64 gradients), at any magnitude of u:

        X ← u / ‖u‖₂,  then X ← aX + (bA + cA²)X with A = XXᵀ, for each (a, b, c)

    With the default coefficients, singular values of at least .005 ‖u‖₂ end between .95
    and 1.15. Values below about .002 ‖u‖₂ shrink in proportion. A matrix of zeros stays
    zero, and a matrix with a NaN becomes NaN.

    Args:
        scale: The singular values of a step, for a kernel of `in` inputs and `out`
            outputs. `None`: 1. `"original"`: √max(1, out / in).
            `"match_rms_adamw"`: .2 √max(in, out), so a step of full rank has the root
            mean square .2. `"operator"`: √(out / in). A convolution counts its spatial
            entries as inputs. Defaults to `"original"`.
        coefficients: The polynomials. `"quintic"`: five triples. `"jordan"`:
            (3.4445, −4.7750, 2.0315), with results between .68 and 1.15 for singular
            values of at least .005 ‖u‖₂. Or a triple (a, b, c), or a list of triples.
            Defaults to `"quintic"`.
        steps: Integer of at least 1, or `None`: the number of polynomials to apply. A
            single triple repeats. A longer list is cut off. The last triple of a
            shorter list repeats. Defaults to `None`: the length of the list, or 5 for a
            single triple.
        embeddings: The direction of embeddings: `None` for their raw gradient, a name,
            or an object of `keras_normopt.directions`. Defaults to `Rows("operator")`,
            which gives each row a root mean square of 1.
        vectors: The direction of biases, gains and scalars, as for `embeddings`.
            Defaults to `None`, their raw gradient.

    Raises:
        ValueError: If an argument is not as above.

    Example:
        >>> import keras_normopt
        >>> from keras_normopt import directions
        >>> direction = directions.Orthogonal(scale="operator")
        >>> keras_normopt.OrthogonalSGD(0.03, direction=direction)
        OrthogonalSGD(learning_rate=0.03, direction=Orthogonal(scale='operator'))

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
    unit = "singular values"

    def __init__(
        self,
        scale: str | None = "original",
        coefficients: Any = "quintic",
        steps: int | None = None,
        embeddings: Any = _ROWS,
        vectors: Any = None,
    ) -> None:
        choices = ("original", "match_rms_adamw", "operator")
        self.scale = checked_scale(scale, choices)
        self.coefficients = _checked_coefficients(coefficients)
        self.steps = _checked_steps(steps)
        self.embeddings = get_direction(embeddings, "embeddings")
        self.vectors = get_direction(vectors, "vectors")

    def get_config(self):
        """Returns the arguments, by name."""
        return {
            "scale": self.scale,
            "coefficients": self.coefficients,
            "steps": self.steps,
            "embeddings": config_of(self.embeddings),
            "vectors": config_of(self.vectors),
        }

    def of_role(self, role):
        return {"kernel": self, "embedding": self.embeddings, "vector": self.vectors}[
            role
        ]

    def point(self, stack, axes, floor, factor):
        n, *shape = stack.shape
        unit, shrinkage = unit_vectors(axes.to_matrices(stack), (1, 2), floor)
        # Transposes after the reductions above, because XLA copies a tensor that it
        # reduces in another order.
        is_tall = unit.shape[1] > unit.shape[2]
        unit = transposed(unit) if is_tall else unit
        result = newton_schulz(unit, self._polynomials())
        result = transposed(result) if is_tall else result
        result = result * (shrinkage * (self.length(axes, shape) * factor))
        return axes.from_matrices(result, n, shape)

    def _polynomials(self):
        named = isinstance(self.coefficients, str)
        triples = _NAMED[self.coefficients] if named else self.coefficients
        if is_real(triples[0]):
            return [triples] * (self.steps or 5)
        steps = self.steps or len(triples)
        return [triples[min(i, len(triples) - 1)] for i in range(steps)]

    def length(self, axes, shape):
        _, inputs, outputs = axes.sizes(shape)
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
        ValueError: If `coefficients` is none of these.
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
    is_valid = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
    if steps is not None and not is_valid:
        raise ValueError(
            "`steps` must be None or an integer of at least 1. "
            f"Received: steps={reprlib.repr(steps)}"
        )
    return steps


def newton_schulz(matrices, polynomials):
    """Moves singular values towards 1 by odd polynomials of the matrices.

    X ← aX + (bA + cA²)X with A = XXᵀ.

    Args:
        matrices: Tensor of shape `(n, rows, columns)` with rows ≤ columns. Frobenius
            norms are at most 1.
        polynomials: List of triples (a, b, c), one for each iteration.
    """

    def step(x, a, b, c):
        # Not `ops.matmul`, which computes float64 in float32 on PyTorch.
        gram = x @ transposed(x)
        return a * x + (b * gram + c * (gram @ gram)) @ x

    # A product of matrices compiles twice as fast as one of stacks of size 1.
    is_alone = matrices.shape[0] == 1
    result = fold(step, matrices[0] if is_alone else matrices, polynomials)
    return result[None] if is_alone else result
