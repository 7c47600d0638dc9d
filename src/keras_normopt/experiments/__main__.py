"""The command line of `python -m keras_normopt.experiments`."""

import argparse
import pathlib
import sys

from tqdm import tqdm

from keras_normopt import experiments
from keras_normopt.experiments import data, figures, results, runs
from keras_normopt.experiments.tasks import TASKS


def main(arguments=None):
    """Runs the command, and returns its exit status."""
    parser = _parser()
    options = _complete(parser.parse_args(arguments))
    task = TASKS[options.task]
    try:
        plan = runs.plan(task, options)
        loaded = task.load(options)
        options.out.mkdir(parents=True, exist_ok=True)
        found = results.Results(options.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        _train(plan, task, loaded, found)
        status = 0
    except KeyboardInterrupt:
        status = 130  # As a shell has it.
    finished = found.of(plan)
    if not finished.empty:
        found.summarize(plan, vars(options))
        paths = figures.draw(finished, task.epoch, options.out)
        print(results.table(finished), *paths, sep="\n")
    if status:
        print(
            f"Interrupted with {sum(run in found for run in plan)} of {len(plan)} runs "
            f"in {found.path}. The same command goes on from there.",
            file=sys.stderr,
        )
    return status


def _train(plan, task, loaded, found):
    left = [run for run in plan if run not in found]
    steps = -(-len(loaded.x) // plan[0].batch_size)
    with tqdm(total=len(plan), initial=len(plan) - len(left), desc="runs") as bar:
        for run in left:
            about = f"{run.network}, {results.name_of(vars(run))}, seed {run.seed}"
            with tqdm(total=run.epochs * steps, desc=about, leave=False) as inner:
                found.add(runs.train(run, task, loaded, inner))
            bar.update()


def _complete(options):
    """Fills in the defaults of the task, or those of `--quick`."""
    task = TASKS[options.task]
    quick = {
        "epochs": len(task.stages),
        "learning_rates": task.learning_rates[:1],
        "seeds": 1,
        "fraction": 0.1,
    }
    defaults = {
        "networks": list(task.networks),
        "optimizers": [(name, None) for name in task.optimizers],
        "seeds": 3,
        "fraction": 1.0,
        "out": pathlib.Path("experiments") / options.task,
    }
    defaults = vars(task) | defaults | (quick if options.quick else {})
    for name, value in vars(options).items():
        if value is None:
            setattr(options, name, defaults.get(name))
    return options


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m keras_normopt.experiments",
        description=experiments.__doc__ and experiments.__doc__.partition("\n\n")[2],
        epilog="Lists are separated by commas. KERAS_BACKEND chooses the backend. "
        "Defaults depend on the task.",
    )
    add = parser.add_argument
    add("task", choices=TASKS)
    add("--dataset", choices=data.DATASETS, default="digits", help="%(default)s")
    add(
        "--data-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="where mnist.npz or cifar10.npz lies, which keras.datasets downloads "
        "otherwise",
    )
    add(
        "--fraction",
        type=_number(float, lambda value: 0 < value <= 1, "above 0, at most 1"),
        metavar="F",
        help="share of the training images to train on",
    )
    add("--networks", type=_names, metavar="N,...", help="of rnn: lstm_rows, …")
    add(
        "--optimizers",
        type=_optimizers,
        metavar="NAME,...",
        help="names as model.compile takes them; sgd:0.01 sets a learning rate for one",
    )
    add("--norms", type=_names, metavar="NORM,...", help="for the normalized ones")
    add(
        "--scopes",
        type=_names,
        default=["variable"],
        metavar="SCOPE,...",
        help="for the normalized ones: variable, unit, layer, global",
    )
    add("--learning-rates", type=_rates, metavar="LR,...")
    add(
        "--momentum",
        type=_number(float, lambda value: 0 <= value < 1, "at least 0, below 1"),
        default=0.9,
        help="Nesterov momentum of SGD, normalized or not; 0 is plain SGD; %(default)s",
    )
    add(
        "--schedule",
        choices=["constant", "stages"],
        help="stages: as published, a new optimizer with a lower rate for each",
    )
    positive = _number(int, lambda value: value > 0, "at least 1")
    add("--epochs", type=positive, metavar="N")
    add("--batch-size", type=positive, metavar="N")
    add("--seeds", type=positive, metavar="N", help="seeds 0 to N - 1")
    add("--out", type=pathlib.Path, metavar="DIR", help="default: experiments/TASK")
    add("--quick", action="store_true", help="minutes at most: few images and epochs")
    return parser


def _names(text):
    return [name for name in text.split(",") if name]


def _optimizers(text):
    """Pairs of a name and its own learning rate, or `None`."""
    pairs = (item.partition(":") for item in _names(text))
    return [(name, _rate(rate) if colon else None) for name, colon, rate in pairs]


def _rates(text):
    return [_rate(item) for item in _names(text)]


def _number(kind, holds, expected):
    def parse(text):
        try:
            value = kind(text)
            valid = holds(value)
        except ValueError:
            valid = False
        if not valid:
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}")
        return value

    return parse


_rate = _number(float, lambda value: 0 < value < float("inf"), "above 0")


if __name__ == "__main__":
    sys.exit(main())
