"""Prepares sparse gradients, so that they are normalized like dense tensors.

On TensorFlow the gradient of an embedding is a `tf.IndexedSlices`: rows and their
indices. Rows with the same index are summed first, because the norm of parts is not the
norm of their sum. Norms use only these rows. A large table's dense gradient takes a
thousand times as long.
"""

import keras
from keras import ops

_ON_TORCH = keras.backend.backend() == "torch"

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def prepare(gradient, variable):
        """Sums the rows of each index, and sets the variable's shape."""
        if not isinstance(gradient, tf.IndexedSlices):
            return tf.ensure_shape(gradient, variable.shape)
        indices, positions = tf.unique(gradient.indices)
        values = tf.math.unsorted_segment_sum(
            gradient.values, positions, tf.shape(indices)[0]
        )
        rows, *rest = variable.shape
        return tf.IndexedSlices(
            tf.ensure_shape(values, [None, *rest]), indices, tf.constant([rows, *rest])
        )

    def is_sparse(gradient):
        return isinstance(gradient, tf.IndexedSlices)

    def densify(gradient):
        """Converts a sparse gradient or a variable to a dense tensor."""
        return tf.convert_to_tensor(gradient)

    def rows_of(gradient):
        """Returns the rows that a sparse gradient stores, and the number of all rows.

        For a dense gradient or a variable, it returns the whole tensor and `None`.
        """
        if is_sparse(gradient):
            return gradient.values, gradient.shape[0]
        return densify(gradient), None

    def map_values(function, gradient):
        """Applies a function that maps 0 to 0. Sparse gradients stay sparse."""
        if not isinstance(gradient, tf.IndexedSlices):
            return function(gradient)
        return tf.IndexedSlices(
            function(gradient.values), gradient.indices, gradient.dense_shape
        )

else:

    def prepare(gradient, variable):
        """Converts a gradient, even a sparse array of JAX, to a dense tensor."""
        if _ON_TORCH and ops.is_tensor(gradient):  # Conversion is slow.
            return gradient
        return ops.convert_to_tensor(gradient, sparse=False)

    def is_sparse(gradient):
        return False

    def densify(gradient):
        return gradient

    def rows_of(gradient):
        return gradient, None

    def map_values(function, gradient):
        return function(gradient)
