"""Truncation in the metric of a layer's inputs (activation-whitened SVD): a prototype for rank_rules.py.

With ``S = E[x x^T] = L L^T`` over the inputs ``x`` of a kernel ``W``, the product of rank ``r`` that changes
the layer's outputs least is ``L^-T`` times the truncated SVD of ``L^T W``. That is ``W Q_r Q_r^T`` with the
leading eigenvectors ``Q_r`` of ``G = W^T S W``, the second moments of the layer's own outputs without bias:
all that is needed is what the layers give, of convolutions too.

References:
  Yuan et al., `ASVD <https://arxiv.org/abs/2312.05821>`_, 2023; Wang et al., `SVD-LLM
  <https://arxiv.org/abs/2403.07378>`_, ICLR 2025: truncation in the metric of the inputs.
  Zhang et al., `Accelerating Very Deep Convolutional Networks <https://arxiv.org/abs/1505.06798>`_, TPAMI
  2016, section 3.1: by the eigenvectors of the outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import kernel_matrix
from cuttlefish_jax.training.data import materialize

# Of the second moments of white inputs: directions that no calibration input has are not lost for nothing.
RIDGE = 1e-3


def output_moments(experiment: Any, state: Any, *, epoch: int, batches: int) -> dict[str, np.ndarray]:
    """``G = E[z z^T]``, ``f64[n, n]``, of the outputs ``z`` of dense layers and convolutions, without bias.

    Around their mean where the layer has no bias: there a batch norm follows, which takes the mean away.

    Args:
      experiment: of the run.
      state: of the full-rank network, evaluated with its running statistics.
      epoch: whose first batches are taken, augmented as in training.
      batches: how many.
    """
    model, task, kernels = experiment.model, experiment.task, experiment.kernels

    @jax.jit
    def of_batch(state: Any, resident: Any, batch: Any) -> dict[str, tuple[Any, Any]]:
        found: dict[str, tuple[Any, Any]] = {}

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            result, layer = call(*args, **kwargs), context.module
            path = "/".join(layer.path)
            if context.method_name == "__call__" and type(layer) in (nn.Dense, nn.Conv) and path in kernels:
                z = result.astype(jnp.float32)
                if layer.use_bias:
                    z = z - layer.variables["params"]["bias"]
                z = z.reshape(-1, z.shape[-1])
                moments = z.T @ z / len(z), jnp.mean(z, axis=0) * (not layer.use_bias)
                found[path] = jax.tree.map(jnp.add, found[path], moments) if path in found else moments
            return result

        key = jax.random.fold_in(state.key, batch["index"][0])
        inputs, _ = task.train_inputs(key, materialize(resident, batch))
        with nn.intercept_methods(intercept):
            model.apply(state.eval_variables, *inputs, train=False)
        return found

    sums: dict[str, list[np.ndarray]] = {}
    for batch in itertools.islice(experiment.train.epoch(epoch), batches):
        one = jax.tree.map(lambda x: x[0], batch)  # that of the first device
        for path, moments in jax.device_get(of_batch(state, experiment.train.resident, one)).items():
            parts = [np.asarray(moment, np.float64) / batches for moment in moments]
            sums[path] = [a + b for a, b in zip(sums[path], parts, strict=True)] if path in sums else parts
    return {path: second - np.outer(mean, mean) for path, (second, mean) in sums.items()}


class Whitened:
    """Kernels in the metric of their inputs.

    Attributes:
      singular_values: ``{path: f64[min(m, n)]}``, descending: a layer's outputs lose ``sum_{i > r} s_i^2`` of
        their mean square at rank ``r``.
    """

    def __init__(self, kernels: cf.Kernels, params: Any, moments: Mapping[str, np.ndarray]):
        self.singular_values: dict[str, np.ndarray] = {}
        self._kernels: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for path, of_outputs in moments.items():
            w = np.asarray(kernel_matrix(params, kernels[path]), np.float64)
            white = w.T @ w * (np.trace(of_outputs) / np.sum(w**2))
            values, vectors = np.linalg.eigh(of_outputs + RIDGE * white)
            self._kernels[path] = w, vectors[:, ::-1]
            self.singular_values[path] = np.sqrt(np.maximum(values[::-1], 0))[: kernels[path].max_rank]

    def factors(self, path: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """The truncated kernel's balanced factors, ``f64[m, rank]`` and ``f64[rank, n]``."""
        w, vectors = self._kernels[path]
        p, s, qt = np.linalg.svd(w @ vectors[:, :rank], full_matrices=False)
        return p * np.sqrt(s), np.sqrt(s)[:, None] * (qt @ vectors[:, :rank].T)
