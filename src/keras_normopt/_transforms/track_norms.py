"""Tracks norms of gradients, weights and updates, for logs."""

import copy
from typing import Any

import numpy as np
from keras import ops

from keras_normopt._backend.devices import constant_on_device_of, to_device_of
from keras_normopt._backend.tensors import cast
from keras_normopt._blocks.gradients import l2_norms
from keras_normopt._blocks.partition import make_unique
from keras_normopt.norms import l2

#: The name of the l2 norm of all variables together, beside the names of blocks.
TOTAL = "total"


class Statistics:
    """Values of the last step, and their means and largest values over several steps.

    Variables of the optimizer hold them, so they stay correct in compiled steps, in
    several steps per execution, and after loading.

    Args:
        name: The prefix of the variables' names.
        names: List of the names of the values.
        add_variable: Callable like `add_variable` of an optimizer.
    """

    def __init__(self, name, names, add_variable):
        self.names = names
        self._slice = slice(None)
        shape = (len(names),)
        self._last = add_variable(f"{name}_last", shape=shape, dtype="float32")
        self._mean = add_variable(f"{name}_mean", shape=shape, dtype="float32")
        self._max = add_variable(f"{name}_max", shape=shape, dtype="float32")
        self._count = add_variable(f"{name}_count", shape=(), dtype="float32")

    def view(self, names, start):
        """Returns a view of some of the values, under other names.

        Args:
            names: List of the names.
            start: The position of the first value.
        """
        view = copy.copy(self)
        view.names, view._slice = names, slice(start, start + len(names))
        return view

    def add_step(self, values, is_counted=None):
        """Adds the values of one step.

        Args:
            values: Vector of the values.
            is_counted: Scalar boolean tensor, whether the step counts. `None` counts
                every step.
        """
        count = ops.add(self._count, 1.0)
        change = ops.divide(ops.subtract(values, self._mean), count)
        new = [
            (self._last, values),
            (self._mean, ops.add(self._mean, change)),
            (self._max, ops.maximum(self._max, values)),
            (self._count, count),
        ]
        for variable, value in new:
            if is_counted is not None:
                value = ops.where(is_counted, value, ops.convert_to_tensor(variable))
            variable.assign(value)

    @property
    def tensor(self):
        """The values of the last step, as a vector."""
        return ops.convert_to_tensor(self._last)

    @property
    def last(self):
        """The values of the last step, by name."""
        return self._read(self._last)

    @property
    def mean(self):
        """The means over the steps since the last reset, by name."""
        return self._read(self._mean)

    @property
    def max(self):
        """The largest values over the steps since the last reset, by name."""
        return self._read(self._max)

    @property
    def count(self):
        """The number of steps since the last reset."""
        return int(ops.convert_to_numpy(self._count))

    def reset(self):
        """Resets the means, the largest values and the count."""
        for variable in (self._mean, self._max, self._count):
            variable.assign(np.zeros(variable.shape, "float32"))

    def _read(self, variable):
        values = ops.convert_to_numpy(variable)[self._slice]
        return dict(zip(self.names, values.tolist(), strict=True))


class NormTracker:
    """Keeps the norms of each block and of all variables together.

    Args:
        blocks: List of the names of the blocks.
        add_variable: Callable like `add_variable` of an optimizer.
        clips: Whether to keep how often each block was clipped.
        skips: Whether to keep how often each block was skipped.
        updates: Whether to keep the norms of weights and updates, and their ratios.

    Attributes:
        blocks: The names of the blocks.
        names: The names of the blocks, and of the total.
        statistics: Dict of `Statistics`. `"gradients"` has the norms of gradients. If
            updates are kept, `"weights"` and `"updates"` have the l2 norms of weights
            and updates, and `"ratios"` has ‖update‖ / ‖weights‖, or 0 if all weights
            are 0.
        shares: Dict from `"clipped"` and `"skipped"` to variables. A variable has the
            share of steps in which each block was clipped or skipped. Without `clips`
            or `skips`, the dict lacks that name.
    """

    def __init__(self, blocks, add_variable, clips=False, skips=False, updates=False):
        self.blocks = blocks
        self.names = make_unique([*blocks, TOTAL])
        self.statistics = {
            "gradients": Statistics("gradient_norm", self.names, add_variable)
        }
        self._statistics_of_updates: Any = None
        if updates:
            # In one vector, because each operation is slow on PyTorch.
            whole = Statistics("update_norm", self.names * 3, add_variable)
            self._statistics_of_updates = whole
            for i, kind in enumerate(("weights", "updates", "ratios")):
                view = whole.view(self.names, i * len(self.names))
                self.statistics[kind] = view
        self.shares = {
            name: add_variable(f"{name}_share", shape=(len(blocks),), dtype="float32")
            for name, is_kept in (("clipped", clips), ("skipped", skips))
            if is_kept
        }

    @property
    def _gradients(self):
        return self.statistics["gradients"]

    def update(self, gradients, norm, is_shared=True):
        """Adds the norms of one step.

        Args:
            gradients: The `Gradients`.
            norm: The tracked `Norm`. Norms of a block's units are averaged.
            is_shared: Whether something else in the step measures the same norms.
        """
        each = None
        if norm is l2.norm and not is_shared:
            each = gradients.l2_norms_at_once()
        if each is None:
            norms = self._norms_with_total(gradients, norm)
        else:
            norms = self._with_total(cast(each, "float32")[None], gradients.blocks)[0]
        self._gradients.add_step(norms)

    def update_share(self, name, gradients, packed):
        """Adds which norms of a step were clipped or skipped. Call it after `update`.

        Args:
            name: `"clipped"` or `"skipped"`.
            gradients: The `Gradients`.
            packed: Packed booleans. Those of a block's units are averaged.
        """
        share, count = self.shares[name], self._gradients._count
        change = self._block_means(gradients, packed) - share
        share.assign(share + change / count)

    def add_update_norms(self, weights, updates, blocks, is_counted=None):
        """Adds the norms of weights before a step, and of their updates.

        Args:
            weights: List of tensors.
            updates: List of tensors.
            blocks: Dict from the indices of blocks to lists of positions in `weights`.
            is_counted: Scalar boolean tensor, whether the step was made. `None` if no
                step is skipped.
        """
        norms = cast(l2_norms([*weights, *updates]), "float32")
        norms = ops.reshape(norms, (2, -1))
        norms = self._with_total(norms, blocks)
        weight_norms, update_norms = norms[0], norms[1]
        is_zero = ops.equal(weight_norms, 0)
        ratios = update_norms / ops.where(
            is_zero, ops.ones_like(weight_norms), weight_norms
        )
        ratios = ops.where(is_zero, ops.zeros_like(ratios), ratios)
        self._statistics_of_updates.add_step(
            ops.concatenate([weight_norms, update_norms, ratios]), is_counted
        )

    def _with_total(self, norms, blocks):
        """Returns the l2 norms of all blocks, and of all tensors together.

        Args:
            norms: Tensor of shape `(n, tensors)`, n norms of each tensor.
            blocks: Dict from the indices of blocks to lists of positions of tensors.
        """
        members = [blocks.get(number, []) for number in range(len(self.blocks))]
        return ops.concatenate(
            [_group_norms(norms, members), _row_norms(norms)], axis=1
        )

    def _norms_with_total(self, gradients, norm):
        """Returns a vector: the norm of each block, and of all gradients together."""
        norms = self._block_means(gradients, gradients.norms(norm))
        total = to_device_of(cast(gradients.total(), "float32"), norms)
        return ops.append(norms, total)

    def _block_means(self, gradients, packed):
        """Returns the mean of packed values for each block. It is 0 without values."""
        values = [cast(value, "float32") for value in packed]
        means = to_device_of(gradients.block_means(values), self._gradients.tensor)
        return _order_by_number(means, gradients.numbers, len(self.blocks))

    @property
    def last(self):
        """The norms of the gradients of the last step, `{block: float}`."""
        return self._gradients.last

    @property
    def mean(self):
        """The mean norms of gradients since the last reset, `{block: float}`."""
        return self._gradients.mean

    @property
    def max(self):
        """The largest norms of gradients since the last reset, `{block: float}`."""
        return self._gradients.max

    @property
    def clipped(self):
        """The share of steps since the last reset that were clipped, `{block: float}`.

        Empty if nothing clips.
        """
        return self._share("clipped")

    @property
    def skipped(self):
        """The share of steps since the last reset that were skipped, by block.

        Empty if nothing skips.
        """
        return self._share("skipped")

    def _share(self, name):
        if name not in self.shares:
            return {}
        values = ops.convert_to_numpy(self.shares[name]).tolist()
        return dict(zip(self.blocks, values, strict=True))

    @property
    def count(self):
        """The number of steps since the last reset."""
        return self._gradients.count

    def reset(self):
        """Resets all means, largest values, counts and shares."""
        for one in self.statistics.values():
            one.reset()
        for variable in self.shares.values():
            variable.assign(np.zeros(variable.shape, "float32"))


def _order_by_number(values, numbers, count):
    """Orders values by the index of their block. Blocks without a value get 0.

    Args:
        values: Vector.
        numbers: List of the index of each value's block.
        count: How many blocks there are.
    """
    place = {number: i for i, number in enumerate(numbers)}
    indices = [place.get(number, len(place)) for number in range(count)]
    padded = ops.append(values, to_device_of(ops.zeros((1,)), values))
    return ops.take(padded, constant_on_device_of(indices, "int32", values))


def _group_norms(rows, groups):
    """Returns the l2 norm of each group of entries, in each row.

    Args:
        rows: Tensor of shape `(n, entries)`.
        groups: List of lists of positions in a row. An empty list has norm 0.
    """
    count = rows.shape[1]
    if not groups or groups == [[i] for i in range(count)]:
        return rows[:, : len(groups)]
    longest = max(1, *map(len, groups))
    # The position after the last entry holds a 0.
    padded = [[*group, *[count] * (longest - len(group))] for group in groups]
    zeros = ops.zeros_like(rows[:, :1])
    rows = ops.concatenate([rows, zeros], axis=1)
    members = ops.take(rows, constant_on_device_of(padded, "int32", rows), axis=1)
    return _row_norms(members)[..., 0]


def _row_norms(rows):
    """Returns the l2 norm along the last axis, even if its squares overflow."""
    # `l2` would first try without the scale, and check the result.
    largest = ops.amax(rows, axis=-1, keepdims=True)
    scale = largest + ops.cast(ops.equal(largest, 0), rows.dtype)
    unit = rows / scale
    return scale * ops.sqrt(ops.sum(unit * unit, axis=-1, keepdims=True))
