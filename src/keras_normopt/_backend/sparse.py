"""What sparse gradients need before they can be normalized as any other tensor.

On TensorFlow the gradient of an embedding is a `tf.IndexedSlices`, rows and their
indices. An index may stand there several times, and its rows are to be summed: a norm
taken over the repeats apart would be that of another gradient. Norms are reduced over
these rows alone, since the dense gradient of a large table takes a thousand times as
long.
"""

import keras
from keras import ops

_ON_TORCH = keras.backend.backend() == "torch"

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def prepare(gradient, variable):
        """Makes every index stand there once and the shape known, the variable's."""
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
        """Turns a sparse gradient, or a variable, into the tensor it stands for."""
        return tf.convert_to_tensor(gradient)

    def rows_of(gradient):
        """The rows that a sparse gradient holds, and how many there are with others.

        Of a dense gradient, or a variable, it is the whole tensor, and `None`.
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
        """Makes a tensor of what Keras takes for one, JAX's sparse arrays included."""
        if _ON_TORCH and ops.is_tensor(gradient):  # For many, conversion takes long.
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
