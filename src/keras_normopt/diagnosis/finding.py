"""Defines findings, and selects and names variables for them."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Finding:
    """One result of `diagnose`.

    Attributes:
        name: The name of the finding in the documentation.
        fact: What was measured.
        advice: What to do, and why.
    """

    name: str
    fact: str
    advice: str

    def __str__(self) -> str:
        return f"{self.fact} {self.advice}"


def is_kernel(block):
    """Returns whether a block has two or more axes and is not a bias."""
    # Biases of attention and of recurrent layers have several axes.
    return len(block.shape) > 1 and not block.name.endswith("bias")


def kernels(blocks):
    """Returns the kernels with comparable gradients: finite and not zero."""
    return [b for b in blocks if is_kernel(b) and b.rms > 0 and math.isfinite(b.rms)]


def typical(blocks):
    """Returns the median ratio of gradient to weights, over kernels. 1 without any."""
    sizes = [block.relative for block in kernels(blocks)]
    sizes = [size for size in sizes if math.isfinite(size)]
    return float(np.median(sizes)) if sizes else 1.0


def some(names, total):
    """Returns text: the number of variables, and some of their names."""
    shown = names if len(names) <= 3 else [names[0], "…", names[-1]]
    return f"{len(names)} of {total} variables ({', '.join(shown)})"
