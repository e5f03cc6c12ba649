r"""Preconditioned factors: the product takes the step that the kernel would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import optax

from cuttlefish_jax.factor_updates import transform_factors
from cuttlefish_jax.inverse_roots import inverse_roots
from cuttlefish_jax.matrices import matmul
from cuttlefish_jax.plan.plan import FactorizationPlan, check_plan

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from cuttlefish_jax.factor_updates import Pairs


def precondition_factors(
    plan: FactorizationPlan, *, damping: float = 1e-3, normalized: bool = False, once: bool = True
) -> optax.GradientTransformation:
    r"""Makes the steps of the factors those of their product, however its singular values are split.

    A plain step on the factors of :math:`W = U V` moves the product by :math:`-\eta (G V^T V + U U^T G)`:
    the learning rate of a direction is multiplied by its singular value. Here

    .. math:: g_U \leftarrow (1 - \tfrac12 P_U)\, g_U (V V^T)^{-1}, \qquad
              g_V \leftarrow (U^T U)^{-1} g_V (1 - \tfrac12 P_V)

    with the projections :math:`P_U, P_V` on the columns of :math:`U` and the rows of :math:`V`, and the
    product moves by :math:`-\eta (G P_V + P_U G - P_U G P_V)`: the kernel's own step, projected on what
    matrices of this rank can follow. At full rank it is the kernel's step, so its learning rate stays right.

    It stands behind momentum, which then is one of plain gradients of the factors, and is carried over a
    switch as such. L2 decay of the factors becomes one of the singular values' sum here:
    :func:`frobenius_decay`, also before momentum, is what stays L2 decay of the kernel. Costs are matrix
    products of ``r x r`` with the factors, ``4 r^2 (m + n)`` multiplications for each layer, and some
    ``60 r^3`` for the inverses.

    Args:
      plan: the plan that the params were factorized with.
      damping: added to the Gram matrices, as a share of their mean eigenvalue: singular values far below
        the mean do not get larger steps than that.
      normalized: the updates do not scale with the gradient, as those of Adam or Lion: they are multiplied by
        the inverse square roots alone, so that the product's step has the norm of the factors' updates.
      once: count once what both factors move alike, as above; False is the published method, without the
        halves, whose step is up to twice the kernel's. Has no meaning with ``normalized``.

    Returns:
      A stateless transformation; its ``update`` needs ``params``. Layers that are masked (``optax.masked``,
      ``optax.multi_transform``), or that the ``wrt`` of an ``nnx.Optimizer`` leaves out, are left out.

    Raises:
      ValueError: for a damping below 0, or a plan with extra batch norms: the step of a product with a norm
        inside is another.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, optax, cuttlefish_jax as cf
      >>> kernels = cf.find_kernels(nn.Dense(6), jnp.ones((1, 8)))
      >>> plan = cf.FactorizationPlan.from_ranks(kernels, {"": 2})
      >>> tx = optax.chain(
      ...     optax.trace(0.9), cf.precondition_factors(plan), optax.scale_by_learning_rate(0.1)
      ... )
      >>> adam = optax.scale_by_adam()
      >>> tx = optax.chain(adam, cf.precondition_factors(plan, normalized=True), optax.scale(-1e-3))

    References:
      Tong, Ma, Chi, `Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent
      <https://arxiv.org/abs/2005.08898>`_, JMLR 2021. Zhang, Pilanci, `Riemannian Preconditioned LoRA
      <https://arxiv.org/abs/2402.02347>`_, ICML 2024. Vandereycken, `Low-Rank Matrix Completion by
      Riemannian Optimization <https://arxiv.org/abs/1209.3834>`_, SIAM J. Optim. 2013, section 2.1: the
      projection.
    """
    if not damping >= 0:
        raise ValueError(f"precondition_factors damping {damping} is not a number >= 0")
    check_plan(plan)
    if plan.extra_batch_norm:
        raise ValueError("extra batch norms and preconditioned factors exclude each other: turn one off")

    def change(factors: Pairs, updates: Pairs) -> Pairs:
        grams = [gram for u, v in factors.values() for gram in (_gram(u.mT), _gram(v))]
        roots = iter(inverse_roots(grams, damping=damping))
        changed = {}
        for path, (u, v) in factors.items():
            of_u, of_v = (root if normalized else matmul(root, root) for root in (next(roots), next(roots)))
            g_u, g_v = (update.astype(of_u.dtype) for update in updates[path])
            if once and not normalized:
                g_u, g_v = (
                    g_u - 0.5 * matmul(u, matmul(of_u, matmul(u.mT, g_u))),
                    g_v - 0.5 * matmul(matmul(matmul(g_v, v.mT), of_v), v),
                )
            changed[path] = matmul(g_u, of_v), matmul(of_u, g_v)
        return changed

    return transform_factors("precondition_factors", plan, change)


def _gram(v: Float[Array, "*stack r n"]) -> Float[Array, "*stack r r"]:
    v = v.astype(jnp.promote_types(v.dtype, jnp.float32))
    return matmul(v, v.mT)
