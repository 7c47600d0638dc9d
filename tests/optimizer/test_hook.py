"""Tests that each way to call an optimizer makes one normalized step or no step."""

import threading

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt

BACKEND = keras.backend.backend()
not_tensorflow = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="Keras has no stateless_apply on TensorFlow"
)

# The model is one linear layer, so formulas give its gradient and its step.
X = np.array([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [2.0, 2.0]], "float32")
Y = np.array([[30.0], [-20.0], [500.0], [7.0]], "float32")
W = np.array([[0.5], [-0.25]], "float32")
GRADIENT = 2 * X.T @ (X @ W - Y) / len(X)
STEP = 0.1 * GRADIENT / np.linalg.norm(GRADIENT)


def make_model(**compile_arguments):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([W])
    optimizer = keras_normopt.NormalizedSGD(learning_rate=0.1)
    model.compile(**({"optimizer": optimizer, "loss": "mse"} | compile_arguments))
    return model


def tensors(*arrays):
    return [ops.convert_to_tensor(array) for array in arrays]


def assert_stepped(variable, start=W, step=STEP):
    np.testing.assert_allclose(
        ops.convert_to_numpy(variable), start - step, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["compiled", "eager", "jit"])
def test_fit_makes_one_normalized_step(mode):
    if mode == "jit" and BACKEND == "torch":
        pytest.skip("takes half a minute; test_pipeline tests it")
    model = make_model(
        run_eagerly=mode == "eager", jit_compile={"jit": True, "eager": False}.get(mode)
    )
    model.fit(X, Y, batch_size=4, epochs=1, verbose=0)
    assert_stepped(model.weights[0])


def test_fit_makes_one_normalized_step_with_an_optimizer_by_name():
    model = make_model(optimizer="normalized_sgd")
    model.fit(X, Y, batch_size=4, epochs=1, verbose=0)
    assert_stepped(model.weights[0], step=STEP / 10)


def test_train_on_batch_makes_one_normalized_step():
    model = make_model()
    model.train_on_batch(X, Y)
    assert_stepped(model.weights[0])


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, lambda p: dict(enumerate(p)).values()]
)
def test_apply_gradients_takes_any_iterable(kind):
    variable, other = keras.Variable(W), keras.Variable(W)
    optimizer = keras_normopt.NormalizedSGD(learning_rate=0.1)
    gradient, zero = tensors(GRADIENT, np.zeros_like(W))
    iterations = optimizer.apply_gradients(kind([(gradient, variable), [zero, other]]))
    assert int(ops.convert_to_tensor(iterations)) == 1
    assert_stepped(variable)
    assert_stepped(other, step=0)


def test_apply_works_with_and_without_variables():
    variable = keras.Variable(W)
    optimizer = keras_normopt.NormalizedSGD(learning_rate=0.1)
    optimizer.apply(tensors(GRADIENT), [variable])
    optimizer.apply(tensors(1e-9 * GRADIENT))
    assert_stepped(variable, step=2 * STEP)


def test_apply_without_variables_needs_a_built_optimizer():
    with pytest.raises(ValueError, match="must already be built"):
        keras_normopt.NormalizedSGD().apply(tensors(GRADIENT))


@not_tensorflow
@pytest.mark.parametrize("compiled", [False, True])
def test_stateless_apply_makes_normalized_steps(compiled):
    if compiled and BACKEND == "torch":
        pytest.skip("test_pipeline tests PyTorch's compiler")
    variable = keras.Variable(W)
    optimizer = keras_normopt.NormalizedSGD(learning_rate=0.1)
    optimizer.build([variable])
    apply = optimizer.stateless_apply
    if compiled:
        import jax

        apply = jax.jit(apply)
    # On PyTorch, foreach classes of Keras change tensors in place. So the test copies.
    state = [ops.copy(v) for v in optimizer.variables]
    (result,), state = apply(state, tensors(GRADIENT), [ops.copy(variable)])
    assert_stepped(result)
    assert_stepped(variable, step=0)
    (result,), _ = apply(state, tensors(1e-9 * GRADIENT), [result])
    assert_stepped(result, step=2 * STEP)


def test_variables_without_gradients_do_not_move():
    variables = [keras.Variable(W), keras.Variable(W)]
    optimizer = keras_normopt.NormalizedSGD(learning_rate=0.1)
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.apply_gradients(
            zip([None, *tensors(GRADIENT)], variables, strict=True)
        )
    assert_stepped(variables[0], step=0)
    assert_stepped(variables[1])
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimizer.apply([None, None])


def test_a_second_step_compiles_nothing():
    traced = []

    def counting_norm(gradient):
        traced.append(gradient.shape)
        return ops.norm(gradient)

    optimizer = keras_normopt.NormalizedAdam(norm=counting_norm)
    model = make_model(optimizer=optimizer, jit_compile=BACKEND != "torch")
    optimizer.build(model.trainable_variables)  # `build` calls the function.
    traced.clear()
    model.fit(X, Y, batch_size=4, epochs=1, verbose=0)
    after_one = len(traced)
    model.fit(X, Y, batch_size=4, epochs=3, verbose=0)
    # Python calls the function once per trace. PyTorch is eager here, so Python calls
    # it once per step.
    assert len(traced) == (4 * after_one if BACKEND == "torch" else after_one)


@pytest.mark.skipif(BACKEND != "jax", reason="counts what JAX compiles")
def test_a_second_eager_step_compiles_nothing(caplog):
    import jax

    variable = keras.Variable(W)
    optimizer = keras_normopt.NormalizedAdam()
    for scale in (1.0, 1e-25):  # Gradients of 1e-25 need rescaling.
        optimizer.apply(tensors(scale * GRADIENT), [variable])
        with jax.log_compiles():
            optimizer.apply(tensors(scale * GRADIENT), [variable])
    assert not [r.message for r in caplog.records if "Compiling" in r.message]


# Shapes.


@pytest.mark.parametrize("shape", [(1, 2), (2,), (2, 2), (), (2, 1, 1)])
def test_a_gradient_of_another_shape_is_refused(shape):
    variable = keras.Variable(W, name="theirs")
    gradient = ops.ones(shape)
    optimizer = keras_normopt.NormalizedSGD()
    message = rf"of shape \({', ?'.join(map(str, shape))},?\).*'theirs'.*\(2, 1\)"
    with pytest.raises(ValueError, match=message):
        optimizer.apply_gradients([(gradient, variable)])
    with pytest.raises(ValueError, match=message):
        optimizer.apply([gradient], [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), W)


@pytest.mark.parametrize("bad", [5, None, (1, 2, 3), "ab"])
def test_an_item_that_is_no_pair_is_refused(bad):
    optimizer = keras_normopt.NormalizedSGD()
    with pytest.raises(ValueError, match=r"\(gradient, variable\) pairs. Received the"):
        optimizer.apply_gradients([bad])


def test_more_gradients_than_variables_are_refused():
    variable = keras.Variable(W)
    optimizer = keras_normopt.NormalizedSGD()
    with pytest.raises(ValueError, match=r"2 gradients for 1 variables$"):
        optimizer.apply(tensors(GRADIENT, GRADIENT), [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), W)


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="only TensorFlow has unknown shapes"
)
@pytest.mark.parametrize("shape", [None, [None, 1], [2, None], [2, 1]])
def test_an_unknown_shape_is_accepted(shape):
    import tensorflow as tf

    variable = keras.Variable(W)
    optimizer = keras_normopt.NormalizedSGD(learning_rate=0.1)
    optimizer.build([variable])

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32)])
    def step(gradient):
        optimizer.apply_gradients([(gradient, variable)])

    step(GRADIENT)
    assert_stepped(variable)


# A guard raises an error if Keras does not call the method that normalizes.


def bypass_the_hook(monkeypatch):
    """Makes Keras update variables without the method that we override."""

    def update_directly(self, grads, trainable_variables, *args):
        for grad, variable in zip(grads, trainable_variables, strict=True):
            self.update_step(grad, variable, self.learning_rate)

    for owner in keras_normopt.NormalizedFtrl.__mro__:
        if "_backend_apply_gradients" in vars(owner):
            monkeypatch.setattr(owner, "_backend_apply_gradients", update_directly)


def make_guarded_model(**compile_arguments):
    # Ftrl has no foreach class on PyTorch, so every backend calls its `update_step`.
    return make_model(optimizer=keras_normopt.NormalizedFtrl(0.1), **compile_arguments)


ERROR = "NormalizedFtrl could not normalize its gradients: Keras"


@pytest.mark.parametrize("run_eagerly", [False, True])
@pytest.mark.parametrize("method", ["fit", "train_on_batch"])
@pytest.mark.parametrize("steps", [None, 2])
def test_the_guard_stops_training(monkeypatch, run_eagerly, method, steps):
    model = make_guarded_model(run_eagerly=run_eagerly)
    model.optimizer.gradient_accumulation_steps = steps
    model.optimizer._iterations.assign(1)  # The next step updates weights.
    bypass_the_hook(monkeypatch)
    arguments = {"verbose": 0} if method == "fit" else {}
    with pytest.raises(RuntimeError, match=ERROR):
        getattr(model, method)(X, Y, **arguments)


def test_the_guard_stops_apply_gradients_and_apply(monkeypatch):
    bypass_the_hook(monkeypatch)
    optimizer, variable = keras_normopt.NormalizedFtrl(0.1), keras.Variable(W)
    with pytest.raises(RuntimeError, match=ERROR):
        optimizer.apply_gradients(zip(tensors(GRADIENT), [variable], strict=True))
    with pytest.raises(RuntimeError, match=ERROR):
        optimizer.apply(tensors(GRADIENT))


@not_tensorflow
def test_the_guard_stops_stateless_apply(monkeypatch):
    optimizer, variable = keras_normopt.NormalizedFtrl(0.1), keras.Variable(W)
    optimizer.build([variable])
    state = [v.value for v in optimizer.variables], tensors(GRADIENT), [variable.value]
    # The patch stands for a Keras whose `stateless_apply` does not call `apply`.
    for owner in keras.optimizers.Optimizer.__mro__:
        if "stateless_apply" in vars(owner):
            monkeypatch.setattr(owner, "stateless_apply", lambda *args: None)
    with pytest.raises(RuntimeError, match=ERROR):
        optimizer.stateless_apply(*state)


@pytest.mark.parametrize("steps", [None, 2])
def test_the_guard_ignores_the_steps_of_other_threads(monkeypatch, steps):
    optimizer = keras_normopt.NormalizedFtrl(0.1, gradient_accumulation_steps=steps)
    variable = keras.Variable(W)
    optimizer.build([variable])

    def update_while_another_thread_trains(self, grads, trainable_variables, *args):
        thread = threading.Thread(target=make_model().train_on_batch, args=(X, Y))
        monkeypatch.undo()
        thread.start()
        thread.join()

    for owner in type(optimizer).__mro__:
        if "_backend_apply_gradients" in vars(owner):
            monkeypatch.setattr(
                owner, "_backend_apply_gradients", update_while_another_thread_trains
            )
    if steps:
        optimizer._iterations.assign(1)  # The next step updates weights.
    with pytest.raises(RuntimeError, match=ERROR):
        optimizer.apply(tensors(GRADIENT), [variable])


def test_a_base_that_updates_all_variables_together_gets_the_normalized_gradient():
    class Direct(keras.optimizers.Ftrl):
        def _backend_update_step(self, grads, trainable_variables, learning_rate):
            for grad, variable in zip(grads, trainable_variables, strict=True):
                variable.assign_sub(learning_rate * grad)

    optimizer, variable = keras_normopt.normalized(Direct)(0.1), keras.Variable(W)
    optimizer.apply(tensors(GRADIENT), [variable])
    assert_stepped(variable)


def test_a_keras_without_the_method_that_we_override_is_refused(monkeypatch):
    from keras_normopt._optimizer import factory

    monkeypatch.setattr(factory, "HOOK", "_renamed_by_keras")
    with pytest.raises(RuntimeError, match=r"has no `Optimizer\._renamed_by_keras`"):
        keras_normopt.normalized(type("Fresh", (keras.optimizers.SGD,), {}))


# Accumulated gradients, calls without gradients, threads and replicas.


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_accumulated_gradients_are_normalized_together(run_eagerly):
    optimizer = keras_normopt.NormalizedSGD(0.1, gradient_accumulation_steps=2)
    model = make_model(optimizer=optimizer, run_eagerly=run_eagerly)
    model.fit(X, Y, batch_size=2, epochs=1, shuffle=False, verbose=0)
    assert_stepped(model.weights[0])


def test_accumulated_gradients_are_normalized_only_after_averaging():
    variable = keras.Variable([0.0, 0.0])
    optimizer = keras_normopt.NormalizedSGD(1.0, gradient_accumulation_steps=2)
    optimizer.apply(tensors([3.0, 0.0]), [variable])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), [0, 0])
    optimizer.apply(tensors([0.0, 4.0]))
    np.testing.assert_allclose(variable, [-0.6, -0.8], rtol=1e-6)


def test_a_call_without_gradients_makes_no_step():
    variable = keras.Variable(W)
    optimizer = keras_normopt.NormalizedSGD()
    optimizer.apply_gradients([])
    optimizer.apply_gradients(iter([]))
    optimizer.apply([], [variable])
    optimizer.apply([])
    optimizer.build([variable])
    optimizer.apply([])
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), W)


@pytest.mark.parametrize("steps", [None, 2])
def test_variables_with_overwrite_with_gradient_get_the_raw_gradient(steps):
    scale = keras.Variable(1.0)
    scale.overwrite_with_gradient = True
    optimizer = keras_normopt.NormalizedSGD(0.1, gradient_accumulation_steps=steps)
    optimizer.build([scale])
    for _ in range(steps or 1):
        optimizer.apply([ops.convert_to_tensor(448.0)])
    assert float(ops.convert_to_numpy(scale)) == 448.0
    variable = keras.Variable(W)
    optimizer = keras_normopt.NormalizedSGD(0.1)
    optimizer.apply(tensors(np.float32(7.0), GRADIENT), [scale, variable])
    assert float(ops.convert_to_numpy(scale)) == 7.0
    assert_stepped(variable)


def test_threads_train_their_own_models():
    models = [
        make_model(),
        make_model(optimizer=keras_normopt.NormalizedSGD(0.1, norm="max")),
    ]
    threads = [
        threading.Thread(
            target=model.fit, args=(X, Y), kwargs={"batch_size": 4, "verbose": 0}
        )
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_stepped(models[0].weights[0])
    assert_stepped(models[1].weights[0], step=0.1 * GRADIENT / np.max(np.abs(GRADIENT)))


def test_replicas_make_one_normalized_step_together(strategy):
    with strategy.scope():
        model = make_model(jit_compile=False)
    model.fit(X, Y, batch_size=4, epochs=1, verbose=0)
    assert_stepped(model.weights[0])


def test_the_guard_stops_replicas(strategy, monkeypatch):
    with strategy.scope():
        model = make_guarded_model(jit_compile=False)
    bypass_the_hook(monkeypatch)
    with pytest.raises(RuntimeError, match=ERROR):
        model.fit(X, Y, batch_size=4, epochs=1, verbose=0)
