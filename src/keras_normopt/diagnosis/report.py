"""Writes a `Diagnosis` as text."""

import math
import textwrap

import numpy as np

from keras_normopt.diagnosis.finding import is_kernel

ROWS = 12


def report(diagnosis):
    """Returns what a `Diagnosis` prints."""
    of = f" for {diagnosis.optimizer}" if diagnosis.optimizer else ""
    lines = [
        f"Gradients of {len(diagnosis.totals)} batches{of}: "
        + ", ".join(f"{name} {value:.4g}" for name, value in diagnosis.logs.items()),
        f"l2 norm of all: {np.median(diagnosis.totals):.3g}",
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
    rows = [["", "norm", "rms", "/ weights", "zeros"]]
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
        lines.append(f"({len(shown)} of {len(blocks)} variables; `blocks` has all)")
    return lines


def _thinned(blocks):
    """Returns all blocks if they are few, else kernels, evenly over the depth."""
    if len(blocks) <= ROWS:
        return blocks
    of = [block for block in blocks if is_kernel(block)] or blocks
    even = np.linspace(0, len(of) - 1, min(ROWS, len(of)))
    return [of[round(position)] for position in even]
