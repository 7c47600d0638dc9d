"""Computes the gradients of `fit` without changing the model."""

import contextlib
import random
import warnings

import keras
import numpy as np
from keras import ops

from keras_normopt._optimizer.model_optimizers import optimizers_of

_ON_TORCH = keras.backend.backend() == "torch"


def run(model, data, batch_size, batches, class_weight, receive, receive_loss):
    """Calls `fit` for some batches, without making steps.

    Compiled code would hide the gradients, so `fit` runs eagerly. This changes the
    model's state, so call it within `unchanged`.

    Args:
        model: A compiled model.
        data: Tuple of x, y and sample weights. They are not shuffled.
        batch_size: As for `fit`.
        batches: The number of batches.
        class_weight: As for `fit`.
        receive: Called in each step with the optimizer, a list of pairs of gradient and
            variable, and the factor by which the loss was multiplied.
        receive_loss: Called with the arguments of `compute_loss`: x, y, the outputs and
            the sample weights.

    Returns:
        The logs, `{name: float}`.
    """
    x, y, sample_weight = data
    with contextlib.ExitStack() as stack:
        for optimizer in optimizers_of(model):
            stack.enter_context(_StandIn(optimizer, model, receive))
        ending = _Ending(batches)
        stack.enter_context(_listening(model, receive_loss, ending))
        # A finding replaces this warning of PyTorch's trainer.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "The model does not have any trainable")
        model.train_function = None
        model.run_eagerly, model.jit_compile = True, False
        model.steps_per_execution = 1
        history = model.fit(
            x,
            y,
            sample_weight=sample_weight,
            batch_size=batch_size,
            class_weight=class_weight,
            shuffle=False,
            verbose=0,
            callbacks=[ending],
        )
        return {name: float(values[-1]) for name, values in history.history.items()}


class _Ending(keras.callbacks.Callback):
    """Ends `fit` after some batches, even on endless data."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.has_begun = False

    def on_train_batch_begin(self, batch, logs=None):
        self.has_begun = True

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 >= self.batches:
            self.model.stop_training = True


class _StandIn:
    """A context in which an optimizer passes on gradients and makes no step.

    Methods of this class replace methods of the optimizer. Everything else that a model
    uses, such as the loss scale, stays unchanged.
    """

    METHODS = ("apply", "apply_gradients", "stateless_apply")
    # `build` would add state to an optimizer that has not trained, and
    # `finalize_variable_values` would replace weights by averages.
    IDLE = ("build", "finalize_variable_values")

    def __init__(self, optimizer, model, receive):
        self.optimizer = optimizer
        self.model = model
        self.receive = receive
        self.scale = float(ops.convert_to_numpy(optimizer.scale_loss(1.0)))

    def __enter__(self):
        for name in self.METHODS:
            object.__setattr__(self.optimizer, name, getattr(self, name))
        for name in self.IDLE:
            object.__setattr__(self.optimizer, name, lambda variables: None)

    def __exit__(self, *_):
        for name in (*self.METHODS, *self.IDLE):
            object.__delattr__(self.optimizer, name)

    def apply_gradients(self, grads_and_vars):
        self.receive(self.optimizer, list(grads_and_vars), self.scale)
        return self.optimizer.iterations  # TensorFlow's trainer may expect this.

    def apply(self, grads, trainable_variables=None):
        variables = trainable_variables
        if variables is None:
            variables = self._variables()
        pairs = list(zip(grads, variables, strict=True))
        self.receive(self.optimizer, pairs, self.scale)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        self.apply(grads)
        return trainable_variables, optimizer_variables

    def _variables(self):
        """Returns the variables for a list of gradients without variables."""
        inner = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        if inner.built:
            return inner._trainable_variables
        return self.model.trainable_variables


@contextlib.contextmanager
def _listening(model, receive, training):
    """Passes on the arguments of `compute_loss`, and reports missing targets."""
    compute_loss, compute_metrics = model.compute_loss, model.compute_metrics

    def loss(x=None, y=None, y_pred=None, sample_weight=None, **arguments):
        if training.has_begun:  # Before that, Keras builds the model without values.
            receive(x, y, y_pred, sample_weight)
        with _asking_for_targets(model, y):
            return compute_loss(x, y, y_pred, sample_weight, **arguments)

    def metrics(x, y, y_pred, sample_weight=None):
        with _asking_for_targets(model, y):
            return compute_metrics(x, y, y_pred, sample_weight)

    object.__setattr__(model, "compute_loss", loss)
    object.__setattr__(model, "compute_metrics", metrics)
    try:
        yield
    finally:
        object.__delattr__(model, "compute_loss")
        object.__delattr__(model, "compute_metrics")


@contextlib.contextmanager
def _asking_for_targets(model, y):
    try:
        yield
    except Exception as error:
        if y is not None:
            raise
        raise ValueError(
            "The loss or a metric of the model needs targets, and the data has none. "
            "Pass `y`, or data that yields `(x, y)`. Received: "
            f"loss={getattr(model, 'loss', None)!r}, y=None"
        ) from error


@contextlib.contextmanager
def unchanged(model):
    """Restores everything that `fit` changes in a model, and global random states."""
    names = ("run_eagerly", "jit_compile", "steps_per_execution", "stop_training")
    attributes = {name: getattr(model, name) for name in (*names, "train_function")}
    history = getattr(model, "history", None)
    variables = [*model.variables, *model.metrics_variables]
    # If the first step fails on JAX, Keras loses the values of all variables.
    variables += [v for o in optimizers_of(model) for v in o.variables]
    values = [np.array(ops.convert_to_numpy(v)) for v in variables]
    restore = _state_of_torch(model) if _ON_TORCH else lambda: None
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        model.reset_metrics()  # `fit` may have made some.
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        for name, value in attributes.items():
            setattr(model, name, value)
        model.history = history
        restore()
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _state_of_torch(model):
    """Saves more state of PyTorch. Returns a function that restores this state."""
    import torch

    seeds = torch.get_rng_state()  # A `DataLoader` draws from it.
    modes = [(module, module.training) for module in model.modules()]
    tensors = [(v.value, v.value.grad) for v in model.trainable_variables]

    def restore():
        torch.set_rng_state(seeds)
        for module, training in modes:
            module.training = training
        for tensor, grad in tensors:
            tensor.grad = grad

    return restore
