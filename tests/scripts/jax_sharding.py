"""Trains every case with a distribution on four devices and writes the weights.

Usage: python jax_sharding.py (data | model) FILE
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import keras
import training

kind, path = sys.argv[1:]
if kind == "data":
    distribution = keras.distribution.DataParallel()
else:
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"))
    layout = keras.distribution.LayoutMap(mesh)
    layout[".*kernel.*"] = (None, "model")  # Kernels and their slots.
    layout[".*bias.*"] = ("model",)
    distribution = keras.distribution.ModelParallel(
        layout_map=layout, batch_dim_name="batch"
    )
keras.distribution.set_distribution(distribution)

outcomes = {}
for case in training.CASES:
    model = training.fit(case)
    for variable in model.trainable_variables:
        sharding = variable.value.sharding
        assert len(sharding.device_set) == 4
        assert sharding.is_fully_replicated == (kind == "data")
    outcomes[case] = training.outcome(model, model.optimizer)
training.save(path, outcomes)
