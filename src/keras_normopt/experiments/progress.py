"""Shows the progress of a comparison."""

import sys
import time

from tqdm import tqdm

from keras_normopt.experiments import results


class Progress:
    """Shows a bar that counts epochs. Without a terminal, prints a line per run."""

    def __init__(self, plan, unfinished):
        self.total, self.finished = len(plan), len(plan) - len(unfinished)
        self.before, self.start = self.finished, time.perf_counter()
        epochs = sum(run.epochs for run in plan)
        self.bar = tqdm(
            total=epochs,
            initial=epochs - sum(run.epochs for run in unfinished),
            unit="epoch",
            disable=not sys.stderr.isatty(),
        )

    def begin(self, run):
        self.epochs_left = run.epochs
        self.bar.set_description(self._describe(run))

    def on_epoch(self, row):
        self.epochs_left -= 1
        self.bar.update()

    def end(self, run, rows):
        """Counts a finished run. Prints a line about it if there is no bar."""
        self.bar.update(self.epochs_left)  # Epochs that a callback left out.
        about = self._describe(run)
        self.finished += 1
        if self.bar.disable:
            last = rows.iloc[-1]
            metric = last["judged_by"].split(" ", 1)[1]
            left = f"{self._time_left()} left"
            line = f"{about}: {metric} {last[metric]:.4g}, {left}"
            print(line, file=sys.stderr, flush=True)

    def _describe(self, run):
        name = f"{results.name_of(vars(run))} at {run.initial_learning_rate:g}"
        number = f"run {self.finished + 1} of {self.total}"
        return f"{number}: {run.network}, {name}, seed {run.seed}"

    def _time_left(self):
        each = (time.perf_counter() - self.start) / (self.finished - self.before)
        return tqdm.format_interval(each * (self.total - self.finished))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
