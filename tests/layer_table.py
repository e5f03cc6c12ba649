"""Every layer in every context and dtype, for both front ends: what test_layer_table.py compares.

All layers of one context and dtype are one model, each called on an input of its own: one program in place of
eleven. What to expect is computed without that context: by the bare layer, in float32, copy by copy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel, subtree

BATCH, RANK = 8, 3  # one example for each of the eight devices; half of the 6 that all matrices have

# By layer, without the batch; the embedding's are integers.
INPUTS = {
    "dense": (2, 24),
    "conv_1d": (7, 8),
    "conv_2d": (5, 4, 4),
    "conv_3d": (3, 4, 3, 2),
    "transposed": (3, 4, 4),
    "general": (4, 2, 6),
    "general_batch": (2, 4, 6),
    "einsum": (2, 24),
    "einsum_batch": (5, 24),
    "attention": (3, 24),
    "embed": (3,),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Of the norm of what is compared. For float32 it is what the library promises. In bfloat16, of 8 bits, a
# number is rounded up to eight times on its way: both factors, what is between and what comes out, and that
# twice in attention, whose layers come one after the other.
TOLERANCE = {"float32": 1e-5, "bfloat16": 8 * 2.0**-8}


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a layer stands.

    Attributes:
      path: of the layer, below the name of its cell.
      twice: whether it is called a second time, on its input turned round.
      axis: of its copies, in each of its params; their outputs are on the axis after the batch.
      copies: how many these are.
    """

    path: str = "layer"
    twice: bool = False
    axis: int | None = None
    copies: int = 1


CONTEXTS = {
    "plain": Context(),
    "setup": Context(),
    "shared": Context(twice=True),
    "remat": Context(),
    "scan": Context(axis=0, copies=2),
    "vmap": Context(axis=-1, copies=5),
    "nested": Context("inner/inner/layer"),
}


class Cells(Protocol):
    """One context and dtype of a front end: a model with all layers in it."""

    params: dict[str, Any]
    kernels: cf.Kernels

    def factorized(self, plan: cf.FactorizationPlan) -> tuple[Any, Callable[[Any, Any], Any]]:
        """The factorized model's params, and the function of these and the inputs that it is."""
        ...

    def made(self, plan: cf.FactorizationPlan) -> Any:
        """Shapes and dtypes of the factorized model's params, as it makes them itself."""
        ...

    def plain(self, params: Any) -> dict[str, Any]:
        """Params as nested dicts of arrays."""
        ...


class FrontEnd(Protocol):
    """A module with the layers of one front end."""

    LAYERS: Mapping[str, Callable[..., Any]]
    IMPOSSIBLE: Mapping[str, str]  # context -> why there is none

    def Cells(self, context: str, dtype: Any, inputs: Any) -> Cells: ...

    def bare(self, name: str) -> Callable[[Any, Any], Any]:
        """The layer alone in float32, as a function of its params and its input."""
        ...


def make_inputs() -> dict[str, Any]:
    """An input for each layer, exact in either dtype."""
    rng = np.random.default_rng(1)
    inputs = {}
    for name, shape in INPUTS.items():
        values = jnp.asarray(rng.standard_normal((BATCH, *shape)), jnp.bfloat16).astype(jnp.float32)
        inputs[name] = jnp.asarray(rng.integers(0, 24, (BATCH, *shape))) if name == "embed" else values
    return inputs


def filled(shapes: Any) -> Any:
    """Random values for the shapes and dtypes of params."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype), shapes)


def distance(actual: Any, expected: Any) -> float:
    """Of two arrays, relative to the norm of the second; in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


class Table:
    """What has to be computed for all layers of one context and dtype."""

    def __init__(self, front_end: FrontEnd, context: str, dtype: str):
        self.front_end, self.context, self.inputs = front_end, CONTEXTS[context], make_inputs()
        self.dtype, self.tolerance = DTYPES[dtype], TOLERANCE[dtype]
        self.cells = cells = front_end.Cells(context, self.dtype, self.inputs)
        self.params, self.kernels = cells.params, cells.kernels
        self.full, self.half = self._plan(2 * RANK), self._plan(RANK)
        params, low = cells.factorized(self.half)
        self.factors, self.made = cells.plain(params), cells.made(self.half)
        self.truncated = jax.jit(low)(params, self.inputs)
        params, low = cells.factorized(self.full)
        self.merged = cells.plain(jax.jit(lambda params: cf.merge_params(params, self.full))(params))
        shards = jax.tree.map(lambda x: x.reshape(BATCH, 1, *x.shape[1:]), self.inputs)
        mapped = jax.device_get(jax.pmap(low, in_axes=(None, 0))(params, shards))
        self.kept = jax.tree.map(lambda y: y.reshape(BATCH, *y.shape[2:]), mapped)

    def _plan(self, rank: int) -> cf.FactorizationPlan:
        return cf.FactorizationPlan.from_ranks(self.kernels, dict.fromkeys(self.kernels, rank))

    def kernels_of(self, name: str) -> dict[str, Kernel]:
        """The kernels of a layer, by their paths in it."""
        keys = [*name.split("/"), *self.context.path.split("/")]
        found = {tuple(path.split("/")): kernel for path, kernel in self.kernels.items()}
        return {"/".join(p[len(keys) :]): k for p, k in found.items() if list(p[: len(keys)]) == keys}

    def layer(self, tree: Mapping[str, Any], name: str) -> Any:
        """The params of a layer."""
        return subtree(tree, f"{name}/{self.context.path}")

    def expected(self, name: str, params: Any = None) -> np.ndarray:
        """What a layer gives, with its own params or others, by the bare layer in float32."""
        context, call, x = self.context, self.front_end.bare(name), self.inputs[name]
        params = self.layer(self.params, name) if params is None else params
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)

        def one(params: Any) -> np.ndarray:
            output = np.asarray(call(params, x))
            return output + np.asarray(call(params, x[:, ::-1])) if context.twice else output

        if context.axis is None:
            return one(params)
        copies = [
            jax.tree.map(functools.partial(np.take, indices=i, axis=context.axis), params)
            for i in range(context.copies)
        ]
        return np.stack([one(copy) for copy in copies], axis=1)

    def best(self, name: str) -> Any:
        """A layer's params with the best kernels of the lower rank: NumPy's SVD in float64, cut off."""
        params = jax.tree.map(lambda leaf: leaf, self.layer(self.params, name))
        for path, kernel in self.kernels_of(name).items():
            layer = subtree(params, path)
            matrix = np.asarray(kernel.to_matrix(layer[kernel.param]), np.float64)
            p, s, q = np.linalg.svd(matrix, full_matrices=False)
            cut_off = (p[..., :RANK] * s[..., None, :RANK]) @ q[..., :RANK, :]
            layer[kernel.param] = np.asarray(kernel.from_matrix(cut_off))
        return params
