"""Compares optimizers, on the published tasks or on your own model.

Trains a network with several optimizers, norms, learning rates and seeds, and writes
tables and figures. Resumes after an interruption.

Call `keras_normopt.experiments.compare` from Python. Or run the published tasks, or
your own, with `python -m keras_normopt.experiments`; `--help` lists the options. Both
need the extra `experiments`.
"""

import contextlib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_normopt.experiments.comparing import compare
    from keras_normopt.experiments.coordinates import coordinate_check
    from keras_normopt.experiments.transferring import transfer

_MODULES = {
    "compare": "comparing",
    "coordinate_check": "coordinates",
    "transfer": "transferring",
}
__all__ = ["compare", "coordinate_check", "transfer"]

_EXTRA = ("joblib", "matplotlib", "pandas", "seaborn", "sklearn", "tqdm")


@contextlib.contextmanager
def needing_extra():
    """Says what to install if a package of the extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise ModuleNotFoundError(
            f"The experiments need {error.name}: "
            'pip install "keras_normopt[experiments]"',
            name=error.name,
        ) from error


def __dir__():
    return sorted({*globals(), *__all__})


def __getattr__(name):
    # Imports on first use: the package imports this folder, but pandas and seaborn take
    # longer to import than the package.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needing_extra():
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)
