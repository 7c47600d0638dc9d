"""Computes norms in NumPy as they are defined, without Keras and without rescaling.

The oracle computes in `numpy.longdouble`. Its range of exponents is wider than that
of float64. So no intermediate result overflows or underflows.
"""

import numpy as np

EPS = {"float32": np.finfo(np.float32).eps, "float64": np.finfo(np.float64).eps}


def l1(g):
    return np.sum(np.abs(g))


def l2(g):
    return np.sqrt(np.sum(g * g))


def l1_l2(g):
    return (l1(g) + l2(g)) / 2


def avg_l1(g):
    return np.mean(np.abs(g))


def avg_l2(g):
    return np.sqrt(np.mean(g * g))


def avg_l1_l2(g):
    return (avg_l1(g) + avg_l2(g)) / 2


def largest(g):
    return np.max(np.abs(g))


def min_max(g):
    return (np.max(np.abs(g)) + np.min(np.abs(g))) / 2


def std(g, eps=EPS["float32"]):
    deviation = np.sqrt(np.mean((g - np.mean(g)) ** 2))
    return avg_l2(g) if deviation < np.sqrt(eps) * avg_l2(g) else deviation


NORMS = {
    "l1": l1,
    "l2": l2,
    "l1_l2": l1_l2,
    "avg_l1": avg_l1,
    "avg_l2": avg_l2,
    "avg_l1_l2": avg_l1_l2,
    "max": largest,
    "min_max": min_max,
    "std": std,
}


def norm(name, gradient):
    return NORMS[name](np.asarray(gradient, np.longdouble))


def normalize(name, gradient, epsilon=0.0):
    """Returns g / max(norm(g), epsilon). A zero gradient stays zero."""
    gradient = np.asarray(gradient, np.longdouble)
    if not gradient.size:
        return gradient
    divisor = max(norm(name, gradient), np.longdouble(epsilon))
    return gradient / divisor if divisor else gradient


def normalize_units(name, gradient):
    """Normalizes each slice along the last axis. A vector or a scalar is one unit."""
    if gradient.ndim < 2:
        return normalize(name, gradient)
    units = [normalize(name, unit) for unit in np.moveaxis(gradient, -1, 0)]
    return np.stack(units, axis=-1)


def is_near_std_fallback(gradient, eps=EPS["float32"]):
    """Returns whether rounding may decide if `std` falls back to `avg_l2`."""
    g = np.asarray(gradient, np.longdouble)
    deviation = np.sqrt(np.mean((g - np.mean(g)) ** 2))
    return avg_l2(g) / 4 < deviation / np.sqrt(eps) < avg_l2(g) * 4


# Published for five steps. Emerging-Optimizers calls these coefficients "quintic".
QUINTIC = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def polynomial(values, triples):
    for a, b, c in triples:
        values = a * values + b * values**3 + c * values**5
    return values


def orthogonalized(matrix, triples=QUINTIC):
    """Applies the polynomials to the singular values, in float64."""
    matrix = np.asarray(matrix, "float64")
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    norm = np.sqrt(np.sum(s**2))
    return u @ np.diag(polynomial(s / norm if norm else s, triples)) @ v
