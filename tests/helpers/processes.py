"""Runs scripts in separate processes with the current environment."""

import os
import pathlib
import subprocess
import sys

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


def start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, returncode=0):
    """Waits for all processes and returns their output."""
    printed = []
    try:
        for process in processes:
            printed.append(process.communicate(timeout=400)[0])
            assert process.returncode == returncode, printed[-1]
    finally:
        for process in processes:
            process.kill()
    return printed
