"""Parses and runs the command `python -m keras_normopt.experiments`."""

import argparse
import functools
import importlib
import itertools
import os
import pathlib
import sys
import textwrap

from keras_normopt import experiments, norms
from keras_normopt._blocks.partition import SCOPES

with experiments.needing_extra():
    import matplotlib as mpl

    from keras_normopt.experiments import comparing, objective, runs, transferring
    from keras_normopt.experiments.published import data, overview
    from keras_normopt.experiments.published.tasks import TASKS

MAP = "map"
PUBLISHED_OPTIONS = ("dataset", "data_dir", "fraction", "networks", "schedule")


def main(arguments=None):
    """Runs the command, and returns its exit status."""
    parser = _make_parser()
    options = parser.parse_args(arguments)
    if options.task == MAP and options.own is None:
        return _write_map(parser, options)
    is_one_given = (options.task is None) != (options.own is None)
    if not is_one_given or options.task == MAP:
        parser.error(f"give either one of {', '.join(TASKS)}, or your own --task")
    try:
        subjects = (
            _own_subjects(options) if options.own else _published_subjects(options)
        )
        plan: dict[runs.Run, object] = {}
        for subject in subjects:
            plan |= runs.plan(
                subject,
                options.optimizers,
                options.learning_rates,
                seeds=options.seeds,
                epochs=options.epochs,
                norms=options.norms,
                scopes=options.scopes,
                momentum=options.momentum,
            )
        comparison = _comparison_class(options, subjects)(
            plan,
            options.out,
            options.monitor,
            options.mode,
            arguments=vars(options),
            epoch=subjects[0].epoch,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    try:
        comparison.train()
        status = 0
    except KeyboardInterrupt:
        status = 130  # Shells use this status after Ctrl+C.
        comparison.results.read()  # The interrupt may have come just before it.
    if len(comparison.rows):
        mpl.use("agg")
        comparison.write()
        print(comparison, *comparison.paths, sep="\n")
        if options.coordinates and not status:
            print("", comparison.coordinates().to_string(), sep="\n")
    if status:
        print(
            f"Interrupted with {sum(run in comparison.results for run in plan)} of "
            f"{len(plan)} runs in {comparison.results.path}. To continue, run the same "
            "command again.",
            file=sys.stderr,
        )
    return status


def _comparison_class(options, subjects):
    """Returns the constructor of `Transfer` for several sizes, else of `Comparison`.

    Raises:
        ValueError: If an option needs several sizes, or does not allow them.
    """
    size_name = "size" if options.sizes else options.task and TASKS[options.task].size
    if not size_name or len({name for s in subjects for name in s.networks}) < 2:
        if options.coordinates:
            raise ValueError("--coordinates needs a task with two or more sizes")
        return comparing.Comparison
    if len(options.batch_size or [None]) > 1:
        raise ValueError(
            "--batch-size must be one number if there are several sizes. "
            f"Received: {','.join(map(str, options.batch_size))}"
        )
    return functools.partial(
        transferring.Transfer,
        subjects=subjects,
        optimizers=options.optimizers,
        size=size_name,
    )


def _write_map(parser, options):
    """Compares the results in all directories. Returns the exit status."""
    try:
        overview.write(options.out or pathlib.Path("experiments"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def _published_subjects(options):
    """Fills in the defaults of a published task. Returns its subjects."""
    if options.sizes:
        raise ValueError("--sizes needs --task. Published tasks have --networks")
    task = TASKS[options.task]
    quick = {
        "epochs": len(task.stages),
        "learning_rates": task.learning_rates[:1],
        "seeds": 1,
        "fraction": 0.1,
    }
    defaults = {
        "dataset": next(iter(task.datasets), None),
        "networks": list(task.networks),
        "optimizers": comparing.parse(task.optimizers),
        "seeds": 3,
        "fraction": 1.0,
        "out": pathlib.Path("experiments") / options.task,
    }
    _fill_in(options, vars(task) | defaults | (quick if options.quick else {}))
    return task.subjects(options)


def _own_subjects(options):
    """Loads the user's task, and fills in defaults. Returns its subjects."""
    given = [name for name in PUBLISHED_OPTIONS if getattr(options, name) is not None]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(
            f"{names} cannot be combined with --task. Use only one of the two"
        )
    make_model, fit_arguments = load_task(options.own)
    test_data = fit_arguments.pop("test_data", None)
    defaults = {
        "optimizers": comparing.parse(comparing.OPTIMIZERS),
        "norms": [None],
        "learning_rates": list(comparing.LEARNING_RATES),
        "seeds": 3,
        "epochs": fit_arguments.pop("epochs", 10),
        "out": pathlib.Path("experiments") / options.own.replace(":", "."),
    }
    quick = {"seeds": 1, "epochs": 1, "learning_rates": [0.01]}
    _fill_in(options, defaults | (quick if options.quick else {}))
    if options.sizes:
        arguments = fit_arguments | _without_none(
            batch_size=(options.batch_size or [None])[0]
        )
        return transferring.subjects_of(make_model, options.sizes, arguments, test_data)
    return [
        comparing.subject_of(
            make_model, fit_arguments | _without_none(batch_size=size), test_data
        )
        for size in options.batch_size or [None]
    ]


def _without_none(**arguments):
    return {name: value for name, value in arguments.items() if value is not None}


def load_task(name):
    """Calls the function that `--task module:function` names.

    Raises:
        ValueError: If the function is missing, or does not return a function and
            arguments of `fit`.
    """
    module, _, function = name.partition(":")
    form = (
        "--task must be MODULE:FUNCTION. For example, my_module:my_task is the "
        "function my_task of my_module.py in the current directory."
    )
    if not (module and function):
        raise ValueError(f"{form} Received: {name}")
    # `python -P` leaves out this directory, and so does a test that calls `main`.
    sys.path.insert(0, os.getcwd())
    try:
        task = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{form} Received: {name}, but there is no module {module} in "
            f"{os.getcwd()} or among the installed packages."
        ) from error
    except AttributeError as error:
        raise ValueError(f"{form} Received: {name}, but {error}.") from error
    finally:
        sys.path.remove(os.getcwd())
    found = task() if callable(task) else task
    if not (
        isinstance(found, tuple)
        and len(found) == 2
        and callable(found[0])
        and isinstance(found[1], dict)
        and "x" in found[1]
    ):
        raise ValueError(
            f"{name} must be a function without arguments that returns a tuple "
            "(make_model, fit_arguments). `make_model` is a function that returns a "
            "model. `fit_arguments` is a dictionary of arguments of `fit`, including "
            f"'x'. Received: {found!r}"
        )
    return found[0], {"y": None} | found[1]


def _fill_in(options, defaults):
    for name, value in vars(options).items():
        if value is None:
            setattr(options, name, defaults.get(name))


def _make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m keras_normopt.experiments",
        description=experiments.__doc__ and experiments.__doc__.split("\n\n")[1],
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "task",
        choices=[*TASKS, MAP],
        nargs="?",
        help=f"a published task, or {MAP}: it trains nothing, but compares all results "
        "in directories under --out, and writes map-*.png, map.md and map.csv",
    )
    add(
        "--task",
        dest="own",
        metavar="MODULE:FUNCTION",
        help="your own task: a function that returns `make_model` of `compare`, and a "
        "dictionary of arguments of `fit`",
    )
    add(
        "--sizes",
        type=lambda text: [_parse_size(item) for item in _split_list(text)],
        metavar="N,...",
        help="with --task: compare the best learning rates of these sizes; "
        "`make_model` takes a size",
    )
    add(
        "--coordinates",
        action="store_true",
        help="for several sizes: also show how far the outputs of each layer move in "
        "1 and 10 steps",
    )
    add(
        "--dataset",
        choices=data.DATASETS,
        help="default: a data set that needs no file",
    )
    add(
        "--data-dir",
        type=pathlib.Path,
        metavar="DIR",
        help="directory with mnist.npz or cifar10.npz; without it, keras.datasets "
        "downloads them",
    )
    add(
        "--fraction",
        type=_number_parser(
            float, lambda value: 0 < value <= 1, "above 0 and at most 1"
        ),
        metavar="F",
        help="share of the training data to use",
    )
    add(
        "--networks",
        type=_split_list,
        metavar="N,...",
        help="; ".join(
            f"of {name}: {', '.join(task.networks)}"
            for name, task in TASKS.items()
            if len(task.networks) > 1
        )
        + "; other tasks have one network",
    )
    add(
        "--optimizers",
        type=_parse_optimizers,
        metavar="NAME,...",
        help="names that model.compile takes; sgd:0.01 sets a learning rate, and "
        '"adam(beta_1=0.8, global_clipnorm=1)" sets options',
    )
    add(
        "--norms",
        type=_split_list,
        metavar="NORM,...",
        help=f"for normalized and clipped optimizers: {', '.join(norms.__all__)}",
    )
    add(
        "--scopes",
        type=_split_list,
        default=[None],
        metavar="SCOPE,...",
        help=f"for normalized and clipped optimizers: {', '.join(SCOPES)}; "
        "default: variable",
    )
    add("--learning-rates", type=_parse_rates, metavar="LR,...")
    add(
        "--momentum",
        type=_number_parser(
            float, lambda value: 0 <= value < 1, "at least 0 and below 1"
        ),
        metavar="M",
        help="Nesterov momentum of all SGD and Muon optimizers; 0 is plain SGD; "
        "default: .9, or with --task the optimizer's own",
    )
    add(
        "--schedule",
        choices=["constant", "stages", "cosine", "warmup"],
        help="stages: a new optimizer and a lower rate in each stage, as published; "
        "cosine: decay to zero; warmup: a rise over a tenth of the steps, then cosine",
    )
    positive = _number_parser(
        int, lambda value: value > 0, "a whole number of at least 1"
    )
    add("--epochs", type=positive, metavar="N")
    add(
        "--batch-size",
        type=lambda text: [positive(size) for size in _split_list(text)],
        metavar="N,...",
    )
    add("--seeds", type=positive, metavar="N", help="seeds 0 to N - 1")
    add("--monitor", metavar="METRIC", help="metric to judge by; default: the last")
    add(
        "--mode",
        choices=objective.MODES,
        default="auto",
        help="whether lower or higher is better, if the metric does not say so",
    )
    add(
        "--out",
        type=pathlib.Path,
        metavar="DIR",
        help="for results.csv, summary.json and figures; keeps earlier results",
    )
    add(
        "--quick",
        action="store_true",
        help="defaults that take minutes: one seed, one learning rate, a tenth of the "
        "data, one epoch (for each stage)",
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
            "--batch-size": ",".join(map(str, task.batch_size)),
            "--schedule": task.schedule,
        }
        typed = " ".join(f"{option} {value}" for option, value in defaults.items())
        lines.append(f"  {name} {typed}")
    return "\n".join(
        textwrap.fill(line, 80, subsequent_indent=indent, break_on_hyphens=False)
        for line, indent in zip(lines, ["", *["      "] * len(TASKS)], strict=True)
    )


def _split_list(text):
    # Commas within parentheses are part of a name.
    depth = itertools.accumulate((c == "(") - (c == ")") for c in text)
    separated = (
        "\n" if (c, d) == (",", 0) else c for c, d in zip(text, depth, strict=True)
    )
    names = [name.strip() for name in "".join(separated).split("\n") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"must be one or more values, not {text!r}")
    return names


def _parse_optimizers(text):
    try:
        return comparing.parse(_split_list(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parse_rates(text):
    return [_parse_rate(item) for item in _split_list(text)]


def _number_parser(kind, is_valid, expected):
    def parse(text):
        try:
            value = kind(text)
            valid = is_valid(value)
        except ValueError:
            valid = False
        if not valid:
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text!r}")
        return value

    return parse


def _parse_size(text):
    size = _number_parser(float, lambda value: value > 0, "a number above 0")(text)
    return int(size) if size.is_integer() else size


def _parse_rate(text):
    try:
        return comparing.check_rate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
