"""Abstract runs of a Linen model's ``init``: nothing is computed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import core

# ``nn.jit`` looks its traces up by a module's fields, its variables' shapes and its scope's flags, which the
# scopes below inherit; not by its path, nor by what intercepts it. This flag has to tell the rest.
FLAG = "cuttlefish"


class Unique:
    """A flag that no other equals, not even itself: ``nn.jit`` goes by the elements of what has elements.

    It is for the calls that make params: while there are none, nothing tells two equal layers apart.
    """

    def __iter__(self) -> Iterator[int]:
        yield secrets.randbits(60)


def unbound(model: nn.Module, method: Any) -> Callable[..., Any]:
    """The function of the model's class that ``method`` of ``init`` or ``apply`` means."""
    if method is None:
        return type(model).__call__
    if isinstance(method, str):
        return getattr(type(model), method)
    return getattr(method, "__func__", method)


def trace(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], intercept: Callable
) -> tuple[Any, Any]:
    """The traced program of the model's ``init``, and its params: shapes alone, nothing is computed.

    Args:
      model: a module without a parent.
      inputs: arrays or ``jax.ShapeDtypeStruct``, and whatever else it is called with.
      kwargs: the same; ``method`` is one of the model's.
      intercept: for ``nn.intercept_methods``.
    """
    # Flags (train=False) and the method must stay Python values; only arrays are traced.
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def run(*arrays: Any) -> Any:
        filled = {**dict(enumerate(leaves)), **dict(zip(traced, arrays, strict=True))}
        args, options = jax.tree.unflatten(treedef, [filled[i] for i in range(len(leaves))])
        method = unbound(model, options.pop("method", None))
        init = core.init(
            lambda scope: method(model.clone(parent=scope), *args, **options), flags={FLAG: Unique()}
        )
        with nn.intercept_methods(intercept):
            output, variables = init({"params": jax.random.key(0)})
        # With the output, lest JAX drops from the program what nothing depends on.
        outputs = [leaf for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)]
        return outputs, variables.get("params", {})

    jaxpr, (_, params) = jax.make_jaxpr(run, return_shape=True)(*(leaves[i] for i in traced))
    return jaxpr.jaxpr, params


def is_array(leaf: Any) -> bool:
    """Whether ``leaf`` is an array or the shape and dtype of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
