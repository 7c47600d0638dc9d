"""Trains a plain 30-layer network on scikit-learn's digits, with five optimizers.

These are SGD, Adam, their normalized classes, and `OrthogonalSGD`. The command prints a
table and draws the curves. `python -m keras_normopt.demo --help` lists the options, and
the environment variable `KERAS_BACKEND` chooses the backend. The demo needs the extra
`demo`.
"""

import argparse
import pathlib
import time

import keras

import keras_normopt
from keras_normopt.experiments import styles

try:
    import matplotlib as mpl
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm.keras import TqdmCallback
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "sklearn", "tqdm"):
        raise
    raise ModuleNotFoundError(
        f'The demo needs {error.name}: pip install "keras_normopt[demo]"',
        name=error.name,
    ) from error

LAYERS, UNITS, BATCH_SIZE = 30, 64, 64

# The class, initial learning rate and arguments of each optimizer. The rate is the best
# of .0003, .001, .003, .01 and .03 by the validation accuracy of seed 0. SGD stays at
# chance with each rate.
OPTIMIZERS = {
    "SGD": (keras.optimizers.SGD, 0.01, {"momentum": 0.9}),
    "NormalizedSGD": (keras_normopt.NormalizedSGD, 0.01, {"momentum": 0.9}),
    "Adam": (keras.optimizers.Adam, 0.001, {}),
    "NormalizedAdam": (keras_normopt.NormalizedAdam, 0.01, {}),
    "OrthogonalSGD": (keras_normopt.OrthogonalSGD, 0.01, {}),
}
# Of the seeds 0 to 4, this one is nearest to the medians of all optimizers on JAX.
SEED = 2


def load_data(seed=0):
    """Returns digits in [-1, 1]: training and validation images, then their labels."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(
        (images / 8 - 1).astype("float32"),
        labels.astype("int32"),
        test_size=300,
        random_state=seed,
        stratify=labels,
    )


def make_model():
    """Makes dense layers only. No normalization and no shortcuts help the gradient."""
    hidden = [keras.layers.Dense(UNITS, "relu") for _ in range(LAYERS - 1)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10)])


def train(name, data, epochs, seed=SEED):
    """Returns the history of one training, and how many seconds it took."""
    x, x_validation, y, y_validation = data
    keras.utils.set_random_seed(seed)
    make_optimizer, learning_rate, arguments = OPTIMIZERS[name]
    # A normalized step does not shrink with the gradient, so the learning rate shrinks.
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate, epochs * -(-len(x) // BATCH_SIZE)
    )
    model = make_model()
    model.compile(
        make_optimizer(schedule, **arguments),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    start = time.perf_counter()
    history = model.fit(
        x,
        y,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=(x_validation, y_validation),
        verbose=0,
        callbacks=[TqdmCallback(verbose=0, desc=f"{name:>14}")],
    )
    return history.history, time.perf_counter() - start


def table(results):
    """Yields the last epoch of each training, as lines of text."""
    columns = ("loss", "accuracy", "val_loss", "val_accuracy")
    yield f"{'optimizer':14}  " + "  ".join(f"{c:>12}" for c in (*columns, "seconds"))
    for name, (history, seconds) in results.items():
        last = [f"{history[column][-1]:12.3f}" for column in columns]
        yield f"{name:14}  " + "  ".join([*last, f"{seconds:12.1f}"])


def draw(results, path):
    """Draws loss and accuracy over the epochs into a PNG file."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = styles.of(results)
    figure, panels = plt.subplots(1, 2, figsize=(7.3, 3.7), layout="constrained")
    for panel, column, label in (
        (panels[0], "loss", "training loss"),
        (panels[1], "val_accuracy", "validation accuracy"),
    ):
        for name, (history, _) in results.items():
            epochs = range(1, len(history[column]) + 1)
            panel.plot(epochs, history[column], label=name, markersize=4, **found[name])
        panel.set(xlabel="epoch", ylabel=label, ylim=(0, None))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[1].set_ylim(0, 1)
    figure.legend(
        *panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    figure.suptitle(f"{LAYERS} plain layers on scikit-learn's digits")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments=None):
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m keras_normopt.demo",
        description=__doc__.partition("\n")[0] if __doc__ else None,
    )
    parser.add_argument(
        "--epochs", type=int, default=20, help="default: %(default)s", metavar="N"
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="default: %(default)s", metavar="N"
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("normalized_optimizers.png"),
        help="the picture of the curves; default: %(default)s",
        metavar="FILE",
    )
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, not {options.epochs}")
    data = load_data()
    print(f"{LAYERS} layers, {len(data[0])} images, backend {keras.backend.backend()}")
    results = {
        name: train(name, data, options.epochs, options.seed) for name in OPTIMIZERS
    }
    print(*table(results), sep="\n")
    draw(results, options.output)
    print(f"The curves are in {options.output}")


if __name__ == "__main__":
    main()
