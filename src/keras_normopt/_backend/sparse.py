"""Prepares sparse gradients, so that they are normalized like any other tensor.

On TensorFlow the gradient of an embedding is a `tf.IndexedSlices`: rows, and their
indices. Rows of a repeated index are summed first, because the norm of the parts is not
the norm of their sum. Norms are computed from these rows alone. The dense gradient of a
large table takes a thousand times as long.
"""

import keras
from keras import ops

_ON_TORCH = keras.backend.backend() == "torch"

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def prepare(gradient, variable):
        """Makes indices unique, and sets the shape to that of the variable."""
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
        """Converts a sparse gradient, or a variable, to a dense tensor."""
        return tf.convert_to_tensor(gradient)

    def rows_of(gradient):
        """Returns the rows that a sparse gradient holds, and the number of all rows.

        For a dense gradient, or a variable, it returns the whole tensor and `None`.
        """
        if is_sparse(gradient):
            return gradient.values, gradient.shape[0]
        return densify(gradient), None

    def map_values(function, gradient):
        """Applies a function that keeps zeros; a sparse gradient stays sparse."""
        if not isinstance(gradient, tf.IndexedSlices):
            return function(gradient)
        return tf.IndexedSlices(
            function(gradient.values), gradient.indices, gradient.dense_shape
        )

else:

    def prepare(gradient, variable):
        """Converts a gradient to a tensor, JAX's sparse arrays included."""
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
