"""The ready-made optimizers, and their names for `model.compile`.

Keras knows the names after `import keras_normopt`.
"""

import keras
from keras import optimizers

from keras_normopt._optimizer.factory import clipped, normalized, with_defaults

NormalizedSGD = normalized(optimizers.SGD)
NormalizedAdam = normalized(optimizers.Adam)
NormalizedAdamW = normalized(optimizers.AdamW)
NormalizedRMSprop = normalized(optimizers.RMSprop)
NormalizedAdagrad = normalized(optimizers.Adagrad)
NormalizedAdadelta = normalized(optimizers.Adadelta)
NormalizedAdamax = normalized(optimizers.Adamax)
NormalizedNadam = normalized(optimizers.Nadam)
NormalizedFtrl = normalized(optimizers.Ftrl)
NormalizedLion = normalized(optimizers.Lion)
NormalizedAdafactor = normalized(optimizers.Adafactor)
NormalizedLamb = normalized(optimizers.Lamb)
NormalizedMuon = normalized(optimizers.Muon)

OrthogonalSGD = with_defaults(
    NormalizedSGD,
    "OrthogonalSGD",
    """\
SGD whose steps are orthogonal matrices.

It is `NormalizedSGD` with other defaults. SGD with Nesterov momentum computes an update
M for each kernel, seen as a matrix (inputs | outputs). Then it replaces M by its
orthogonal factor:

    w ← w + lr · scale · U Vᵀ, where M = U S Vᵀ

So the singular values of a step are nearly equal, however small the gradients are.
Kernels of attention, convolutions and recurrent layers are matrices too: see
`keras_normopt.directions.Orthogonal`. Rows of an embedding get steps of equal length.
Biases, gains and scalars use their momentum as it is. The optimizer keeps one slot for
each variable, as SGD with momentum does.""",
    """\
    - [Jordan et al., 2024, Muon: An optimizer for hidden layers in neural
      networks](https://kellerjordan.github.io/posts/muon/)
    - [Pethick et al., 2025, Training Deep Learning Models with Norm-Constrained
      LMOs](https://arxiv.org/abs/2502.07529)
    - [Liu et al., 2025, Muon is Scalable for LLM
      Training](https://arxiv.org/abs/2502.16982), for the scale""",
    momentum=0.9,
    nesterov=True,
    norm=None,
    apply_to="update",
    norm_epsilon=1e-20,
    direction="orthogonal",
)

ClippedSGD = clipped(optimizers.SGD)
ClippedAdam = clipped(optimizers.Adam)
ClippedAdamW = clipped(optimizers.AdamW)
ClippedRMSprop = clipped(optimizers.RMSprop)

# Written out, because Keras's snake case would be `normalized_rm_sprop`.
NORMALIZED = {
    "normalized_sgd": NormalizedSGD,
    "normalized_adam": NormalizedAdam,
    "normalized_adamw": NormalizedAdamW,
    "normalized_rmsprop": NormalizedRMSprop,
    "normalized_adagrad": NormalizedAdagrad,
    "normalized_adadelta": NormalizedAdadelta,
    "normalized_adamax": NormalizedAdamax,
    "normalized_nadam": NormalizedNadam,
    "normalized_ftrl": NormalizedFtrl,
    "normalized_lion": NormalizedLion,
    "normalized_adafactor": NormalizedAdafactor,
    "normalized_lamb": NormalizedLamb,
    "normalized_muon": NormalizedMuon,
}

if hasattr(optimizers, "ScheduleFreeAdamW"):  # Not in the oldest supported Keras.
    NormalizedScheduleFreeAdamW = normalized(optimizers.ScheduleFreeAdamW)
    NORMALIZED["normalized_schedule_free_adamw"] = NormalizedScheduleFreeAdamW

ORTHOGONAL = {"orthogonal_sgd": OrthogonalSGD}

CLIPPED = {
    "clipped_sgd": ClippedSGD,
    "clipped_adam": ClippedAdam,
    "clipped_adamw": ClippedAdamW,
    "clipped_rmsprop": ClippedRMSprop,
}

#: Dict from the strings for `model.compile` to the classes.
ALIASES = NORMALIZED | ORTHOGONAL | CLIPPED

__all__ = [cls.__name__ for cls in ALIASES.values()]


# `model.compile(optimizer="normalized_adam")` looks strings up here.
_BY_NAME = ALIASES | {cls.__name__: cls for cls in ALIASES.values()}
keras.saving.get_custom_objects().update(_BY_NAME)
try:
    optimizers.get("normalized_sgd")
except ValueError:
    # Nightly builds of Keras 3.16 use only their own table.
    getattr(keras.src.optimizers, "ALL_OBJECTS_DICT", {}).update(_BY_NAME)
