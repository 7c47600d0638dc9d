"""Data of which one batch in 200 is spoilt."""

import keras
import numpy as np

STEPS = 200


def random_labels(x, y, rng):
    """The same inputs with labels that say nothing about them."""
    return x, rng.permutation(y)


def large_inputs(x, y, rng):
    """Inputs as of another unit."""
    return 100 * x, y


def nothing(x, y, rng):
    """The same batch, to compare with."""
    return x, y


class Spiked(keras.utils.PyDataset):
    """Batches drawn at random, 200 an epoch, of which the last one is spoilt.

    What is measured after an epoch thus comes right after a spike.

    Args:
        spoil: Function from inputs, targets and a NumPy generator to spoilt ones.
        x, y: Arrays to draw from.
        batch_size: Positive integer.
        seed: Integer; the same one draws the same batches.
    """

    def __init__(self, spoil, x, y, batch_size, seed):
        super().__init__()
        self.spoil, self.x, self.y, self.batch_size = spoil, x, y, batch_size
        self.seed, self.epoch = seed, 0

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, self.epoch, index])
        chosen = rng.integers(0, len(self.x), self.batch_size)
        batch = self.x[chosen], self.y[chosen]
        return self.spoil(*batch, rng) if index == STEPS - 1 else batch

    def on_epoch_end(self):
        self.epoch += 1
