"""Counts the floating-point operations of a function's matrix products and convolutions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of every matrix product and convolution in ``fn(*args)``, two for each multiply-accumulate.

    The function is traced, not run. A convolution's products with its padding are counted, as is the
    custom of the literature; element-wise work is not. A ``lax.scan`` counts as often as it iterates, of
    ``lax.cond`` the dearest branch, the body of ``lax.while_loop`` once.

    Args:
      fn: a function of arrays that JAX can trace.
      *args: arrays or ``jax.ShapeDtypeStruct``, or pytrees of them.

    Returns:
      The number of FLOPs.

    Example:
      >>> import jax.numpy as jnp
      >>> count_flops(jnp.dot, jnp.zeros((4, 8)), jnp.zeros((8, 2)))
      128
    """
    return jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    """As :func:`count_flops`, of a function that is traced already."""
    return sum(times * _flops(eqn) for eqn, times in _equations(jaxpr))


def count_marked(jaxpr: core.Jaxpr) -> Counter[str]:
    """Elements that passed each :func:`mark`, ``name -> number``, in every turn of a loop and vmap."""
    marked: Counter[str] = Counter()
    for eqn, times in _equations(jaxpr):
        name = eqn.params.get("name")
        if isinstance(name, str) and name.startswith(_MARK) and eqn.outvars:
            marked[name.removeprefix(_MARK)] += times * math.prod(_shape(eqn.outvars[0]))
    return marked


def mark(name: str, x: jax.Array) -> jax.Array:
    """``x``, with a note in the traced program that :func:`count_marked` finds."""

    def identity(x: jax.Array) -> jax.Array:
        return x

    identity.__name__ = _MARK + name
    return jax.jit(identity)(x)


_MARK = "mark:"


def _equations(jaxpr: core.Jaxpr, times: int = 1) -> Iterator[tuple[core.JaxprEqn, int]]:
    """Every equation, the nested ones too, with the number of times that it runs."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner = list(_sub_jaxprs(eqn))
        if eqn.primitive.name == "cond":
            inner = [max(inner, key=jaxpr_flops)]
        repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for sub in inner:
            yield from _equations(sub, times * repeats)


def _sub_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)  # a closed one holds it
            if isinstance(inner, core.Jaxpr):
                yield inner


def _flops(eqn: core.JaxprEqn) -> int:
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lhs = _shape(eqn.invars[0])
        return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(lhs[a] for a in contracted)
    if eqn.primitive.name == "conv_general_dilated":
        kernel = _shape(eqn.invars[1])
        output_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // output_features
    return 0


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
