"""Frobenius decay: weight decay on the products of factors, as an optax transformation."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.factorize import factor_matrices
from cuttlefish_jax.kernels import reboxed, subtree, unboxed
from cuttlefish_jax.params import unwrap
from cuttlefish_jax.plan.plan import FactorizationPlan

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def frobenius_decay(coefficient: float, plan: FactorizationPlan) -> optax.GradientTransformation:
    r"""Adds the gradient of :math:`\frac{c}{2} \sum_{layers} \|U V\|_F^2` to the updates of the factors.

    :math:`g_U \leftarrow g_U + c\, U (V V^T)` and :math:`g_V \leftarrow g_V + c\, (U^T U) V`, through the
    ``r x r`` Gram matrices: the ``m x n`` product is never made. It takes the place of weight decay on the
    factors, and, as L2 does, stands before momentum in the chain; all other parameters pass unchanged.

    Args:
      coefficient: :math:`c >= 0`.
      plan: the plan that the params were factorized with.

    Returns:
      A stateless transformation; its ``update`` needs ``params``.

    Raises:
      ValueError: for a negative coefficient, or a plan with extra batch norms: a norm between the factors
        takes the scale out of their product, which then regularises nothing.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, optax, cuttlefish_jax as cf
      >>> kernels = cf.find_kernels(nn.Dense(6), jnp.ones((1, 8)))
      >>> plan = cf.FactorizationPlan.from_ranks(kernels, {"": 2})
      >>> tx = optax.chain(cf.frobenius_decay(1e-4, plan), optax.sgd(0.1, momentum=0.9))

    References:
      Khodak et al., `Initialization and Regularization of Factorized Neural Layers
      <https://arxiv.org/abs/2105.01029>`_, 2021; used by Cuttlefish (Wang et al., MLSys 2023).
    """
    if not coefficient >= 0:
        raise ValueError(f"frobenius_decay coefficient {coefficient} is not a number >= 0")
    if plan.extra_batch_norm:
        raise ValueError("extra batch norms and Frobenius decay exclude each other: turn one of them off")

    def update(updates: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError("frobenius_decay needs params: call tx.update(updates, state, params)")
        params, (updates, rewrap) = unwrap(params)[0], unwrap(updates)
        for path, factors in factor_matrices(params, plan).items():
            kernels = plan.kernels[path].factors(plan.ranks[path])
            for kernel, gradient in zip(kernels, _gradients(*factors), strict=True):
                box = subtree(updates, kernel.path)[kernel.param]
                old = unboxed(box)
                new = old + coefficient * kernel.from_matrix(gradient).astype(old.dtype)
                updates = _with_kernel(updates, [*kernel.path.split("/"), kernel.param], reboxed(box, new))
        return rewrap(updates)

    return optax.stateless(update)


def _gradients(
    u: Float[Array, "*stack m r"], v: Float[Array, "*stack r n"]
) -> tuple[Float[Array, "*stack m r"], Float[Array, "*stack r n"]]:
    return _matmul(u, _matmul(v, v.mT)), _matmul(_matmul(u.mT, u), v)


def _with_kernel(tree: Any, keys: list[str], value: Any) -> Any:
    key, *inner = keys
    return {**tree, key: _with_kernel(tree[key], inner, value) if inner else value}
