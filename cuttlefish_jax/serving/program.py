"""A model as a StableHLO program, for processes that have neither the model's code nor this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import meta, unfreeze
from jax import export as jax_export

from cuttlefish_jax.serving.nnx_weights import weights_as_argument, weights_of


def export(
    model: Any,
    variables: Any,
    *inputs: Any,
    platforms: Sequence[str] | None = None,
    bake_weights: bool = True,
    **kwargs: Any,
) -> bytes:
    """Compiles a model's forward pass to StableHLO, for batches of any size.

    The first axis of every input is the batch, and stays symbolic: one program serves all batch sizes. To the
    program factors are ordinary layers, so a factorized model needs nothing of this package to be served::

        from pathlib import Path
        import jax

        program = jax.export.deserialize(bytearray(Path("model.stablehlo").read_bytes()))
        outputs = program.call(images)

    Args:
      model: a Linen module, full-rank or what :func:`cuttlefish_jax.factorize` made of one; an NNX module; or
        any function, called as ``model(variables, *inputs, **kwargs)``.
      variables: what a Linen module is applied to, ``{"params": ..., "batch_stats": ...}``; ``None`` for an
        NNX module, which has its own.
      *inputs: arrays or ``jax.ShapeDtypeStruct``, or trees of them, for a batch of any size. If one of them
        has a symbolic dimension already (``jax.export.symbolic_shape``), all are taken as they are.
      platforms: where the program is to run, e.g. ``("cpu", "cuda")``; by default where this process runs.
      bake_weights: whether the weights are constants of the program, which then is one whole file. Otherwise
        they are its first argument, as in ``program.call(variables, images)``, and the program has the code
        alone: for models of more than 2 GiB, which is as much as the format holds, and for weights that
        change. Those of an NNX module are nested dicts by the names of its attributes: what comes back from
        :func:`save_safetensors` and :func:`load_safetensors`.
      **kwargs: passed on to the model, e.g. ``train=False`` or ``method=``; constants of the program.

    Returns:
      The program, to be written to a file.

    Raises:
      ValueError: if there is no input with a batch axis, variables are missing, or flatbuffers is not
        installed, which JAX writes programs with.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cuttlefish_jax as cf
      >>> from cuttlefish_jax import serving
      >>> model, x = nn.Dense(6), jnp.ones((1, 8))
      >>> plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), {"": 2})
      >>> low = cf.factorize(model, plan)
      >>> program = jax.export.deserialize(bytearray(serving.export(low, low.init(jax.random.key(0), x), x)))
      >>> program.call(jnp.ones((5, 8))).shape
      (5, 6)

    References:
      `Exporting and serializing staged-out computations
      <https://docs.jax.dev/en/latest/export/export.html>`_, the JAX documentation.
    """
    function, variables = _pure(model, variables, kwargs)
    shapes = _symbolic_batch(inputs)
    if bake_weights:
        weights = variables
        exported = jax_export.export(jax.jit(lambda *args: function(weights, *args)), platforms=platforms)(
            *shapes
        )
    else:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
        exported = jax_export.export(jax.jit(function), platforms=platforms)(abstract, *shapes)
    try:
        return bytes(exported.serialize())
    except ImportError as error:  # as JAX says it where flatbuffers is missing
        raise ValueError("exporting needs flatbuffers: pip install 'cuttlefish-jax[serving]'") from error


def _pure(model: Any, variables: Any, kwargs: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    """The model as a function of its variables and inputs, and the variables as a plain tree."""
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise ValueError(
                f"{type(model).__name__} is an NNX module, which has its own variables: pass None"
            )
        return weights_as_argument(model, kwargs), weights_of(model)
    if variables is None:
        raise ValueError(f"{type(model).__name__} needs its variables, e.g. {{'params': params}}")
    if not isinstance(model, nn.Module):
        return lambda weights, *inputs: model(weights, *inputs, **kwargs), variables
    # Plain dicts of arrays: programs know no frozen ones, and no boxes with the names of axes.
    plain = unfreeze(meta.unbox(variables))
    return lambda weights, *inputs: model.apply(weights, *inputs, **kwargs), plain


def _symbolic_batch(inputs: tuple[Any, ...]) -> Any:
    """The shapes of the inputs, with a symbol in the place of their first axis."""
    leaves = jax.tree.leaves(inputs)
    if any(jax_export.is_symbolic_dim(size) for leaf in leaves for size in leaf.shape):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    if not any(leaf.shape for leaf in leaves):
        raise ValueError("the model needs an input with a batch axis: pass an array, or its shape")
    (batch,) = jax_export.symbolic_shape("batch")
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]) if x.shape else (), x.dtype), inputs
    )
