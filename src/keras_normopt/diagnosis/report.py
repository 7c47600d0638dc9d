"""Writes a `Diagnosis` as text."""

import math
import textwrap

import numpy as np

from keras_normopt.diagnosis.finding import is_kernel

ROWS = 12  # Of the table, at most.


def report(diagnosis):
    """Returns what a `Diagnosis` prints."""
    optimizer = f" with {diagnosis.optimizer}" if diagnosis.optimizer else ""
    lines = [
        f"{len(diagnosis.totals)} batches{optimizer}: "
        + ", ".join(f"{name} {value:.4g}" for name, value in diagnosis.logs.items()),
        f"l2 norm of the whole gradient, median: {np.median(diagnosis.totals):.3g}",
        "",
        *_table(diagnosis.blocks),
    ]
    for finding in diagnosis.findings:
        lines += ["", *_wrapped(f"{finding.name}: {finding.fact}", "- ")]
        lines += _wrapped(finding.advice, "  ")
    if diagnosis.unchecked:
        lines += ["", *_wrapped(f"Not checked: {'; '.join(diagnosis.unchecked)}.", "")]
    return "\n".join(lines)


def _number(value):
    return "–" if math.isnan(value) else f"{value:.2g}"


def _wrapped(text, indent):
    return textwrap.wrap(
        text,
        88,
        initial_indent=indent,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(blocks):
    shown = _thinned(blocks)
    rows = [["", "norm", "rms", "norm / weights", "zeros"]]
    rows += [
        [block.name]
        + [_number(value) for value in (block.norm, block.rms, block.relative)]
        + [f"{block.zeros:.0%}"]
        for block in shown
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([f"{name:{widths[0]}}", *map(str.rjust, numbers, widths[1:])])
        for name, *numbers in rows
    ]
    if len(shown) < len(blocks):
        lines.append(
            f"({len(shown)} of {len(blocks)} variables; the attribute `blocks` has all)"
        )
    return lines


def _thinned(blocks):
    """Returns at most `ROWS` blocks.

    If there are more, it returns kernels at even distances from the first kernel to the
    last. If there are no kernels, it returns other blocks in the same way.
    """
    if len(blocks) <= ROWS:
        return blocks
    kernels = [block for block in blocks if is_kernel(block)] or blocks
    even = np.linspace(0, len(kernels) - 1, min(ROWS, len(kernels)))
    return [kernels[round(position)] for position in even]
