r"""Rewrites trees of arrays into factor space, and back: pure functions on nested dicts.

A kernel's matrix :math:`W \in R^{m \times n}` becomes :math:`U V` with :math:`U = P_r \sqrt{S_r}` and
:math:`V = \sqrt{S_r} Q_r^T` from its truncated SVD :math:`P_r S_r Q_r^T` (Cuttlefish, Wang et al., MLSys
2023). In the tree, ``layer/kernel`` becomes ``layer/u/kernel`` (the layer's reduction axes, then the
rank) and ``layer/v/kernel`` (the rank, then the layer's output axes); everything else that the layer had,
such as its bias, moves to ``layer/v``. Stack axes lead, in their old order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cuttlefish_jax.kernels import (
    Kernel,
    check_kernel,
    is_box,
    kernel_array,
    reboxed,
    subtree,
    unboxed,
)
from cuttlefish_jax.matrices import gram, map_sides, matmul, scaled, tensordot
from cuttlefish_jax.meshes import as_spec, on_any_mesh, spec_of
from cuttlefish_jax.plan.plan import FactorizationPlan, check_plan
from cuttlefish_jax.whitening import checked_calibration, whitened_projection

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Params = Mapping[str, Any]
    U = Float[Array, "*stack m r"]
    V = Float[Array, "*stack r n"]


@functools.singledispatch
def factorize(model: Any, plan: FactorizationPlan, *, calibration: Mapping[str, Array] | None = None) -> Any:
    """The same model with the plan's layers replaced by two factors each.

    Args:
      model: a Flax Linen or NNX module; it is not changed.
      plan: made for this model, or for one of the other kind with the same paths.
      calibration: see :func:`factorize_params`; of an NNX model alone, a Linen module has no params.

    Returns:
      Of a Linen module, one that is initialised, applied (``method=`` included) and called as the model is,
      on the params that :func:`factorize_params` returns; through ``bind``, or as a submodule, it can only be
      called. Of an NNX module, a copy in whose layers' places stand modules with ``u`` and ``v``, the factors
      of the model's own kernels; all other Variables are copies of the model's, shared layers stay shared,
      and an abstract model (``nnx.eval_shape``) gives an abstract one.

    Raises:
      TypeError: if ``model`` is of a kind that has no front end.
      ValueError: if the model is factorized already, if a Linen module is given with a calibration, or if the
        plan was made for another model (of a Linen module, that is when it is first initialised).

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cuttlefish_jax as cf
      >>> model, x = nn.Dense(6), jnp.ones((1, 8))
      >>> plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), {"": 2})
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> low, params_low = cf.factorize(model, plan), cf.factorize_params(params, plan)
      >>> low.apply({"params": params_low}, x).shape
      (1, 6)
      >>> from flax import nnx
      >>> low = cf.factorize(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), plan)
      >>> low.u.kernel.shape, low.v.kernel.shape, low(x).shape
      ((8, 2), (2, 6), (1, 6))
    """
    raise TypeError(f"factorize needs a Flax module, got {type(model).__name__}")


@functools.singledispatch
def factorize_params(
    params: Params, plan: FactorizationPlan, *, calibration: Mapping[str, Array] | None = None
) -> dict[str, Any]:
    """Replaces each of the plan's kernels by the best pair of factors of its rank.

    The factors come from the eigenvectors of the smaller Gram matrix, in float32 on the device: their
    product is the truncated SVD's (Eckart-Young), singular values below 3e-4 of the largest one not told
    apart, and the kernel itself at full rank. They are balanced: both carry the square roots of the singular
    values. Those of a kernel with a NaN or an infinity are NaN, and no other layer's; a plan from stable
    ranks is never made of such a kernel.

    With ``calibration`` the factors are those with which the layers' outputs change least on the batches that
    it was measured on (:mod:`cuttlefish_jax.whitening`); a layer of which it has only zeros is factorized as
    without it.

    Args:
      params: the params tree of the model (not changed), or an ``nnx.State`` with its params, or an NNX
        model.
      plan: made for this model.
      calibration: of the same params, by :func:`cuttlefish_jax.calibrate`.

    Returns:
      Nested dicts, the very tree that ``factorize(model, plan).init`` makes, in the dtypes of ``params``. Of
      a state or an NNX model, an ``nnx.State``: that of ``factorize(model, plan)``.

    Raises:
      ValueError: if ``params``, or ``calibration``, are not those of the plan's model, or a kernel has no
        floating-point dtype; the message names the first difference.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cuttlefish_jax as cf
      >>> plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(nn.Dense(6), jnp.ones((1, 8))), {"": 2})
      >>> low = factorize_params({"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}, plan)
      >>> jax.tree.map(jnp.shape, low)
      {'u': {'kernel': (8, 2)}, 'v': {'bias': (6,), 'kernel': (2, 6)}}
    """
    check_plan(plan)
    kernels = [plan.kernels[path] for path in plan.ranks]
    for kernel in kernels:
        check_kernel(params, kernel, jnp.floating)
    factors = _balanced_factors(
        {kernel.path: kernel_array(params, kernel) for kernel in kernels},
        plan,
        None if calibration is None else checked_calibration(calibration, kernels),
    )
    low = split_layers(params, plan, lambda path, _: factors[path])
    if plan.extra_batch_norm:
        low = _add_extra_norms(low, plan, {"scale": jnp.ones, "bias": jnp.zeros})
    return low


@functools.singledispatch
def merge_params(params: Params, plan: FactorizationPlan) -> dict[str, Any]:
    """The original tree, each kernel the product of its factors: the unmodified model serves it.

    Args:
      params: factorized params (not changed), or an ``nnx.State`` with these, or a factorized NNX model.
      plan: the plan they were factorized with.

    Returns:
      Nested dicts, in the dtypes of ``params``. Of a state or an NNX model, an ``nnx.State``, for
      ``nnx.update(model, state)``.

    Raises:
      ValueError: if ``params`` were not factorized with this plan, or if the plan has extra batch norms
        (their shift and scale depend on statistics outside ``params``: there is no equal kernel).
    """
    check_plan(plan)
    if plan.extra_batch_norm:
        raise ValueError("a plan with extra batch norms cannot be merged: use the factorized model")
    merged = copied(params)
    for path, product in _products(factor_arrays(params, plan), plan).items():
        kernel = plan.kernels[path]
        layer = subtree(params, path)
        u_box, v_box = layer["u"][kernel.param], layer["v"]["kernel"]
        names = kernel.names_of(u_box.names, v_box.names) if is_box(u_box) else None
        rest = {key: value for key, value in layer["v"].items() if key != "kernel"}
        whole = reboxed(u_box, product, names)
        merged = _replaced(merged, path, {kernel.param: whole, **rest})
    return merged


def factor_arrays(params: Params, plan: FactorizationPlan) -> dict[str, tuple[Array, Array]]:
    """``{path: (u, v)}`` of every factorized layer, as they are in ``params``, out of their boxes.

    Raises:
      ValueError: if ``params`` were not factorized with this plan.
    """
    factors = {}
    for path, rank in plan.rank_entries:
        layer = subtree(params, path)
        if "u" not in layer or "v" not in layer:
            raise ValueError(
                f"the layer at {path!r} is not factorized: it has {sorted(layer)}, expected u and v"
            )
        u, v = plan.kernels[path].factors(rank)
        for kernel in (u, v):
            check_kernel(params, kernel)
        factors[path] = kernel_array(params, u), kernel_array(params, v)
    return factors


def factor_matrices(params: Params, plan: FactorizationPlan) -> dict[str, tuple[U, V]]:
    """``{path: (f[*stack, m, r], f[*stack, r, n])}`` of every factorized layer.

    Raises:
      ValueError: if ``params`` were not factorized with this plan.
    """
    return as_matrices(factor_arrays(params, plan), plan)


def as_matrices(
    factors: Mapping[str, tuple[Array, Array]], plan: FactorizationPlan
) -> dict[str, tuple[U, V]]:
    """The same of what :func:`factor_arrays` gives."""
    matrices = {}
    for path, (u, v) in factors.items():
        of_u, of_v = plan.kernels[path].factors(plan.ranks[path])
        matrices[path] = of_u.to_matrix(u), of_v.to_matrix(v)
    return matrices


def factor_sides(u: Array, v: Array, kernel: Kernel, rank: int) -> tuple[Array, Array]:
    """Two factors in the axes of their kernel, ``[*stack, *rows, r]`` and ``[*stack, r, *columns]``."""
    of_u, of_v = kernel.factors(rank)
    columns = [kernel.shape[a] for a in kernel.output_axes]
    # A window is one position.
    return of_u.to_sides(u), of_v.to_sides(v).reshape(*of_v.stack_shape, of_v.m, *columns)


def factor_specs(kernel: Kernel, spec: tuple[Any, ...]) -> tuple[PartitionSpec, PartitionSpec]:
    """How the factors lie on a mesh whose kernel lies on it by ``spec``: the axis of the rank whole."""
    u, v = kernel.factor_names(spec)
    return as_spec(u), as_spec(v)


def split_layers(
    tree: Params, plan: FactorizationPlan, split: Callable[[str, Any], tuple[Any, Any]]
) -> dict[str, Any]:
    """Gives every planned layer of a params-shaped tree its two factors.

    Args:
      tree: a tree of the full-rank params' structure (params, a moment of them, a mask ...).
      plan: the plan.
      split: called with a layer's path and the leaf that stands in the kernel's place; returns the two
        that stand in the factors' place.
    """
    low = copied(tree)
    for path in plan.ranks:
        layer = dict(subtree(tree, path))
        kernel = plan.kernels[path]
        box = layer.pop(param := kernel.param)
        u, v = split(path, unboxed(box))
        if is_box(box):
            u_names, v_names = kernel.factor_names(box.names)
            u, v = reboxed(box, u, u_names), reboxed(box, v, v_names)
        low = _replaced(low, path, {"u": {param: u}, "v": {"kernel": v, **layer}})
    return low


def factorize_batch_stats(batch_stats: Params | None, plan: FactorizationPlan) -> dict[str, Any]:
    """The model's ``batch_stats`` with those of the plan's extra batch norms added (mean 0, variance 1).

    Args:
      batch_stats: the full-rank model's (not changed); ``{}`` or ``None`` if it has none.
      plan: made for this model.

    Returns:
      Nested dicts, the very tree that ``factorize(model, plan).init`` makes.
    """
    if not plan.extra_batch_norm:
        return copied(batch_stats)
    return _add_extra_norms(batch_stats or {}, plan, {"mean": jnp.zeros, "var": jnp.ones})


@functools.partial(jax.jit, static_argnames="plan")
def _balanced_factors(
    params: dict[str, Array], plan: FactorizationPlan, calibration: tuple[Array, ...] | None
) -> dict[str, tuple[Array, Array]]:
    # In the order of the plan: a dict that passes through jit comes back sorted by key.
    kernels = [plan.kernels[path] for path in plan.ranks]

    def run(
        params: dict[str, Array], calibration: tuple[Array, ...] | None
    ) -> dict[str, tuple[Array, Array]]:
        sides = [kernel.to_sides(params[kernel.path]).astype(jnp.float32) for kernel in kernels]
        if calibration is None:
            all_factors = map_sides(_balanced, sides, kernels)
        else:
            measured = [kernel.to_sides(x) for kernel, x in zip(kernels, calibration, strict=True)]
            ranks = [jnp.full(kernel.stack_shape, plan.ranks[kernel.path]) for kernel in kernels]
            all_factors = map_sides(_whitened, sides, kernels, measured, ranks)
        factors = {}
        for kernel, (u, v) in zip(kernels, all_factors, strict=True):
            rank, stack = plan.ranks[kernel.path], (slice(None),) * len(kernel.stack_axes)
            halves = u[..., :rank], v[(*stack, slice(rank))]
            factors[kernel.path] = shape_factors(halves, kernel, params[kernel.path].dtype)
        return factors

    specs = {kernel.path: factor_specs(kernel, spec_of(params[kernel.path])) for kernel in kernels}
    return on_any_mesh(run, params, calibration, out_specs=specs)


@functools.partial(jax.jit, static_argnames="plan")
def _products(factors: dict[str, tuple[Array, Array]], plan: FactorizationPlan) -> dict[str, Array]:
    """The kernels that factors are of, on a mesh where these are."""

    def run(factors: dict[str, tuple[Array, Array]]) -> dict[str, Array]:
        kernels = {}
        for path, (u, v) in as_matrices(factors, plan).items():
            dtype = jnp.promote_types(u.dtype, jnp.float32)
            product = matmul(u.astype(dtype), v.astype(dtype)).astype(u.dtype)
            kernels[path] = plan.kernels[path].from_matrix(product)
        return kernels

    specs = {
        path: as_spec(plan.kernels[path].names_of(spec_of(u), spec_of(v))) for path, (u, v) in factors.items()
    }
    return on_any_mesh(run, factors, out_specs=specs)


def shape_factors(halves: tuple[Array, Array], kernel: Kernel, dtype: Any) -> tuple[Array, Array]:
    """The two factors of a layer's matrix, in their own axes, as the arrays that stand in its params."""
    u, v = kernel.factors(halves[0].shape[-1])
    return u.from_sides(halves[0]).astype(dtype), v.from_sides(halves[1]).astype(dtype)


def _balanced(w: Float[Array, "*m *n"], rows: int) -> tuple[Array, Array]:
    """All ``k = min(m, n)`` columns of the balanced factors, the largest singular value first.

    Returns:
      ``f32[*m, k]`` and ``f32[k, *n]``.
    """
    n = math.prod(w.shape[rows:])
    if math.prod(w.shape[:rows]) < n:
        v, u = _balanced(jnp.moveaxis(w, range(rows), range(-rows, 0)), w.ndim - rows)
        return jnp.moveaxis(u, 0, -1), jnp.moveaxis(v, -1, 0)
    w, scale = scaled(w)
    # Whatever the rounding of q and s, u v = w q q^T: an orthogonal projection of w, exact at full rank.
    eigenvalues, q = jnp.linalg.eigh(gram(w, range(rows)))
    eigenvalues, q = eigenvalues[::-1], q[:, ::-1]
    # Below the Gram matrix's rounding (s < 3e-4 s_max) the split of s between u and v means nothing.
    floor = jnp.maximum(1e-7 * eigenvalues[:1], jnp.finfo(w.dtype).tiny)
    root = jnp.maximum(eigenvalues, floor) ** 0.25
    half = jnp.sqrt(scale)
    columns = w.shape[rows:]
    u = tensordot(w, q.reshape(*columns, n), len(columns)) / root * half
    # Singular vectors may all change their sign: rounding, and with it how w lies on devices, is not to say.
    sign = jnp.where(jnp.sum(u * jnp.abs(u), axis=range(u.ndim - 1)) < 0, -1, 1)
    return u * sign, (q * (sign * root * half)).T.reshape(n, *columns)


def _whitened(w: Float[Array, "*m *n"], rows: int, measured: Array, rank: Array) -> tuple[Array, Array]:
    """The same of the best matrix of a rank for the inputs that were measured."""
    b, c = whitened_projection(w, rows, measured, rank)
    u, v = _balanced(b, rows)
    return u, tensordot(v, c, 1)


def _add_extra_norms(tree: Params, plan: FactorizationPlan, arrays: Mapping[str, Callable]) -> dict[str, Any]:
    low = copied(tree)
    for path, rank in plan.rank_entries:
        shape = plan.kernels[path].stacked_shape((rank,))
        norm = {name: make(shape, jnp.float32) for name, make in arrays.items()}
        low = _replaced(low, f"{path}/norm".lstrip("/"), norm)
    return low


def copied(tree: Any) -> Any:
    """Nested dicts of the same leaves, whatever kinds of mapping there were."""
    return {key: copied(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _replaced(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """``tree``, which is ours to change, with ``value`` at ``path``."""
    if not path:
        return value
    *parents, last = path.split("/")
    node = tree
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return tree
