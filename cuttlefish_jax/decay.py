"""Frobenius decay: weight decay on the products of factors, as an optax transformation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import optax

from cuttlefish_jax.factor_updates import transform_factors
from cuttlefish_jax.matrices import matmul
from cuttlefish_jax.plan.plan import FactorizationPlan, check_plan

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from cuttlefish_jax.factor_updates import Pairs


def frobenius_decay(coefficient: float, plan: FactorizationPlan) -> optax.GradientTransformation:
    r"""Adds the gradient of :math:`\frac{c}{2} \sum_{layers} \|U V\|_F^2` to the updates of the factors.

    :math:`g_U \leftarrow g_U + c\, U (V V^T)` and :math:`g_V \leftarrow g_V + c\, (U^T U) V`, through the
    ``r x r`` Gram matrices: the ``m x n`` product is never made. It takes the place of weight decay on the
    factors, and, as L2 does, stands before momentum in the chain; all other parameters pass unchanged.

    Args:
      coefficient: :math:`c >= 0`.
      plan: the plan that the params were factorized with.

    Returns:
      A stateless transformation; its ``update`` needs ``params``. Layers that are masked (``optax.masked``,
      ``optax.multi_transform``), or that the ``wrt`` of an ``nnx.Optimizer`` leaves out, are left out.

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
    check_plan(plan)
    if plan.extra_batch_norm:
        raise ValueError("extra batch norms and Frobenius decay exclude each other: turn one of them off")

    def add(factors: Pairs, updates: Pairs) -> Pairs:
        added = {}
        for path, pair in factors.items():
            (old_u, old_v), (new_u, new_v) = updates[path], _gradients(*pair)
            added[path] = (
                old_u + coefficient * new_u.astype(old_u.dtype),
                old_v + coefficient * new_v.astype(old_v.dtype),
            )
        return added

    return transform_factors("frobenius_decay", plan, add)


def _gradients(
    u: Float[Array, "*stack m r"], v: Float[Array, "*stack r n"]
) -> tuple[Float[Array, "*stack m r"], Float[Array, "*stack r n"]]:
    return matmul(u, matmul(v, v.mT)), matmul(matmul(u.mT, u), v)
