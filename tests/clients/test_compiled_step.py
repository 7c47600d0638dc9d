"""Tests that PyTorch compiles a step as one graph that equals the eager step."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_normopt
from keras_normopt import norms

if keras.backend.backend() != "torch":
    pytest.skip("PyTorch's compiler", allow_module_level=True)
if keras.version() == "3.12.0":
    pytest.skip(
        "PyTorch cannot compile Adam of this Keras as one graph",
        allow_module_level=True,
    )

import torch
import torch._dynamo
import torch._dynamo.testing

SHAPES = {"a/kernel": (3, 4), "a/bias": (4,), "b/kernel": (3, 4), "b/bias": (2,)}
# PyTorch's compiler warns of caches in Keras and in itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


def own(gradient):
    return ops.sum(ops.abs(gradient))


# Every norm runs in one scope. A norm has the same code in every scope, so three norms
# are enough for the other scopes.
NORMS = [*(name for name in norms.__all__ if name != "linf"), own]
SCOPES = ["unit", "layer", "global"]
NORMS_AND_SCOPES = [(norm, "variable") for norm in NORMS]
NORMS_AND_SCOPES += [(norm, scope) for scope in SCOPES for norm in ("l2", "std", own)]
OPTIONS = [
    {"track_norms": True, "exclude": "bias"},
    {"step_size": "weight_norm"},
    {"step_size": "gradient_correlation", "track_norms": True},
    {"norm": None},
    {"centralize": True},
    {"direction": "orthogonal"},
    {"direction": {"bias": "sign", ".*": "rows"}, "apply_to": "update"},
    {"apply_to": "update"},
    {"apply_to": "update", "scope": "layer", "step_size": "weight_norm"},
]


def make_variables():
    variables = []
    for path, shape in SHAPES.items():
        layer, _, name = path.rpartition("/")
        with keras.name_scope(layer):
            variables.append(keras.Variable(np.ones(shape, "float32"), name=name))
    return variables


def stepped(optimizer, wrap):
    variables = make_variables()
    optimizer.build(variables)
    rng = np.random.default_rng(0)
    gradients = [
        torch.as_tensor(rng.normal(size=s) * scale, dtype=torch.float32)
        for s, scale in zip(SHAPES.values(), [1.0, 1e-25, 0.0, 1e25], strict=True)
    ]
    step = wrap(lambda *gradients: optimizer.apply(list(gradients), variables))
    with torch.no_grad():
        for factor in (1.0, -0.5, 2.0):
            step(*[factor * g for g in gradients])
    return [ops.convert_to_numpy(v) for v in variables]


def check(make):
    eager = stepped(make(), lambda step: step)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = stepped(
        make(), lambda step: torch.compile(step, backend=counter, fullgraph=True)
    )
    assert counter.frame_count == 1  # One graph, compiled once.
    for one, other in zip(compiled, eager, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "scope"),
    NORMS_AND_SCOPES,
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_compiled_step_equals_the_eager_step_in_every_norm_and_scope(norm, scope):
    # Each compilation takes a second or more. SGD compiles fastest.
    check(lambda: keras_normopt.NormalizedSGD(0.1, norm=norm, scope=scope))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_compiled_step_equals_the_eager_step_with_every_option(options):
    check(lambda: keras_normopt.NormalizedAdam(0.1, **options))


CONSTANT, WEIGHTS = 0.5, keras_normopt.WeightNorm(0.2)
RUNNING = keras_normopt.RunningNorm(warmup=1)


@pytest.mark.parametrize(
    ("max_norm", "scope"),
    [
        (CONSTANT, "variable"),
        (CONSTANT, "global"),
        (WEIGHTS, "unit"),
        (WEIGHTS, "layer"),
        (RUNNING, "unit"),
        (RUNNING, "global"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_compiled_clipped_step_equals_the_eager_step(max_norm, scope):
    check(lambda: keras_normopt.ClippedSGD(0.1, 0.9, max_norm=max_norm, scope=scope))
