"""Which kernels a model has, and which of their axes make each one a matrix.

A *kernel* is the weight array of one layer, usually at ``<path of the layer>/kernel`` in the params tree.
Some of its axes are contracted with the layer's input (the *reduction axes*), some become the features of its
output (the *output axes*), and, in layers stacked by ``scan`` or ``vmap``, some count independent copies
(the *stack axes*). Read with the reduction axes first and the output axes last, a kernel is one matrix
``f32[m, n]`` per copy; everything the package does to a kernel, it does to that matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Params = Mapping[str, Any]

# In the place of an axis: the rank, and the window of one position of a convolution's second factor.
RANK, WINDOW = -1, -2
_CONVOLUTIONS = ("Conv", "ConvTranspose")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelAxes:
    """What the axes of one layer's kernel are, in a single copy of it.

    Attributes:
      reduction: the axes contracted with the input.
      output: the axes of the output features.
      batch: axes over independent matrices, each of which has its own part of the input.
    """

    reduction: tuple[int, ...]
    output: tuple[int, ...]
    batch: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One layer's kernel, and how it is read as a matrix.

    Attributes:
      path: the layer's path in the params tree, joined by ``/``; the kernel is at ``path/<param>``.
      layer: the layer's type, e.g. ``"Dense"``, ``"Conv"`` or ``"DenseGeneral"``.
      shape: shape of the parameter, stack axes included.
      reduction_axes: axes contracted with the input; together they are the matrix's ``m`` rows.
      output_axes: axes of the output features; together they are the matrix's ``n`` columns.
      stack_axes: axes over independent copies of the layer (``nn.scan``, ``nn.vmap``), or over independent
        matrices inside it (batch axes); usually empty.
      stack_indices: where those transformations inserted them, one after the other, the innermost first
        (before all, the layer's own batch axes, where they are); the factors' own stack axes are inserted at
        the same indices. By default the ``stack_axes``.
      positions: how often one copy's matrix is applied for one example in one forward pass (spatial
        positions or tokens, summed over all calls of a shared layer).
      param: the name of the parameter in its layer: ``"kernel"``, or what else the layer's type calls it.
      lookups: how often a row of one copy's matrix is looked up for one example, in an embedding: the whole
        matrix does that without a product, its factors with one of the row's factor.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()
    stack_indices: tuple[int, ...] | None = None
    positions: int = 1
    param: str = "kernel"
    lookups: int = 0

    @property
    def m(self) -> int:
        """Rows of the matrix: the inputs that one output feature sums over."""
        return math.prod(self.shape[a] for a in self.reduction_axes)

    @property
    def n(self) -> int:
        """Columns of the matrix: the output features."""
        return math.prod(self.shape[a] for a in self.output_axes)

    @property
    def max_rank(self) -> int:
        """The full rank, ``min(m, n)``."""
        return min(self.m, self.n)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Sizes of the stack axes; ``()`` for an ordinary layer."""
        return tuple(self.shape[a] for a in self.stack_axes)

    @property
    def is_pointwise(self) -> bool:
        """Whether this is a convolution with a window of one position."""
        window = self.reduction_axes[:-1]
        return self.layer in _CONVOLUTIONS and all(self.shape[a] == 1 for a in window)

    def num_params(self, rank: int | None = None) -> int:
        """Parameters of the kernel, or of its two factors at ``rank``."""
        one = self.m * self.n if rank is None else rank * (self.m + self.n)
        return math.prod(self.stack_shape) * one

    def flops(self, rank: int | None = None) -> int:
        """Forward FLOPs per example (two for each multiply-accumulate), whole or at ``rank``."""
        looked_up = 0 if rank is None else self.lookups * rank * self.n * math.prod(self.stack_shape)
        return 2 * (self.positions * self.num_params(rank) + looked_up)

    def to_sides(self, kernel: Array) -> Array:
        """The parameter with the axes of the rows before those of the columns, ``[*stack, *rows, *columns]``.

        Unlike in :meth:`to_matrix` no axes become one, which can gather a kernel that is split over devices.
        """
        return jnp.transpose(kernel, self.stack_axes + self.reduction_axes + self.output_axes)

    def from_sides(self, sides: Array) -> Array:
        """Inverse of :meth:`to_sides`; where axes are of size 1, the given ones may lack them."""
        order = self.stack_axes + self.reduction_axes + self.output_axes
        unstacked = jnp.reshape(sides, [self.shape[a] for a in order])
        return jnp.transpose(unstacked, [order.index(a) for a in range(len(order))])

    def to_matrix(self, kernel: Array) -> Float[Array, "*stack m n"]:
        """The parameter as one matrix per copy, ``[*stack, m, n]``, in its own dtype."""
        return self.to_sides(kernel).reshape(*self.stack_shape, self.m, self.n)

    def from_matrix(self, matrix: Float[Array, "*stack m n"]) -> Array:
        """Inverse of :meth:`to_matrix`: a parameter of shape ``self.shape``."""
        return self.from_sides(matrix)

    def factors(self, rank: int) -> tuple[Kernel, Kernel]:
        """The kernels of the layer's two factors, ``path/u`` and ``path/v``, at ``rank``."""
        u, v = self.factor_axes()
        sizes = {RANK: rank, WINDOW: 1, **dict(enumerate(self.shape))}
        shared: dict[str, Any] = dict(layer=self.layer, stack_indices=self.stack_indices)
        return (
            Kernel(
                path=f"{self.path}/u".lstrip("/"),
                shape=tuple(sizes[a] for a in u),
                reduction_axes=tuple(u.index(a) for a in self.reduction_axes),
                output_axes=(u.index(RANK),),
                stack_axes=tuple(u.index(a) for a in self.stack_axes),
                positions=self.positions,
                param=self.param,
                lookups=self.lookups,
                **shared,
            ),
            Kernel(
                path=f"{self.path}/v".lstrip("/"),
                shape=tuple(sizes[a] for a in v),
                reduction_axes=tuple(i for i, a in enumerate(v) if a < 0),
                output_axes=tuple(v.index(a) for a in self.output_axes),
                stack_axes=tuple(v.index(a) for a in self.stack_axes),
                positions=self.positions + self.lookups,
                **shared,
            ),
        )

    def factor_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the two factors' parameters: this kernel's, ``RANK`` and ``WINDOW``."""
        indices = self.stack_axes if self.stack_indices is None else self.stack_indices
        stack = insert_axes(len(self.shape) - len(indices), indices)[1]
        # A convolution's second factor is a convolution too, over windows of one position.
        window = len(self.reduction_axes) - 1 if self.layer in _CONVOLUTIONS else 0
        return factor_layouts(self.reduction_axes, self.output_axes, stack, indices, window=window)

    def factor_names(self, names: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The names of the factors' axes (for sharding), by those of this kernel's; ``None`` for the rank."""
        u, v = (tuple(None if a < 0 else names[a] for a in axes) for axes in self.factor_axes())
        return u, v

    def names_of(self, u_names: Sequence[Any], v_names: Sequence[Any]) -> tuple[Any, ...]:
        """Inverse of :meth:`factor_names`."""
        u, v = self.factor_axes()
        named = dict(zip(v, v_names, strict=True)) | dict(zip(u, u_names, strict=True))
        return tuple(named[a] for a in range(len(self.shape)))

    def stacked_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one copy's parameter with the layer's stack axes inserted."""
        indices = self.stack_axes if self.stack_indices is None else self.stack_indices
        own = insert_axes(len(self.shape) - len(indices), indices)[1]
        axes, stack = insert_axes(len(shape), indices)
        sizes = dict(zip(axes, shape, strict=True))
        sizes |= {at: self.shape[a] for at, a in zip(stack, own, strict=True)}
        return tuple(sizes[a] for a in range(len(sizes)))


def factor_layouts(
    reduction: Sequence[int],
    output: Sequence[int],
    stack: Sequence[int] = (),
    indices: Sequence[int] = (),
    *,
    window: int = 0,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How the axes of a kernel are laid out in its two factors.

    The first has the kernel's own axes in their order, ``RANK`` in the place of the first output axis; the
    second ``window`` times ``WINDOW``, ``RANK``, and the output axes.

    Args:
      reduction: the kernel's reduction axes.
      output: its output axes.
      stack: its stack axes in the order in which they were inserted.
      indices: where that was; it is where they are inserted in the factors.
      window: axes of a convolution's window.

    Example:
      >>> factor_layouts((0, 1, 2), (3,), window=2)
      ((0, 1, 2, -1), (-2, -2, -1, 3))
    """
    first = min(output)
    u = [RANK if a == first else a for a in sorted([*reduction, first])]
    v = [WINDOW] * window + [RANK, *sorted(output)]
    for axis, index in zip(stack, indices, strict=True):
        for layout in (u, v):
            layout.insert(index if index >= 0 else len(layout) + 1 + index, axis)
    return tuple(u), tuple(v)


def insert_axes(ndim: int, indices: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where axes end up when others are inserted at ``indices``, one after the other.

    Returns:
      The final positions of the ``ndim`` old axes, and those of the new ones.

    Example:
      >>> insert_axes(2, (1,))  # [a, b] -> [a, new, b]
      ((0, 2), (1,))
    """
    axes = list(range(ndim))
    for label, index in enumerate(indices, start=ndim):
        axes.insert(index if index >= 0 else len(axes) + 1 + index, label)
    return tuple(axes.index(a) for a in range(ndim)), tuple(axes.index(ndim + i) for i in range(len(indices)))


@dataclasses.dataclass(frozen=True)
class Kernels(Mapping[str, Kernel]):
    """The kernels of a model in the order of their first call: a hashable mapping path -> Kernel.

    Attributes:
      entries: the kernels that can be factorized.
      skipped_entries: ``(path, reason)`` of every other layer with a kernel, and every other parameter of two
        or more axes (stack axes and biases not counted).
      num_params: parameters of the whole model, the skipped and one-dimensional ones included.
      embedding_first: whether an embedding is called before the first of these kernels: then it, and none of
        them, is the model's first layer.
    """

    entries: tuple[Kernel, ...]
    skipped_entries: tuple[tuple[str, str], ...] = ()
    num_params: int = 0
    embedding_first: bool = False

    @functools.cached_property
    def _by_path(self) -> dict[str, Kernel]:
        return {kernel.path: kernel for kernel in self.entries}

    @property
    def skipped(self) -> dict[str, str]:
        """path -> reason for every parameter of two or more axes that cannot be factorized."""
        return dict(self.skipped_entries)

    def __getitem__(self, path: str) -> Kernel:
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self.entries)


def subtree(params: Params, path: str) -> Params:
    """The part of a nested params tree at ``path`` (``""`` is the whole).

    Raises:
      ValueError: if there is nothing at ``path``; the message names the first missing key.
    """
    node: Any = params
    for depth, key in enumerate(keys := path.split("/") if path else []):
        if not isinstance(node, Mapping) or key not in node:
            where = "/".join(keys[:depth]) or "the top"
            raise ValueError(f"params have no {path!r}: there is no {key!r} at {where}")
        node = node[key]
    return node


def check_kernel(params: Params, kernel: Kernel, kind: Any = jnp.generic) -> None:
    """Raises a ValueError if ``params`` are not those of the model that ``kernel`` was found in.

    Or if they are complex, or of a dtype that is not of the ``kind``.
    """
    layer = subtree(params, kernel.path)
    if not isinstance(layer, Mapping) or kernel.param not in layer:
        has = sorted(layer) if isinstance(layer, Mapping) else type(layer).__name__
        raise ValueError(f"params have no {kernel.param} at {kernel.path!r}: the layer has {has}")
    array = unboxed(layer[kernel.param])
    if not hasattr(array, "shape"):
        raise ValueError(
            f"the {kernel.param} at {kernel.path!r} is a {type(array).__name__}, not an array: "
            "take params out of their boxes first, with flax.linen.meta.unbox"
        )
    shape = tuple(array.shape)
    if shape != kernel.shape:
        raise ValueError(
            f"the {kernel.param} at {kernel.path!r} has shape {shape}, expected {kernel.shape}: "
            "these are the params of another model"
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or not jnp.issubdtype(array.dtype, kind):
        expected = "floating-point" if kind is jnp.floating else "real"
        raise ValueError(
            f"the {kernel.param} at {kernel.path!r} has dtype {array.dtype}, expected a {expected} one"
        )


def kernel_sides(params: Params, kernel: Kernel) -> Array:
    """The kernel in ``params``, ``[*stack, *rows, *columns]``, see :meth:`Kernel.to_sides`.

    Raises:
      ValueError: if ``params`` are not those of the model that ``kernel`` was found in.
    """
    check_kernel(params, kernel)
    return kernel.to_sides(kernel_array(params, kernel))


def kernel_array(tree: Params, kernel: Kernel) -> Any:
    """The leaf in the kernel's place in a tree of the params' structure, out of its box if it is in one."""
    return unboxed(subtree(tree, kernel.path)[kernel.param])


def unboxed(leaf: Any) -> Any:
    """The array in a box with the names of its axes (``nn.Partitioned``, say); any other leaf as it is."""
    return leaf.value if is_box(leaf) else leaf


def is_box(leaf: Any) -> bool:
    """Whether ``leaf`` is a box around an array, with the names of its axes for sharding."""
    return hasattr(leaf, "value") and hasattr(leaf, "names")


def reboxed(box: Any, value: Any, names: Sequence[Any] | None = None) -> Any:
    """``value`` in a box like ``box``, with other ``names`` if given; as it is if ``box`` is none."""
    if not is_box(box):
        return value
    return dataclasses.replace(box, value=value, names=box.names if names is None else tuple(names))


@functools.singledispatch
def find_kernels(model: Any, *inputs: Any, include_embeddings: bool = False, **kwargs: Any) -> Kernels:
    """Finds every kernel of ``model`` that can be factorized, and says why the others cannot.

    The model is traced abstractly (``jax.eval_shape``): no FLOPs are spent and no parameters made.

    Args:
      model: a Flax Linen or NNX module; an NNX module may be abstract (``nnx.eval_shape``).
      *inputs: arrays or ``jax.ShapeDtypeStruct`` to call it with; the first axis of the first one is the
        batch (it only enters the counts per example).
      include_embeddings: find embedding tables, too; they are looked up in their factors, and tied heads
        (``attend``) multiply by both. Otherwise they are skipped.
      **kwargs: passed on to the model, e.g. ``train=False``; ``method=`` calls another of its methods. Of a
        Linen module ``num_params`` counts the params of this call alone, and kernels that are read outside of
        their layer's call are not noticed: keep such layers by a rule.

    Returns:
      A :class:`Kernels` mapping ``path -> Kernel`` in call order; ``.skipped`` is ``path -> reason``.

    Raises:
      TypeError: if ``model`` is of a kind that has no front end.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, cuttlefish_jax as cf
      >>> model = nn.Sequential([nn.Conv(16, (3, 3)), nn.Dense(10)])
      >>> kernels = cf.find_kernels(model, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
      >>> [(path, kernel.m, kernel.n, kernel.positions) for path, kernel in kernels.items()]
      [('layers_0', 27, 16, 64), ('layers_1', 16, 10, 64)]
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.LayerNorm(16, rngs=nnx.Rngs(0)))
      >>> list(cf.find_kernels(model, jnp.ones((1, 8))))
      ['layers/0']
    """
    raise TypeError(f"find_kernels needs a Flax module, got {type(model).__name__}")
