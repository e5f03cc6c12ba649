"""Histories of stable ranks, recorded and made up, and how a tracker sees them."""

import json
import pathlib

import numpy as np

from cuttlefish_jax.tracker import RankTracker

TRAJECTORIES = pathlib.Path(__file__).parent / "data" / "trajectories"


def replay(history, criterion):
    """A tracker that was fed ``history`` (path -> values) until it converged or the history ended."""
    tracker = RankTracker(criterion=criterion)
    for values in zip(*history.values(), strict=True):
        if tracker.update(dict(zip(history, values, strict=True))):
            break
    return tracker


def switch_epoch(series, criterion):
    return replay({"layer": list(series)}, criterion).switch_epoch


def noisy_trend(slope, noise, seed, length=41):
    """Ranks that change by ``slope`` per epoch, with independent relative noise."""
    rng = np.random.default_rng(seed)
    return 100 * np.exp(slope * np.arange(length) + noise * rng.standard_normal(length))


def load_trajectory(path):
    """``{"history": {path: [stable rank, ...]}}``, initialisation first: what RankTracker.to_state() has."""
    return json.loads(path.read_text())["history"]
