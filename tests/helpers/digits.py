"""Loads the digits of scikit-learn, scaled for a classifier."""

from sklearn.datasets import load_digits


def digits():
    images, labels = load_digits(return_X_y=True)
    return (images / 8 - 1).astype("float32"), labels.astype("int32")
