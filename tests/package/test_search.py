"""Tests that hyperparameter searches can choose a normalized optimizer by name."""

import keras
import keras_tuner
import pytest
from sklearn.model_selection import GridSearchCV

from helpers.digits import digits
from keras_normopt.optimizers import ALIASES

pytestmark = pytest.mark.once

NAMES = ["normalized_adam", "normalized_rmsprop"]


def make_model(name):
    optimizer = keras.optimizers.get(name)
    optimizer.learning_rate = 0.01  # A few epochs are enough at this rate.
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(32, "relu"),
            keras.layers.Dense(10, "softmax"),
        ]
    )
    model.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"])
    return model


def make_classifier_model(X, y, optimizer):  # noqa: N803  (scikit-learn's names)
    return make_model(optimizer)


def test_a_grid_search_of_scikit_learn_chooses_an_optimizer():
    x, y = digits()
    classifier = keras.wrappers.SKLearnClassifier(
        make_classifier_model,
        model_kwargs={"optimizer": "normalized_adam"},
    )
    search = GridSearchCV(
        classifier,
        {"model_kwargs": [{"optimizer": name} for name in NAMES]},
        cv=2,
        error_score="raise",
    )
    search.fit(x[:1500], y[:1500], epochs=3, verbose=0)
    best = search.best_estimator_
    assert best.score(x[1500:], y[1500:]) > 0.8
    chosen = search.best_params_["model_kwargs"]["optimizer"]
    assert type(best.model_.optimizer) is ALIASES[chosen]


# KerasTuner warns of its own code.
@pytest.mark.filterwarnings("default")
def test_keras_tuner_chooses_an_optimizer(tmp_path):
    def build(hyperparameters):
        return make_model(hyperparameters.Choice("optimizer", NAMES))

    x, y = digits()
    y = keras.utils.to_categorical(y)
    tuner = keras_tuner.GridSearch(
        build, "val_accuracy", directory=tmp_path, project_name="digits"
    )
    data = {"validation_data": (x[1500:], y[1500:]), "epochs": 2, "verbose": 0}
    tuner.search(x[:1500], y[:1500], **data)
    tried = {
        trial.hyperparameters.get("optimizer"): trial.score
        for trial in tuner.oracle.trials.values()
    }
    assert set(tried) == set(NAMES)
    assert tried["normalized_adam"] > 0.8
    (best,) = tuner.get_best_models(1)
    chosen = tuner.get_best_hyperparameters()[0].get("optimizer")
    assert type(best.optimizer) is ALIASES[chosen]
