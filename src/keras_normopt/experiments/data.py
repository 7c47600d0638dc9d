"""The data sets: the digits that scikit-learn embeds, MNIST and CIFAR-10."""

import dataclasses
import pathlib
import zipfile

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DATASETS = ("digits", "mnist", "cifar10")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CLASSES = 10


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
            f"keras.datasets could not provide {name}: {error}. Without a network, "
            f"pass --data-dir with a directory that holds {name}.npz, or "
            "--dataset digits."
        ) from error
    return *train, *test


def _read(path):
    expected = f"Expected a NumPy archive with the arrays {', '.join(ARRAYS)}."
    if not path.is_file():
        raise DataError(
            f"Looked for {path.name} in {path.parent.resolve()}: no such file. "
            f"{expected}"
        )
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile("no archive, or cut off")
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in ARRAYS if name in archive}
    except Exception as error:  # Whatever reading a damaged file fails with.
        raise DataError(f"{path} is damaged: {error}. {expected}") from error
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}. {expected}")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if not (
            x.ndim in (3, 4)
            and x.shape[1:] == arrays["x_train"].shape[1:]
            and x.dtype == np.uint8
            and len(x) == y.size > 0
            and np.isin(y, range(CLASSES)).all()
        ):
            raise DataError(
                f"{path} is damaged: x_{part} is {x.dtype} of shape {x.shape}, "
                f"y_{part} {y.dtype} of shape {y.shape}. Expected images, all of one "
                f"size, as uint8, and for each a label from 0 to {CLASSES - 1}."
            )
    return [arrays[name] for name in ARRAYS]
