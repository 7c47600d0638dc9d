"""Trains with a backup after every epoch; writes the weights, if it comes that far.

Usage: python kill_in_epoch.py BASE DIRECTORY FILE [EPOCH-TO-DIE-IN]
"""

import os
import signal
import sys

import keras
import numpy as np
import training

base, directory, path, *fatal = sys.argv[1:]


class Killer(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if fatal == [str(self.epoch)] and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


model = training.make_model()
model.compile(training.make_optimizer(base, "l2"), "mse")
backup = keras.callbacks.BackupAndRestore(directory, save_freq="epoch")
arguments = {"batch_size": training.BATCH, "epochs": 4, "shuffle": False}
callbacks = [backup, Killer()]
model.fit(training.X, training.Y, callbacks=callbacks, verbose=0, **arguments)
variables = [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables)]
np.savez(path, *variables)
