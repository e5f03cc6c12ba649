"""Adam's second moment at the switch: how far from what would have gathered, had the factors been there?

    python benchmarks/second_moments.py [--networks resmlp_s12 deit_tiny] [--epochs 4] [--json FILE]

A network is trained full-rank for some epochs on scikit-learn's digits and factorized at the ranks of the
Cuttlefish rule. Then gradients of four epochs are taken without training. The truth is the mean square of the
factors' gradients; what a switch has is the mean square of the kernel's gradients, and their running mean.
``uncorrelated`` maps by the squares of the factors; ``mean apart`` (LDAdam, Robert et al., ICLR 2025) maps
the square of the mean exactly and only the rest so; ``correlated`` is what the package does. Given is by what
factor Adam's steps would be too large, in the root mean square of all entries and in the layer where it is
largest, and how far they are off, as the root mean square of the factor's logarithm.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import report
from switch import NETWORKS, configured

import cuttlefish_jax as cf
from cuttlefish_jax.factorize import factor_matrices
from cuttlefish_jax.moments import project_momentum, project_second_moment
from cuttlefish_jax.training.data import materialize
from cuttlefish_jax.training.epoch import train_epoch
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.method import plan_from_config

DECAY = 0.9  # of the running mean, as Adam's


def gathered(network: str, epochs: int) -> tuple[cf.FactorizationPlan, Any, dict[str, Any]]:
    """The plan, the factors, and the means of the gradients and their squares, full-rank and in factors."""
    config = configured(network, 0)
    experiment = Experiment.from_config(config)
    phase = experiment.phase()
    state = experiment.create_state(phase)

    def ranks() -> Any:
        return jax.device_get(cf.stable_ranks(state.params, experiment.kernels))

    first = ranks()
    for epoch in range(epochs):
        state, _ = train_epoch(phase.train_step, state, experiment.train, epoch)
    plan = plan_from_config(config, experiment.kernels, ranks(), first)
    low = cf.factorize_params(state.params, plan)
    task = experiment.task

    def loss(params: Any, inputs: Any, targets: Any, key: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, _ = state.apply_fn(
            variables, *inputs, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )
        return jnp.mean(task.train_loss(outputs, targets))

    @jax.jit
    def add(sums: Any, resident: Any, batch: Any, key: Any) -> Any:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        inputs, targets = task.train_inputs(key, materialize(resident, flat))
        gradient = jax.grad(loss)(state.params, inputs, targets, key)
        of_factors = project_momentum(gradient, low, plan)
        squares = [jax.tree.map(jnp.square, tree) for tree in (gradient, of_factors)]
        mean = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, sums["mean"], gradient)
        added = jax.tree.map(jnp.add, (sums["full"], sums["low"]), tuple(squares))
        return {"mean": mean, "full": added[0], "low": added[1]}

    full_zeros, low_zeros = (jax.tree.map(jnp.zeros_like, tree) for tree in (state.params, low))
    sums = {"mean": full_zeros, "full": full_zeros, "low": low_zeros}
    count = 0
    for epoch in range(epochs, epochs + 4):
        for batch in experiment.train.epoch(epoch):
            sums = add(sums, experiment.train.resident, batch, jax.random.key(count))
            count += 1
    for name in ("full", "low"):
        sums[name] = jax.tree.map(lambda leaf: leaf / count, sums[name])
    return plan, low, sums


def rows_of(network: str, epochs: int) -> list[dict[str, Any]]:
    """One line for each way to map the second moment."""
    plan, low, sums = gathered(network, epochs)
    uncorrelated = project_second_moment(sums["full"], low, plan)
    variance = jax.tree.map(lambda square, mean: jnp.maximum(square - mean**2, 0), sums["full"], sums["mean"])
    mean = jax.tree.map(jnp.square, project_momentum(sums["mean"], low, plan))
    found = {
        "uncorrelated": uncorrelated,
        "mean apart": jax.tree.map(jnp.add, project_second_moment(variance, low, plan), mean),
        "correlated": project_second_moment(sums["full"], low, plan, momentum=sums["mean"]),
    }
    truth = factor_matrices(sums["low"], plan)
    rows = []
    for way, tree in found.items():
        logs = [
            0.5 * (np.log(np.asarray(true) + 1e-30) - np.log(np.asarray(guess) + 1e-30)).ravel()
            for path, pair in factor_matrices(tree, plan).items()
            for true, guess in zip(truth[path], pair, strict=True)
        ]
        rows.append(
            {
                "network": network,
                "second moment": way,
                "factors": len(logs),
                "steps too large": float(np.sqrt(np.mean(np.exp(2 * np.concatenate(logs))))),
                "in the worst": float(max(np.sqrt(np.mean(np.exp(2 * log))) for log in logs)),
                "off by a factor": float(np.exp(np.sqrt(np.mean(np.concatenate(logs) ** 2)))),
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["resmlp_s12", "deit_tiny"], choices=NETWORKS)
    parser.add_argument("--epochs", type=int, default=6, help="trained before")
    parser.add_argument("--json", help="write the table to this file too")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    report(
        [row for network in arguments.networks for row in rows_of(network, arguments.epochs)], arguments.json
    )
