"""Tests that `diagnose` finds nothing wrong with models that train well."""

import importlib.util

import keras
import pytest

from helpers import healthy
from keras_normopt import diagnose

pytestmark = pytest.mark.once

# Correct findings about models that train well: see docs/results/diagnosis.md.
CORRECT = {
    "timeseries_transformer": {"no_gradient"},
    "applications.ResNet50V2": {"apart", "noise"},
    "applications.ConvNeXtTiny": {"below_epsilon"},
}
BENIGN = {"nothing", "low_rank", "noise", "frozen"}


def check(make):
    keras.utils.set_random_seed(0)
    report = diagnose(*make(), batch_size=16, batches=3)
    names = {finding.name for finding in report.findings}
    assert names <= CORRECT.get(make.__name__, BENIGN), str(report)


def name_of(make):
    return make.__name__


@pytest.mark.parametrize("make", healthy.QUICK, ids=name_of)
def test_nothing_is_wrong_with_small_models(make):
    check(make)


@pytest.mark.nightly
@pytest.mark.parametrize("make", healthy.NIGHTLY, ids=name_of)
def test_nothing_is_wrong_with_models_of_guides_and_applications(make):
    check(make)


@pytest.mark.nightly
@pytest.mark.skipif(not importlib.util.find_spec("keras_hub"), reason="needs KerasHub")
@pytest.mark.parametrize("make", healthy.HUB, ids=name_of)
def test_nothing_is_wrong_with_models_of_keras_hub(make):
    check(make)
