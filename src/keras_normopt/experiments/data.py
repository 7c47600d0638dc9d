"""The data sets: the digits that scikit-learn embeds, MNIST and CIFAR-10."""

import dataclasses
import pathlib
import zipfile
import zlib

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DATASETS = ("digits", "mnist", "cifar10")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class DataError(ValueError):
    """A data set that is not there, or not as it should be."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What to train on and what to validate on; images are in [0, 1], with channels."""

    x: np.ndarray
    y: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray


def load(name, directory=None, fraction=1.0):
    """Loads a data set.

    Args:
        name: `"digits"`, `"mnist"` or `"cifar10"`.
        directory: Where `<name>.npz` lies. By default `keras.datasets` downloads it.
            Not used for digits.
        fraction: Number in (0, 1], the share of the training images to train on.

    Raises:
        DataError: If the file is missing, damaged, or holds something else.
    """
    if name == "digits":
        arrays = _digits()
    elif directory is None:
        arrays = _download(name)
    else:
        arrays = _read(pathlib.Path(directory) / f"{name}.npz")
    x, y, x_validation, y_validation = arrays
    # Always the same images, so that seeds and optimizers compare.
    chosen = np.random.default_rng(0).permutation(len(x))
    chosen = chosen[: max(1, round(fraction * len(x)))]
    return Data(
        _scaled(x[chosen]),
        y[chosen].ravel().astype("int32"),
        _scaled(x_validation),
        y_validation.ravel().astype("int32"),
    )


def _scaled(images):
    images = images.astype("float32") / 255
    return images if images.ndim == 4 else images[..., None]


def _digits():
    digits = load_digits()
    x, x_validation, y, y_validation = train_test_split(
        digits.images * (255 / 16),
        digits.target,
        test_size=300,
        random_state=0,
        stratify=digits.target,
    )
    return x, y, x_validation, y_validation


def _download(name):
    try:
        train, test = getattr(keras.datasets, name).load_data()
    except Exception as error:  # Whatever a download fails with.
        raise DataError(
            f"keras.datasets could not provide {name}: {error} Without a network, pass "
            f"--data-dir with a directory that holds {name}.npz, or --dataset digits."
        ) from error
    return *train, *test


def _read(path):
    expected = f"Expected a NumPy archive with the arrays {', '.join(ARRAYS)}."
    try:
        with np.load(path) as archive:
            missing = [name for name in ARRAYS if name not in archive.files]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}. {expected}")
            arrays = [archive[name] for name in ARRAYS]
    except FileNotFoundError as error:
        raise DataError(
            f"Looked for {path.name} in {path.parent.resolve()}: no such file. "
            f"{expected}"
        ) from error
    except (
        OSError,
        EOFError,
        AttributeError,  # An array file instead of an archive.
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise DataError(f"{path} is damaged: {error} {expected}") from error
    for x, y, part in ((*arrays[:2], "train"), (*arrays[2:], "test")):
        if x.ndim not in (3, 4) or len(x) == 0 or y.size != len(x):
            raise DataError(
                f"{path} is damaged: x_{part} has shape {x.shape} and y_{part} "
                f"{y.shape}, which are not images and a label for each."
            )
    return arrays
