"""The command line of `python -m keras_normopt.experiments`."""

import argparse
import pathlib
import sys
import textwrap

from keras_normopt import experiments, norms
from keras_normopt.scopes import SCOPES

try:
    from tqdm import tqdm

    from keras_normopt.experiments import data, figures, results, runs
    from keras_normopt.experiments.tasks import TASKS
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "pandas", "seaborn", "sklearn", "tqdm"):
        raise
    raise ModuleNotFoundError(
        f'The experiments need {error.name}: pip install "keras_normopt[experiments]"',
        name=error.name,
    ) from error


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
        found.read()  # It may have come between writing and reading.
    finished = found.of(plan)
    if not finished.empty:
        found.summarize(plan, vars(options))
        paths = figures.draw(finished, task, options.out)
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
    with tqdm(total=len(plan), initial=len(plan) - len(left), desc="runs") as bar:
        for run in left:
            if run not in found:  # Another process may have trained it meanwhile.
                found.add(_with_bar(run, task, loaded))
            bar.update()


def _with_bar(run, task, loaded):
    about = f"{run.network}, {results.name_of(vars(run))}, seed {run.seed}"
    steps = run.epochs * -(-len(loaded.x) // run.batch_size)
    # On a terminal only: it would fill a log.
    with tqdm(total=steps, desc=about, leave=False, disable=None) as bar:
        return runs.train(run, task, loaded, bar)


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
        description=experiments.__doc__ and experiments.__doc__.split("\n\n")[1],
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("task", choices=TASKS)
    add(
        "--dataset",
        choices=data.DATASETS,
        default="digits",
        help="default: %(default)s, which needs no file",
    )
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
    add(
        "--networks",
        type=_names,
        metavar="N,...",
        help=f"of rnn: {', '.join(TASKS['rnn'].networks)}; the others have one",
    )
    add(
        "--optimizers",
        type=_optimizers,
        metavar="NAME,...",
        help="names as model.compile takes them; sgd:0.01 sets a learning rate for one",
    )
    add(
        "--norms",
        type=_names,
        metavar="NORM,...",
        help=f"for normalized and clipped ones: {', '.join(norms.__all__)}",
    )
    add(
        "--scopes",
        type=_names,
        default=["variable"],
        metavar="SCOPE,...",
        help=f"for these as well: {', '.join(SCOPES)}; default: variable",
    )
    add("--learning-rates", type=_rates, metavar="LR,...")
    add(
        "--momentum",
        type=_number(float, lambda value: 0 <= value < 1, "at least 0, below 1"),
        default=0.9,
        help="Nesterov momentum of SGD and Muon, normalized, clipped or neither; 0 is "
        "plain SGD; default: %(default)s",
    )
    add(
        "--schedule",
        choices=["constant", "stages"],
        help="stages: as published, a new optimizer with a lower rate for each",
    )
    positive = _number(int, lambda value: value > 0, "a whole number of at least 1")
    add("--epochs", type=positive, metavar="N")
    add("--batch-size", type=positive, metavar="N")
    add("--seeds", type=positive, metavar="N", help="seeds 0 to N - 1")
    add(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        help="for results.csv, summary.json and figures; results that are there stay",
    )
    add(
        "--quick",
        action="store_true",
        help="for minutes at most, other defaults: one seed and learning rate, a tenth "
        "of the images, an epoch for each stage",
    )
    return parser


def _epilog():
    lines = [
        "Lists are separated by commas. KERAS_BACKEND chooses the backend. Defaults "
        "are --seeds 3, --fraction 1, --out experiments/TASK, every network, and:"
    ]
    for name, task in TASKS.items():
        defaults = {
            "--optimizers": ",".join(task.optimizers),
            "--norms": ",".join(task.norms),
            "--learning-rates": ",".join(map(str, task.learning_rates)),
            "--epochs": task.epochs,
            "--batch-size": task.batch_size,
            "--schedule": task.schedule,
        }
        typed = " ".join(f"{option} {value}" for option, value in defaults.items())
        lines.append(f"  {name} {typed}")
    return "\n".join(
        textwrap.fill(line, 80, subsequent_indent=indent, break_on_hyphens=False)
        for line, indent in zip(lines, ["", *["      "] * len(TASKS)], strict=True)
    )


def _names(text):
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must be one or more, not {text!r}")
    return names


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
