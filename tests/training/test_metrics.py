"""Metrics by hand-made definitions."""

import math

import numpy as np
import pytest

from cuttlefish_jax.training.metrics import METRICS, compute_metrics

LABELS = np.array([0, 0, 1, 1, 1, 0, 1, 0, 1, 1])
PREDICTIONS = np.array([0, 1, 1, 0, 1, 0, 1, 1, 1, 1])
TP, TN, FP, FN = 5, 2, 2, 1


def test_classes():
    found = compute_metrics(["accuracy", "f1", "matthews"], LABELS, PREDICTIONS)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["f1"] == pytest.approx(2 * TP / (2 * TP + FP + FN))
    above = TP * TN - FP * FN
    below = math.sqrt((TP + FP) * (TP + FN) * (TN + FP) * (TN + FN))
    assert found["matthews"] == pytest.approx(above / below)


def test_numbers():
    labels = np.array([0.0, 1.0, 2.0, 4.0], np.float32)
    predictions = np.array([0.1, 0.3, 9.0, 8.0], np.float32)
    found = compute_metrics(["pearson", "spearman"], labels, predictions)
    assert found["pearson"] == pytest.approx(np.corrcoef(labels, predictions)[0, 1], rel=1e-6)
    assert found["spearman"] == pytest.approx(np.corrcoef([0, 1, 2, 3], [0, 1, 3, 2])[0, 1])


@pytest.mark.parametrize("name", METRICS)
def test_a_network_that_says_the_same_of_everything(name):
    labels = LABELS.astype(np.float32 if name in ("pearson", "spearman") else np.int32)
    (value,) = compute_metrics([name], labels, np.zeros_like(labels)).values()
    assert value == pytest.approx(0.4 if name == "accuracy" else 0.0)


def test_numbers_that_are_not_finite_have_no_correlation():
    labels = np.array([0.0, 1.0, 2.0], np.float32)
    found = compute_metrics(["pearson", "spearman"], labels, np.array([0.0, np.inf, 1.0], np.float32))
    assert np.isnan(found["pearson"]) and np.isnan(found["spearman"])
