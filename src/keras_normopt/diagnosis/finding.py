"""A finding, and how it names variables."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        name: The name, by which the documentation lists findings.
        fact: What was measured.
        advice: What follows, and why.
    """

    name: str
    fact: str
    advice: str

    def __str__(self) -> str:
        return f"{self.fact} {self.advice}"


def is_kernel(block):
    """Whether a block has two or more axes and is no bias."""
    # Biases of attention and of recurrent layers have several axes.
    return len(block.shape) > 1 and not block.name.endswith("bias")


def kernels(blocks):
    """The kernels that have a finite gradient, whose sizes can be compared."""
    return [b for b in blocks if is_kernel(b) and b.rms > 0 and math.isfinite(b.rms)]


def typical(blocks):
    """The median of the gradient over the weights of kernels; 1 without kernels."""
    sizes = [block.relative for block in kernels(blocks)]
    sizes = [size for size in sizes if math.isfinite(size)]
    return float(np.median(sizes)) if sizes else 1.0


def some(names, total):
    """A count of variables, and the first and last of their names."""
    shown = names if len(names) <= 3 else [names[0], "…", names[-1]]
    return f"{len(names)} of {total} variables ({', '.join(shown)})"
