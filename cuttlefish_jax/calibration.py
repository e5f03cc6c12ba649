r"""What the layers of a model are given: measured on batches, for truncation that spares their outputs.

A layer with kernel :math:`W` is linear in it: its outputs, without bias, are :math:`z = W^T x`. With
:math:`z` in the place of the loss's gradient by the outputs, the gradient by the kernel is
:math:`\sum x z^T = \sum x x^T W`, the second moments of the inputs times the kernel. So one backward pass
measures all layers, whatever their axes are, however often they are called, inside ``scan``, ``vmap`` and
``remat`` too, and its result lies and is averaged over devices as gradients are.

Where a batch norm takes the outputs, the moments are those around the mean, which it takes away. Of a layer
of one's own that does more to the product than to add a bias, the moments are about right.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array

    from cuttlefish_jax.kernels import Kernel


@functools.singledispatch
def calibrate(model: Any, kernels: Mapping[str, Kernel], *inputs: Any, **kwargs: Any) -> dict[str, Array]:
    """Measures what the layers of a model are given, for :func:`factorize_params` and ``singular_values``.

    Pure and traceable: put it under ``jax.jit``, and take the mean over batches (and devices). A few batches
    of the training data, augmented as in training, are enough; call the model as it is evaluated.

    Args:
      model: a Flax Linen or NNX module; it is not changed.
      kernels: ``path -> Kernel``, what :func:`find_kernels` returned of the model.
      *inputs: what the model is called with; of a Linen module, first its variables, as in ``model.apply``.
      **kwargs: passed on to the model, e.g. ``train=False``; ``method=`` calls another of its methods.

    Returns:
      ``path -> f32`` of the kernel's shape: the second moments of a layer's inputs times its kernel, in the
      mean over examples and positions, summed over a layer's calls. Zeros, which are as good as nothing, for
      embeddings and for layers on which none of the outputs depends.

    Raises:
      TypeError: if ``model`` is of a kind that has no front end.
      ValueError: if the ``variables`` of a Linen model have no params.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cuttlefish_jax as cf
      >>> model, x = nn.Dense(6), jax.random.normal(jax.random.key(0), (100, 8))
      >>> variables = model.init(jax.random.key(0), x)
      >>> kernels = cf.find_kernels(model, x)
      >>> calibration = jax.jit(lambda v, x: cf.calibrate(model, kernels, v, x))(variables, x)
      >>> bool(jnp.allclose(calibration[""], x.T @ x / 100 @ variables["params"]["kernel"], atol=1e-5))
      True
      >>> plan = cf.FactorizationPlan.from_ranks(kernels, {"": 2})
      >>> low = cf.factorize_params(variables["params"], plan, calibration=calibration)

    References:
      Wang et al., `SVD-LLM <https://arxiv.org/abs/2403.07378>`_, ICLR 2025, section 3: what is measured on
      batches there, and why.
    """
    raise TypeError(f"calibrate needs a Flax module, got {type(model).__name__}")


@dataclasses.dataclass(frozen=True)
class Calls:
    """What an abstract call of a model shows of its layers.

    Attributes:
      seen: the paths of the layers that were called.
      normed: of those whose outputs a batch norm takes as they are, the axis of devices that share its
        statistics, and their groups, or None.
    """

    seen: frozenset[str]
    normed: Mapping[str, tuple[Any, Any]]


class CallLog:
    """Told of the calls while they are traced; layers and batch norms are those of Linen or NNX."""

    def __init__(self) -> None:
        self._results: dict[int, tuple[str, Any]] = {}  # with the result, lest another gets its id
        self._normed: dict[str, tuple[Any, Any]] = {}

    def called(self, path: str, result: Any) -> None:
        """Notes the call of a layer."""
        self._results[id(result)] = path, result

    def normalised(self, value: Any, norm: Any) -> None:
        """Notes the call of a batch norm."""
        if id(value) in self._results:
            path, _ = self._results[id(value)]
            self._normed[path] = norm.axis_name, norm.axis_index_groups

    def calls(self) -> Calls:
        """What there was, without what holds on to the trace."""
        return Calls(frozenset(path for path, _ in self._results.values()), dict(self._normed))


def observed(result: Array, offset: Array, param: Array, kernel: Kernel, calls: Calls) -> Array:
    """A layer's outputs, whose gradient, whatever it would be, is what they are.

    Args:
      result: the outputs; features last if a batch norm takes them.
      offset: what the layer gives for zeros, of the same shape.
      param: its kernel, as it is in this call.
      kernel: the kernel's entry.
      calls: of the model.
    """
    features = param.size // kernel.m  # of one position; of all matrices, if the kernel has batch axes
    z = jax.lax.stop_gradient(result - offset)
    if kernel.path in calls.normed:
        z -= _mean(z, *calls.normed[kernel.path])
    return _with_gradient(result, z * (features / max(z.size, 1)))


def _mean(z: Array, axis_name: Any, groups: Any) -> Array:
    """That which a batch norm takes away: over the devices that share their statistics, if any do."""
    mean = jnp.mean(z, axis=range(z.ndim - 1))
    if axis_name is None:
        return mean
    try:
        return jax.lax.pmean(mean, axis_name, axis_index_groups=groups)
    except NameError:  # evaluated on one device, which has no such axis
        return mean


def nothing_of(outputs: Any) -> Array:
    """Zero, as a function of outputs: so that there is a backward pass."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return sum((0 * jnp.sum(leaf).real.astype(jnp.float32) for leaf in leaves), jnp.zeros(()))


def of_kernels(
    gradient: Callable[[Kernel], Array], kernels: Mapping[str, Kernel], calls: Calls
) -> dict[str, Array]:
    """The calibration by the gradient of every kernel; zeros for layers that were not observed."""
    return {
        path: gradient(kernel).astype(jnp.float32)
        if path in calls.seen
        else jnp.zeros(kernel.shape, jnp.float32)
        for path, kernel in kernels.items()
    }


@jax.custom_vjp
def _with_gradient(value: Array, gradient: Array) -> Array:
    return value


def _forward(value: Array, gradient: Array) -> tuple[Array, Array]:
    return value, gradient


def _backward(gradient: Array, _: Array) -> tuple[Array, Array]:
    return gradient, jnp.zeros_like(gradient)


_with_gradient.defvjp(_forward, _backward)
