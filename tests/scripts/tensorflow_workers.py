"""Runs one of two workers that train every case in a custom loop.

The first worker writes the weights.

Usage: python tensorflow_workers.py FILE, with TF_CONFIG set
"""

import json
import os
import sys

import tensorflow as tf

# The strategy must exist before TensorFlow uses any device.
strategy = tf.distribute.MultiWorkerMirroredStrategy()

import keras
import training

WORKERS = 2
SHARE = training.BATCH // WORKERS
worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
assert strategy.num_replicas_in_sync == WORKERS


def train(case):
    with strategy.scope():
        model = training.make_model()
        optimizer = training.make_optimizer(*case)
        optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y):
        def of_replica(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(keras.losses.mean_squared_error(y, model(x)))
                loss = loss / WORKERS  # Gradients are summed over the replicas.
            variables = model.trainable_variables
            gradients = tape.gradient(loss, variables)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

        strategy.run(of_replica, args=(x, y))

    for x, y in training.batches():
        rows = slice(worker * SHARE, (worker + 1) * SHARE)
        step(tf.constant(x[rows]), tf.constant(y[rows]))
    return training.outcome(model, optimizer)


outcomes = {case: train(case) for case in training.CASES}
if worker == 0:
    training.save(sys.argv[1], outcomes)
