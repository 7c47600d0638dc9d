"""Runs the command, and dies half through writing the second run that it trained."""

import os
import runpy
import signal

import pandas as pd

to_csv = pd.DataFrame.to_csv
tables = []


def die_in_the_second(table, path, **options):
    tables.append(table)
    to_csv(table, path, **options)
    if len(tables) == 2:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


pd.DataFrame.to_csv = die_in_the_second
runpy.run_module("keras_normopt.experiments", run_name="__main__")
