"""Diagnoses a model and its gradients on a few batches before training."""

from keras_normopt.diagnosis.baselines import Constants, Targets
from keras_normopt.diagnosis.diagnosing import Diagnosis, diagnose
from keras_normopt.diagnosis.finding import Finding
from keras_normopt.diagnosis.first_layer import Range
from keras_normopt.diagnosis.measure import Block

__all__ = [
    "Block",
    "Constants",
    "Diagnosis",
    "Finding",
    "Range",
    "Targets",
    "diagnose",
]
