"""How a training state lies on the devices, and how the compiled steps are mapped over them.

Batches are shared by all devices either way. With ``pmap`` every device has all of the state; with ``fsdp``
(fully sharded data parallel, ZeRO-3) each has an even part of every large parameter, of its average and of
what the optimizer remembers of it. A device's part of a step sees whole parameters all the same: they are
gathered when they are used, forgotten, and gathered again for the gradient, which is summed and split at
once. What follows, the optimizer's update, is arithmetic on arrays that stay split.

References:
  Rajbhandari et al., `ZeRO: Memory Optimizations Toward Training Trillion Parameter Models
  <https://arxiv.org/abs/1910.02054>`_, SC 2020.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import cuttlefish_jax as cf

if TYPE_CHECKING:
    from cuttlefish_jax.training.state import TrainState

AXIS = "batch"  # the name of the axis that steps are mapped over: the devices
PARALLELISMS = ("pmap", "fsdp")  # config.parallelism

# A parameter with fewer entries is kept whole: a message for it would cost more than its memory.
_LEAST_SPLIT = 1024


def device_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The devices, by default all of all hosts, in one row."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


class _Layout:
    """What both layouts have."""

    mesh: Mesh

    @property
    def replicated(self) -> NamedSharding:
        """That of an array which is whole on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, state: TrainState) -> TrainState:
        """The shardings of a state, in its tree; the state may be one of shapes."""
        return jax.tree.map(lambda _: self.replicated, state)

    def abstract(self, state: TrainState) -> TrainState:
        """The shapes of a state in this layout."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            self.shardings(state),
        )

    def place(self, state: TrainState) -> TrainState:
        """Puts a state on the devices, in this layout, without any device holding more than its part.

        Args:
          state: of NumPy arrays, the same on every host, or of arrays that are on devices already.
        """
        leaves, tree = jax.tree.flatten(state)
        return jax.tree.unflatten(tree, _put(leaves, jax.tree.leaves(self.shardings(state))))


class DataParallel(_Layout):
    """Every device has the whole state, and does the whole update; by ``jax.pmap``.

    Args:
      devices: to be used; by default all of all hosts.
    """

    def __init__(self, devices: Sequence[Any] | None = None):
        self.mesh = device_mesh(devices)
        self._devices = devices

    def whole(self, fn: Callable) -> Callable:
        """See :meth:`FullySharded.whole`: here a device has all."""
        return fn

    def mean(self, grads: Any) -> Any:
        """See :meth:`FullySharded.mean`."""
        return jax.lax.pmean(grads, AXIS)

    def on_each_device(self, fn: Callable, *, gives_gradients: bool = False) -> Callable:
        """See :meth:`FullySharded.on_each_device`: here the whole program is mapped."""
        return fn

    def program(self, step: Callable, *, updates: bool = False, gives_gradients: bool = False) -> Any:
        """See :meth:`FullySharded.program`."""
        donated = (0,) if updates else ()
        in_axes = (None, None, 0)
        return jax.pmap(
            step, AXIS, in_axes=in_axes, out_axes=None, donate_argnums=donated, devices=self._devices
        )


@dataclasses.dataclass(frozen=True, eq=False)
class FullySharded(_Layout):
    """Every device has a part of the state; by ``jax.jit``, with ``jax.shard_map`` for what each does alone.

    Attributes:
      mesh: the devices, in one row.
      specs: how the parameters are split, in their tree.
    """

    mesh: Mesh
    specs: Any

    @classmethod
    def of(
        cls,
        params: Any,
        kernels: Mapping[str, cf.Kernel],
        plan: cf.FactorizationPlan | None = None,
        *,
        devices: Sequence[Any] | None = None,
    ) -> FullySharded:
        """The layout of a network's training states.

        Kernels are split along the longer side of their matrix, factors by an axis that is not the rank's.

        Args:
          params: the network's parameters, or their shapes.
          kernels: those of the full-rank network.
          plan: what of them is factorized in ``params``, if anything is.
          devices: to be used; by default all of all hosts.
        """
        mesh = device_mesh(devices)
        sides = _sides(kernels, plan)

        def spec(keys: tuple[Any, ...], leaf: Any) -> PartitionSpec:
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
            return _spec(leaf.shape, sides.get(name, [tuple(range(leaf.ndim))]), mesh.size)

        return cls(mesh, jax.tree_util.tree_map_with_path(spec, params))

    def shardings(self, state: TrainState) -> TrainState:
        """The shardings of a state, in its tree; the state may be one of shapes."""
        shapes = jax.tree.map(lambda param, spec: (param.shape, spec), state.params, self.specs)
        known = dict(jax.tree.leaves_with_path(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)))

        def sharding(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
            # The average of a parameter, and what the optimizer remembers of it, is found under its path.
            found = (known[keys[start:]] for start in range(len(keys)) if keys[start:] in known)
            shape, spec = next(found, ((), PartitionSpec()))
            return NamedSharding(self.mesh, spec if shape == leaf.shape else PartitionSpec())

        split = {
            name: jax.tree.map_with_path(sharding, getattr(state, name))
            for name in ("params", "ema_params", "opt_state")
        }
        return super().shardings(state).replace(**split)

    def whole(self, fn: Callable) -> Callable:
        """``fn(params, ...)`` of whole parameters as a function of a device's parts of them.

        To be called on each device. The gradient by the parts is summed over the devices.
        """
        shapes: set[tuple[int, ...]] = set()

        def gather(part: jax.Array, spec: PartitionSpec) -> jax.Array:
            if AXIS not in spec:
                return part
            whole = jax.lax.all_gather(part, AXIS, axis=spec.index(AXIS), tiled=True)
            shapes.add(whole.shape)
            return whole

        def of_parts(params: Any, *args: Any) -> Any:
            return fn(jax.tree.map(gather, params, self.specs), *args)

        def is_kept(primitive: Any, *inputs: Any, **_: Any) -> bool:
            """Whether the backward pass takes a result from the forward pass: not if it is a parameter."""
            is_cast = primitive is jax.lax.convert_element_type_p and inputs[0].shape in shapes
            return primitive is not jax.lax.all_gather_p and not is_cast

        return jax.checkpoint(of_parts, policy=is_kept)

    def mean(self, grads: Any) -> Any:
        """The mean over the devices of gradients of :meth:`whole` functions; to be called on each device."""

        def mean(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
            return grad / self.mesh.size if AXIS in spec else jax.lax.pmean(grad, AXIS)

        return jax.tree.map(mean, grads, self.specs)

    def on_each_device(self, fn: Callable, *, gives_gradients: bool = False) -> Callable:
        """The part of a program that every device does with its part of a batch.

        Args:
          fn: ``(params, shared, batch) -> results``: it sees a device's parts of the parameters, anything
            that is whole on every device, and a device's examples; the results are the same on all devices.
          gives_gradients: whether ``fn`` returns ``(grads, results)``, of which ``grads`` are split like
            ``params``.
        """
        everywhere = PartitionSpec()

        def mapped(params: Any, shared: Any, batch: Any) -> Any:
            return fn(params, shared, jax.tree.map(lambda x: x[0], batch))

        return jax.shard_map(
            mapped,
            mesh=self.mesh,
            in_specs=(self.specs, everywhere, PartitionSpec(AXIS)),
            out_specs=(self.specs, everywhere) if gives_gradients else everywhere,
            # Gradients as in pmap: each device's own, until they are averaged.
            check_vma=False,
        )

    def program(self, step: Callable, *, updates: bool = False, gives_gradients: bool = False) -> Any:
        """A step to be compiled: an object with ``lower(state, resident, batch)``.

        Args:
          step: ``(state, resident, batch) -> results``, whole on every device.
          updates: the results are ``(state, metrics)``, and the old state is donated.
          gives_gradients: the results are gradients, which lie as the parameters do.
        """
        return _Program(self, step, updates, gives_gradients)


Layout: TypeAlias = DataParallel | FullySharded


@dataclasses.dataclass(frozen=True)
class _Program:
    """A step under ``jax.jit`` whose new state lies as the old one does."""

    layout: FullySharded
    step: Callable
    updates: bool
    gives_gradients: bool

    def lower(self, state: Any, *data: Any) -> Any:
        if self.gives_gradients:
            return jax.jit(self.step, out_shardings=self.layout.shardings(state).params).lower(state, *data)
        if not self.updates:
            return jax.jit(self.step, out_shardings=self.layout.replicated).lower(state, *data)
        shardings = self.layout.shardings(state), self.layout.replicated
        return jax.jit(self.step, donate_argnums=0, out_shardings=shardings).lower(state, *data)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """The memory that a tree takes on the device with the most of it.

    Args:
      tree: of arrays, or of their shapes.
      shardings: in the same tree.
    """

    def size(leaf: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


def _sides(
    kernels: Mapping[str, cf.Kernel], plan: cf.FactorizationPlan | None
) -> dict[str, list[tuple[int, ...]]]:
    """For each kernel and factor the axes that it may be split by, the preferable ones first.

    That is the longer side of a kernel's matrix: of the shorter one's Gram matrix each device then has a
    summand, and makes its part of the factors. Layers are taken from a stack one after the other, so it is
    not split, and neither is a factor's rank.
    """
    sides: dict[str, list[tuple[int, ...]]] = {}
    for path, kernel in kernels.items():
        if plan is not None and path in plan.ranks:
            u, v = kernel.factors(plan.ranks[path])
            parts = {u: [u.reduction_axes], v: [v.output_axes]}
        else:
            rows, columns = kernel.reduction_axes, kernel.output_axes
            parts = {kernel: [columns, rows] if kernel.m < kernel.n else [rows, columns]}
        sides |= {f"{part.path}/{part.param}".lstrip("/"): axes for part, axes in parts.items()}
    return sides


def _spec(shape: tuple[int, ...], sides: Sequence[tuple[int, ...]], parts: int) -> PartitionSpec:
    """Splits an array evenly by the largest axis of the first side that has one, or not at all."""
    if parts > 1 and math.prod(shape) >= _LEAST_SPLIT:
        for side in sides:
            # The last of equal ones: no axis of a convolution's window.
            if possible := [(shape[axis], axis) for axis in side if shape[axis] % parts == 0]:
                _, best = max(possible)
                return PartitionSpec(*(AXIS if axis == best else None for axis in range(len(shape))))
    return PartitionSpec()


def _put(leaves: list[Any], shardings: list[NamedSharding]) -> list[jax.Array]:
    placed = [
        leaf
        if isinstance(leaf, jax.Array)
        else jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    elsewhere = [i for i, leaf in enumerate(placed) if leaf.sharding != shardings[i]]
    # A program, and not device_put, which cannot put random keys on the devices of other hosts.
    move = jax.jit(lambda leaves: leaves, out_shardings=[shardings[i] for i in elsewhere])
    for i, leaf in zip(elsewhere, move([placed[i] for i in elsewhere]), strict=True):
        placed[i] = leaf
    return placed
