"""Makes data in which one batch of 200 is spoilt."""

import keras
import numpy as np

STEPS = 200


def random_labels(x, y, rng):
    """Returns the inputs with shuffled labels."""
    return x, rng.permutation(y)


def large_inputs(x, y, rng):
    """Returns larger inputs, as if in another unit."""
    return 100 * x, y


def nothing(x, y, rng):
    """Returns the same batch, for comparison."""
    return x, y


class Spiked(keras.utils.PyDataset):
    """Random batches, 200 in each epoch. The last one is spoilt.

    So metrics at the end of an epoch are measured right after a spike.

    Args:
        spoil: Function from inputs, targets and a NumPy generator to a spoilt batch.
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
