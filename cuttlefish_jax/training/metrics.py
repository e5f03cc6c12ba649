"""How good a network's predictions are: scikit-learn's and SciPy's metrics, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, predictions)


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    # Of class 1. A network that never predicts it has no precision, and scores 0.
    return f1_score(labels, predictions, zero_division=0.0)  # pyright: ignore[reportArgumentType]


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predictions)


def _correlation(name: str) -> Metric:
    def correlation(labels: np.ndarray, predictions: np.ndarray) -> float:
        from scipy import stats

        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0  # a constant is correlated with nothing
        if not np.all(np.isfinite(predictions)):
            return float("nan")
        result: Any = getattr(stats, name)(labels, predictions)
        return result.statistic

    return correlation


METRICS: Mapping[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def compute_metrics(names: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Several metrics of the same predictions.

    Args:
      names: of ``METRICS``: ``accuracy``, ``f1`` (of class 1), ``matthews``; of numbers ``pearson``,
        ``spearman``.
      labels: what is true, ``[n]``.
      predictions: classes, or numbers, ``[n]``.

    Returns:
      ``{name: value}``, the best possible value being 1.

    Example:
      >>> compute_metrics(["accuracy", "matthews"], np.array([0, 1, 1, 0]), np.array([0, 1, 1, 1]))
      {'accuracy': 0.75, 'matthews': 0.5773502691896258}
    """
    return {name: float(METRICS[name](labels, predictions)) for name in names}
