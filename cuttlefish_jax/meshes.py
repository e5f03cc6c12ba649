"""One way to compute on arrays wherever they lie, on meshes of explicit axes too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def on_any_mesh(run: Callable[..., Any], *args: Any, out_specs: Any = None) -> Any:
    """``run(*args)``, also of arrays on a mesh of explicit axes.

    These would need an output sharding for every reshape and product. There too the compiler may choose, and
    the results alone are sharded as is said here.

    Args:
      run: a function of pytrees of arrays.
      *args: what it is called with; all that lies on explicit axes is on one mesh.
      out_specs: of the results on such a mesh: of their structure, or of what stands for whole parts of it,
        with a ``PartitionSpec`` for each array. By default they are on every device.
    """
    for leaf in jax.tree.leaves(args):
        mesh = jax.typeof(leaf).sharding.mesh
        if mesh.explicit_axes:
            specs = PartitionSpec() if out_specs is None else out_specs
            shardings = jax.tree.map(
                lambda spec, mesh=mesh: NamedSharding(mesh, spec),
                specs,
                is_leaf=lambda node: isinstance(node, PartitionSpec),
            )
            return jax.sharding.auto_axes(run, out_sharding=shardings)(*args)
    return run(*args)


def spec_of(array: Any) -> tuple[Any, ...]:
    """What each axis of an array is split over: an axis of a mesh, several, or ``None``."""
    return tuple(jax.typeof(array).sharding.spec)


def as_spec(names: Iterable[Any]) -> PartitionSpec:
    """A ``PartitionSpec`` of some entries, of which no axis of the mesh is there twice: the first counts."""
    seen, entries = set(), []
    for entry in names:
        axes = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        axes = tuple(axis for axis in axes if axis not in seen)
        seen.update(axes)
        entries.append(axes or None)
    return PartitionSpec(*entries)
