"""Runs the command and kills it in the middle of writing the second run."""

import os
import runpy
import signal

import pandas as pd

to_csv = pd.DataFrame.to_csv
tables = []


def die_in_the_second_run(table, path, **options):
    tables.append(table)
    to_csv(table, path, **options)
    if len(tables) == 2:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


pd.DataFrame.to_csv = die_in_the_second_run
runpy.run_module("keras_normopt.experiments", run_name="__main__")
