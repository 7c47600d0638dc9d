"""Finds the optimizers that a model holds."""

from typing import Any

import keras

from keras_normopt._blocks.partition import make_unique


def inner_optimizers(optimizer):
    """Returns the optimizers that make the steps, without their wrappers."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return inner_optimizers(optimizer.inner_optimizer)
    if hasattr(optimizer, "optimizers"):  # A MultiOptimizer.
        return [o for inner in optimizer.optimizers for o in inner_optimizers(inner)]
    return [optimizer]


def tracking_optimizers(optimizer):
    """Returns the inner optimizers that keep norms."""
    return [o for o in inner_optimizers(optimizer) if getattr(o, "track_norms", False)]


def optimizers_of(model):
    """Returns the optimizers that a training step of the model may call."""
    return list(named_optimizers(model).values())


def named_optimizers(model):
    """Returns the optimizers that a model holds, by the name of the attribute.

    If the attribute is a list or dictionary, the index or key follows its name.
    """
    held = {"optimizer": getattr(model, "optimizer", None)} | vars(model)
    found = {}
    for attribute, value in held.items():
        if attribute.startswith("_self_"):  # TensorFlow adds these attributes.
            continue
        # Not `keras.tree`, which sorts dictionaries.
        items: Any = value.items() if isinstance(value, dict) else ()
        items = enumerate(value) if isinstance(value, list | tuple) else items
        inner = [(f"{attribute}_{key}", item) for key, item in items]
        for name, item in [(attribute, value), *inner]:
            if isinstance(item, keras.optimizers.Optimizer):
                # The later name wins, if `model.optimizer` is also another attribute.
                found[id(item)] = name, item
    return dict(found.values())


def named_trackers(model):
    """Returns the objects that keep the norms of a model's gradients.

    Returns:
        A list of pairs: a `NormTracker`, and a dictionary from the names of its blocks
        to their names in logs. If several attributes of the model hold optimizers that
        keep norms, the attribute's name comes first.
    """
    held: dict[str, list[Any]] = {}
    seen: list[int] = []
    for attribute, optimizer in named_optimizers(model).items():
        # A `LossScaleOptimizer` of the model may contain an optimizer that the model
        # also holds directly.
        found = [o for o in tracking_optimizers(optimizer) if id(o) not in seen]
        seen += map(id, found)
        if found:
            held[attribute] = found
    trackers: list[Any] = []
    taken: list[str] = []
    for attribute, found in held.items():
        prefix = f"{attribute}/" if len(held) > 1 else ""
        for tracker in (o.norm_tracker for o in found if o.norm_tracker):
            # Each optimizer of a `MultiOptimizer` may have a block `global`.
            names = make_unique([prefix + name for name in tracker.names], taken)
            taken += names
            trackers.append((tracker, dict(zip(tracker.names, names, strict=True))))
    return trackers
