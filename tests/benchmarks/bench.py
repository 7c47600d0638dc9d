"""Compares the cost of normalization with stock Keras and with steps written by hand.

`python bench.py out.json` measures on the backend of `KERAS_BACKEND` and writes the
results. `python report.py *.json` makes tables and a figure of them. `nox -s bench`
does both. Times are in seconds, sizes in bytes.
"""

import argparse
import gc
import itertools
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version

import keras
import numpy as np

import steps  # isort: skip
from keras_normopt import (
    ClippedSGD,
    NormalizedSGD,
    OrthogonalSGD,
    RunningNorm,
    WeightNorm,
    norms,
)

NORMS = [name for name in norms.__all__ if name != "linf"]
SCOPES = ["variable", "unit", "layer", "global"]
LIBRARIES = ["keras", "jax", "optax", "tensorflow_cpu", "tensorflow", "torch", "numpy"]


def interleaved(contenders, seconds):
    """Times functions in turn, in a new random order each round.

    pytest-benchmark, pyperf and asv time one function after the other. But only ratios
    count here, and the speed of a machine may drift by more than the goals allow. So
    ratios are fair only between times that are taken side by side.

    Returns:
        The median time of each function, by its name.
    """
    for step in contenders.values():
        step()
        step()
    times = {name: [] for name in contenders}
    order = list(contenders)
    gc.collect()
    gc.disable()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < 5:
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    gc.enable()
    return {name: statistics.median(t) for name, t in times.items()}


def step_times(quick):
    yield from _step_times(steps.sizes(quick) | steps.models(quick), quick)


def busy_times(quick):
    """Times steps while another process keeps each core busy."""
    sizes = steps.models(quick)
    sizes |= {k: v for k, v in steps.sizes(quick).items() if k.endswith("small")}
    run = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(run) for _ in os.sched_getaffinity(0)]
    try:
        yield from _step_times(sizes, quick)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _step_times(sizes, quick):
    modes = {"xla": True}
    if steps.BACKEND == "tensorflow":
        modes["graph"] = False
    for size, shapes in sizes.items():
        grads = steps.gradients(shapes)
        # Frozen paths and dead units have gradients of zeros.
        with_zeros = [grads[0], 0 * grads[1], *grads[2:]]
        for base in steps.BASES:
            for mode, jit in modes.items():
                optimizers = {
                    "stock": steps.stock(base),
                    "clipnorm": steps.stock(base, clipnorm=1.0),
                    "l2": steps.normalized(base),
                    "None": steps.normalized(base, norm=None),
                }
                contenders = {
                    name: steps.make_step(optimizer, shapes, grads, jit)
                    for name, optimizer in optimizers.items()
                }
                zeros = steps.make_step(steps.normalized(base), shapes, with_zeros, jit)
                contenders["l2, zeros"] = zeros
                peer = steps.by_hand(base, shapes, grads)
                if peer:
                    contenders["by hand"] = peer
                first = {name: _seconds(step) for name, step in contenders.items()}
                medians = interleaved(contenders, 1 if quick else 8)
                mode = mode if steps.BACKEND == "tensorflow" else ""
                yield {
                    "size": size,
                    "base": base,
                    "mode": mode,
                    "medians": medians,
                    "first": first,
                }


def _seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def norm_times(quick):
    # Compiling 80 programs for many variables would take too long.
    for size, shapes in steps.sizes(quick or steps.BACKEND != "torch").items():
        grads = steps.gradients(shapes)
        for scope in SCOPES:
            contenders = {
                "reference": steps.make_step(steps.normalized("SGD"), shapes, grads),
            } | {
                name: steps.make_step(
                    steps.normalized("SGD", norm=name, scope=scope), shapes, grads
                )
                for name in NORMS
            }
            medians = interleaved(contenders, 1 if quick else 5)
            yield {"size": size, "scope": scope, "medians": medians}


def option_times(quick):
    """Compares other options with normalizing the gradient by its l2 norm."""
    for size, shapes in steps.models(quick).items():
        grads = steps.gradients(shapes)
        for base in steps.BASES:
            optimizers = {
                "stock": steps.stock(base),
                "l2": steps.normalized(base),
                "update": steps.normalized(base, apply_to="update"),
                "centralize": steps.normalized(base, centralize=True),
                "track_norms": steps.normalized(base, track_norms=True),
                "clipped": steps.clipped(base),
                "WeightNorm": steps.clipped(base, max_norm=WeightNorm(0.01, 1e-3)),
                "RunningNorm": steps.clipped(base, max_norm=RunningNorm()),
            }
            contenders = {
                name: steps.make_step(optimizer, shapes, grads)
                for name, optimizer in optimizers.items()
            }
            first = {name: _seconds(step) for name, step in contenders.items()}
            medians = interleaved(contenders, 1 if quick else 8)
            yield {"size": size, "base": base, "medians": medians, "first": first}


def direction_times(quick):
    """Compares OrthogonalSGD with other Muons on kernels of rank 2, which all take."""
    for size, shapes in steps.kernels(quick).items():
        grads = steps.gradients(shapes)
        optimizers = {
            "Adam": keras.optimizers.Adam(1e-3),
            # `rms_rate` would mix float32 and float64 on TensorFlow.
            "Keras's Muon": keras.optimizers.Muon(1e-3, rms_rate=None),
            "OrthogonalSGD": OrthogonalSGD(1e-3),
        }
        contenders = {
            name: steps.make_step(optimizer, shapes, grads)
            for name, optimizer in optimizers.items()
        }
        peer = steps.muon_by_hand(shapes, grads)
        if peer:
            contenders["peer"] = peer
        first = {name: _seconds(step) for name, step in contenders.items()}
        medians = interleaved(contenders, 1 if quick else 15)
        yield {"size": size, "medians": medians, "first": first}


def embedding_times(quick):
    """Times steps on a large table, of which 256 rows have a gradient.

    Only TensorFlow makes this gradient sparse. The base is plain SGD, because slots of
    other bases are as large as the table.
    """
    if steps.BACKEND != "tensorflow":
        return
    rows = 20_000 if quick else 2_000_000
    optimizers = {"stock": keras.optimizers.SGD(1e-3)}
    optimizers["clipnorm"] = keras.optimizers.SGD(1e-3, clipnorm=1.0)
    for norm in NORMS:
        optimizers[norm] = NormalizedSGD(1e-3, norm=norm)
    for scope in SCOPES[1:]:
        optimizers[f"std, {scope}"] = NormalizedSGD(1e-3, norm="std", scope=scope)
    optimizers["update"] = NormalizedSGD(1e-3, apply_to="update")
    optimizers["track_norms"] = NormalizedSGD(1e-3, track_norms=True)
    optimizers["clipped"] = ClippedSGD(1e-3)
    optimizers["RunningNorm"] = ClippedSGD(1e-3, max_norm=RunningNorm())
    optimizers["WeightNorm"] = ClippedSGD(1e-3, max_norm=WeightNorm())
    contenders = steps.make_embedding_steps(optimizers, rows, width=64, touched=256)
    yield {"rows": rows, "medians": interleaved(contenders, 1 if quick else 60)}


def growth(quick):
    """Times steps with growing numbers of variables and of their entries."""
    numbers = [50, 100] if quick else [125, 250, 500, 1000]
    cases = [(f"{n} variables of 64×64", [(64, 64)] * n) for n in numbers]
    for entries in [10**5, 10**6] if quick else [10**6, 10**7, 10**8]:
        side = round((entries / 4) ** 0.5)
        cases.append((f"4 variables of {side}×{side}", [(side, side)] * 4))
    for name, shapes in cases:
        grads = steps.gradients(shapes)
        contenders, first = {}, {}
        for kind, make in (("stock", steps.stock), ("l2", steps.normalized)):
            contenders[kind] = steps.make_step(make("SGD"), shapes, grads)
            first[kind] = _seconds(contenders[kind])
        medians = interleaved(contenders, 1 if quick else 6)
        yield {
            "case": name,
            "variables": len(shapes),
            "entries": steps.count(shapes),
            "medians": medians,
            "first": first,
        }


def memory(quick):
    if steps.BACKEND == "tensorflow":
        return
    for size, shapes in steps.sizes(quick).items():
        for name, make in {
            "stock": lambda: steps.stock("SGD"),
            "clipnorm": lambda: steps.stock("SGD", clipnorm=1.0),
            "l2": lambda: steps.normalized("SGD"),
        }.items():
            if steps.BACKEND == "jax":
                compiled = steps.lower(make(), shapes).compile()
                peak, kept = compiled.memory_analysis().temp_size_in_bytes, 0
            else:
                peak, kept = steps.memory_of(make(), shapes)
            yield {
                "size": size,
                "optimizer": name,
                "gradients": 4 * steps.count(shapes),
                "peak": peak,
                "kept": kept,
            }


def fit_times(quick):
    """Times steps of `fit` of a 30-layer network on random data.

    The speeds of two equal models differ permanently, and by more than normalization
    costs. So there are several copies of each model, and the median over them counts.
    """
    batches, copies = (5, 2) if quick else (20, 3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128 * batches, 64)).astype("float32")
    y = rng.integers(0, 10, size=128 * batches)
    for base in steps.BASES:
        kinds = {
            "stock": lambda base=base: steps.stock(base),
            "l2": lambda base=base: steps.normalized(base),
            "None": lambda base=base: steps.normalized(base, norm=None),
        }
        contenders = {}
        for copy, (kind, make) in itertools.product(range(copies), kinds.items()):
            model = network()
            model.compile(make(), "sparse_categorical_crossentropy")

            def epoch(model=model):
                model.fit(x, y, batch_size=128, epochs=1, verbose=0, shuffle=False)

            contenders[kind, copy] = epoch
        times = interleaved(contenders, 1 if quick else 90)
        each = {
            kind: [times[kind, copy] / batches for copy in range(copies)]
            for kind in kinds
        }
        medians = {kind: statistics.median(t) for kind, t in each.items()}
        yield {"base": base, "medians": medians, "each": each}


def network():
    layers = [keras.Input((64,))]
    for _ in range(30):
        layers += [
            keras.layers.Dense(
                128,
                "relu",
                kernel_initializer="he_normal",
                kernel_regularizer=keras.regularizers.L2(1e-5),
            ),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2),
        ]
    return keras.Sequential([*layers, keras.layers.Dense(10, "softmax")])


PARTS = {
    "steps": step_times,
    "busy": busy_times,
    "norms": norm_times,
    "options": option_times,
    "directions": direction_times,
    "embedding": embedding_times,
    "growth": growth,
    "memory": memory,
    "fit": fit_times,
}


def environment():
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "backend": steps.BACKEND,
        "versions": versions,
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.machine(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "path", type=pathlib.Path, help="JSON file to which the results are added"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small models, short and imprecise"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    results = {}
    if arguments.path.exists():
        results = json.loads(arguments.path.read_text())
    results |= environment() | {"quick": arguments.quick}
    for part in arguments.only:
        print(f"{steps.BACKEND}: {part}", flush=True)
        results[part] = list(PARTS[part](arguments.quick))
        # Replaces the file at once, so that an interruption leaves it complete.
        with tempfile.NamedTemporaryFile(
            "w", dir=arguments.path.parent, delete=False
        ) as file:
            json.dump(results, file, indent=1)
        os.replace(file.name, arguments.path)


if __name__ == "__main__":
    main()
