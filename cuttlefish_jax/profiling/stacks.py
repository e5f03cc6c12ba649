"""Stacks of layers: runs of one resolution and width, found from the names of the layers."""

from __future__ import annotations

import re
from collections import Counter

from cuttlefish_jax.kernels import Kernels


def find_stacks(kernels: Kernels) -> dict[str, str]:
    """The stack of every kernel: a run of layers of one resolution and width, which is timed as one.

    Kernels with the same first component of their path (``stage2`` of ``stage2/block1/conv1``) are of one
    stack. Components that follow each other, differ only in a number at their end, and have equal layers
    inside (same names, types, shapes and positions) are one stack too: ``block1`` to ``block12`` of a
    transformer are the stack ``block``. The stages of a ResNet stay apart, since their shapes differ; a layer
    directly at the top, such as a stem or a classifier, is a stack of its own.

    A stack of one component has its name; one of several has what their names share, or, if that could be
    taken for something else, the first and the last: ``block2..block12``.

    Args:
      kernels: what :func:`cuttlefish_jax.find_kernels` returned.

    Returns:
      ``{path: stack}``, in call order.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, cuttlefish_jax as cf
      >>> model = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.Dense(3)])
      >>> find_stacks(cf.find_kernels(model, jnp.ones((1, 8))))
      {'layers_0': 'layers_0..layers_1', 'layers_1': 'layers_0..layers_1', 'layers_2': 'layers_2'}
    """
    components: dict[str, list[tuple]] = {}
    for path, kernel in kernels.items():
        component, _, rest = path.partition("/")
        layer = (rest, kernel.layer, kernel.shape, kernel.positions)
        components.setdefault(component, []).append(layer)
    runs: list[list[str]] = []
    for component, layers in components.items():
        before = runs[-1][-1] if runs else None
        if before is not None and _numbered_alike(before, component) and components[before] == layers:
            runs[-1].append(component)
        else:
            runs.append([component])
    shared = Counter(_stem(run[0]) for run in runs)
    names = {}
    for run in runs:
        stem = _stem(run[0])
        if len(run) == 1:
            name = run[0]
        elif stem and shared[stem] == 1 and stem not in components:
            name = stem
        else:
            name = f"{run[0]}..{run[-1]}"
        names.update(dict.fromkeys(run, name))
    return {path: names[path.partition("/")[0]] for path in kernels}


def _stem(component: str) -> str:
    """A component without the number at its end: ``block12`` is ``block``, ``layers_0`` is ``layers``."""
    return re.sub(r"[_-]?[0-9]+$", "", component)


def _numbered_alike(a: str, b: str) -> bool:
    return a != _stem(a) and b != _stem(b) and _stem(a) == _stem(b)
