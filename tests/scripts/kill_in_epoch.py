"""Trains with a backup after every epoch, and writes the final state.

With a third argument, the script kills itself in that epoch.

Usage: python kill_in_epoch.py DIRECTORY FILE [EPOCH-TO-DIE-IN]
"""

import os
import signal
import sys

import keras
import numpy as np
import training

directory, path, *fatal = sys.argv[1:]


class Killer(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if fatal == [str(self.epoch)] and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


backup = keras.callbacks.BackupAndRestore(directory, save_freq="epoch")
model = training.fit(("Adam", "l2"), epochs=4, callbacks=[backup, Killer()])
np.savez(path, *training.state(model))
