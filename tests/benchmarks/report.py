"""Makes tables and a figure of the results of `bench.py` on one or several backends."""

import argparse
import json
import pathlib

import matplotlib as mpl

NAMES = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
PEERS = {"jax": "Optax", "torch": "torch.optim, foreach"}
# Shape and colour show the same thing, so one of them is enough.
AGAINST = {
    "stock": ("tab:blue", "o", "stock Keras"),
    "clipnorm": ("tab:orange", "s", "stock Keras with clipnorm"),
    "by hand": ("tab:green", "^", "one written by hand"),
}
OF_SCOPES = {
    "variable": ("tab:blue", "o"),
    "unit": ("tab:orange", "s"),
    "layer": ("tab:green", "^"),
    "global": ("tab:red", "x"),
}


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def backend_name(result, mode=""):
    name = NAMES[result["backend"]]
    return name + {"": "", "xla": ", XLA", "graph": ", graph"}[mode]


def ratio(medians, name, to):
    return f"{medians[name] / medians[to]:.2f}" if to in medians else "–"


def milliseconds(seconds):
    return f"{1e3 * seconds:.2f}"


def tables(results):
    """Yields the title and the text of each table."""
    head = ["backend", "base", "variables", "stock, ms", "l2 / stock", "l2 / clipnorm"]
    head += ["l2 / by hand", "norm=None / stock", "with a gradient of zeros / l2"]
    for part, title in {
        "steps": "One step",
        "busy": "One step on a busy machine",
    }.items():
        rows = [
            [backend_name(result, row["mode"]), row["base"], row["size"]]
            + [milliseconds(row["medians"]["stock"])]
            + [ratio(row["medians"], "l2", to) for to in AGAINST]
            + [ratio(row["medians"], "None", "stock")]
            + [ratio(row["medians"], "l2, zeros", "l2")]
            for result in results
            for row in result.get(part, [])
        ]
        yield title, table(head, rows)

    rows = [
        [backend_name(result, row["mode"]), row["base"], row["size"]]
        + [f"{row['first'][name]:.2f}" for name in ("stock", "clipnorm", "l2")]
        + [ratio(row["first"], "l2", "clipnorm")]
        for result in results
        if result["backend"] != "torch"
        for row in result.get("steps", [])
    ]
    head = ["backend", "base", "variables", "stock, s", "clipnorm, s", "l2, s"]
    yield "The first step, which traces and compiles", table([*head, "ratio"], rows)

    rows = [
        [backend_name(result), row["base"], milliseconds(row["medians"]["stock"])]
        + [ratio(row["medians"], name, "stock") for name in ("l2", "None")]
        + [f"{max(row['each']['stock']) / min(row['each']['stock']):.2f}"]
        for result in results
        for row in result.get("fit", [])
    ]
    head = ["backend", "base", "stock, ms", "l2 / stock", "norm=None / stock"]
    yield "One step of `fit`", table([*head, "slowest / fastest of stock"], rows)

    rows = [
        [backend_name(result), row["size"], row["scope"]]
        + [
            ratio(row["medians"], n, "reference")
            for n in row["medians"]
            if n != "reference"
        ]
        for result in results
        for row in result.get("norms", [])
    ]
    names = next(
        (list(row["medians"]) for f in results for row in f.get("norms", [])), []
    )
    head = ["backend", "variables", "scope", *(n for n in names if n != "reference")]
    yield "Norms and scopes, to l2 of each variable", table(head, rows)

    rows = [
        [backend_name(result), row["base"], row["size"]]
        + [milliseconds(row["medians"]["l2"])]
        + [ratio(row["medians"], n, "l2") for n in row["medians"] if n != "l2"]
        + [
            "–" if result["backend"] == "torch" else ratio(row["first"], n, "l2")
            for n in ("update", "WeightNorm", "RunningNorm")
        ]
        for result in results
        for row in result.get("options", [])
    ]
    names = next(
        (list(row["medians"]) for f in results for row in f.get("options", [])), []
    )
    head = ["backend", "base", "variables", "l2, ms", *(n for n in names if n != "l2")]
    head += [f"first step, {n}" for n in ("update", "WeightNorm", "RunningNorm")]
    yield "Other options, to l2 of the gradient", table(head, rows)

    rows = [
        [
            backend_name(result),
            row["size"],
            milliseconds(row["medians"]["Keras's Muon"]),
        ]
        + [
            ratio(row["medians"], "OrthogonalSGD", to)
            for to in ("Keras's Muon", "peer", "Adam")
        ]
        + [ratio(row["first"], "OrthogonalSGD", "Keras's Muon")]
        for result in results
        for row in result.get("directions", [])
    ]
    head = ["backend", "kernels", "Keras's Muon, ms", "OrthogonalSGD / Keras's Muon"]
    head += ["/ that of Optax, PyTorch", "/ Adam", "first step / Keras's Muon"]
    yield "Directions", table(head, rows)

    for result in results:
        for row in result.get("embedding", []):
            medians = row["medians"]
            rows = [
                [name, milliseconds(medians[name]), ratio(medians, name, "clipnorm")]
                for name in medians
            ]
            title = f"An embedding of {row['rows']:,} rows on TensorFlow"
            yield title, table(["optimizer", "ms", "to clipnorm"], rows)

    rows = [
        [backend_name(result), row["case"]]
        + [milliseconds(row["medians"][name]) for name in ("stock", "l2")]
        + [ratio(row["medians"], "l2", "stock")]
        + [f"{row['first'][name]:.2f}" for name in ("stock", "l2")]
        for result in results
        for row in result.get("growth", [])
    ]
    head = ["backend", "variables", "stock, ms", "l2, ms", "ratio"]
    yield (
        "Growth with the number of variables and of entries",
        table([*head, "first step, stock, s", "first step, l2, s"], rows),
    )

    rows = [
        [backend_name(result), row["size"], row["optimizer"]]
        + [f"{row[name] / 2**20:.2f}" for name in ("gradients", "peak", "kept")]
        for result in results
        for row in result.get("memory", [])
    ]
    head = ["backend", "variables", "optimizer", "gradients, MiB", "at most, MiB"]
    yield "Memory of one step", table([*head, "kept, MiB"], rows)


def drawn(results):
    """Returns the measured parts that a figure shows, and functions that draw them."""
    parts = {"steps": _draw_steps, "busy": _draw_steps, "norms": _draw_norms}
    return {p: draw for p, draw in parts.items() if any(f.get(p) for f in results)}


def figure(results):
    mpl.use("agg")
    from matplotlib import pyplot as plt

    parts = drawn(results)
    # The figure is as wide as on a page, so that text keeps its size.
    size = (2.2 * len(results) + 1.4, 3.7 * len(parts) + 0.6)
    fig, axes = plt.subplots(
        len(parts),
        len(results),
        figsize=size,
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for row, (part, draw) in zip(axes, parts.items(), strict=True):
        for axis, result in zip(row, results, strict=True):
            draw(axis, result, part)
    for row, part in zip(axes, parts, strict=True):
        if part == "norms":
            row[0].legend(title="scope (filled: many small variables)")
            row[0].set_ylabel("time of a step, as a ratio to l2 of each variable")
        else:
            row[0].set_ylabel("busy machine" if part == "busy" else "idle machine")
            row[len(row) // 2].set_xlabel("time of a step with l2, as a ratio")
    fig.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3
    )
    return fig


def _draw_steps(axis, result, part):
    axis.set_title(NAMES[result["backend"]])
    # Steps as `fit` compiles them.
    rows = [r for r in result.get(part, []) if r["mode"] != "graph"]
    if not rows:
        _say_not_measured(axis)
        return
    labels = [f"{r['base']}, {r['size']}" for r in rows]
    for to, (colour, marker, label) in AGAINST.items():
        points = [
            (r["medians"]["l2"] / r["medians"][to], y)
            for y, r in enumerate(rows)
            if to in r["medians"]
        ]
        if points:
            label = f"to {label}"
            axis.plot(*zip(*points, strict=True), marker, color=colour, label=label)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.set_xlim(0.2, 12)
    axis.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
    axis.minorticks_off()
    axis.grid(axis="x", alpha=0.3)


def _say_not_measured(axis):
    axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    axis.set_xticks([])


def _draw_norms(axis, result, part):
    rows = result.get(part, [])
    if not rows:
        _say_not_measured(axis)
        return
    names = [n for n in rows[0]["medians"] if n != "reference"]
    sizes = list(dict.fromkeys(r["size"] for r in rows))
    for row in rows:
        colour, marker = OF_SCOPES[row["scope"]]
        is_first = row["size"] == sizes[0]
        shift = 0.16 * (list(OF_SCOPES).index(row["scope"]) - 1.5)
        axis.plot(
            [x + shift for x in range(len(names))],
            [row["medians"][n] / row["medians"]["reference"] for n in names],
            marker,
            color=colour,
            markerfacecolor=colour if is_first else "none",
            markersize=5 if is_first else 7,
            label=row["scope"] if is_first else None,
        )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.axhline(2, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(names)), names, rotation=60)
    axis.set_xlabel("norm")
    axis.grid(axis="y", alpha=0.3)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=pathlib.Path, help="JSON files")
    parser.add_argument("--figure", type=pathlib.Path, help="where to save it")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text()) for path in arguments.paths]
    results.sort(key=lambda result: result["backend"])
    for result in results:
        print(
            f"{NAMES[result['backend']]}: {result['versions']}, {result['cores']} cores"
        )
    for title, text in tables(results):
        if text.count("\n") < 2:  # The table has no rows.
            continue
        print(f"\n## {title}\n\n{text}")
    if arguments.figure and drawn(results):
        figure(results).savefig(arguments.figure, dpi=150)


if __name__ == "__main__":
    main()
