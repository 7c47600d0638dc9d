"""Normalization of a list of gradients, each by itself, without an optimizer."""

from keras_normopt.normalization import floored, rescale


def normalize(gradients, norm, epsilon):
    blocks = [[i] for i in range(len(gradients))]
    result, _ = rescale(gradients, blocks, norm, lambda value: floored(value, epsilon))
    return result
