"""Convolutions of one pixel as matrix products: faster alone, slower in whole networks.

benchmarks/layer_time.py and step_time.py compare them with Flax's own convolutions, which the package uses.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax import lax

from cuttlefish_jax.layer_types import LAYER_TYPES


@contextlib.contextmanager
def products() -> Iterator[None]:
    """Within it, factors of one pixel are computed as products."""
    own = LAYER_TYPES[nn.Conv]

    def by_product(fields: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]:
        return lambda *args: {**fields(*args), "conv_general_dilated": conv_general_dilated}

    LAYER_TYPES[nn.Conv] = dataclasses.replace(
        own, first=by_product(own.first), second=by_product(own.second)
    )
    try:
        yield
    finally:
        LAYER_TYPES[nn.Conv] = own


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """``lax.conv_general_dilated`` for the convolutions of Flax; a product of matrices where it is just that.

    A window of one pixel, as that of a factorized convolution's second factor, makes the convolution a
    product over the channels. Compilers find that out for the forward pass; the gradient of the kernel, whose
    window is the whole image, they leave a convolution, which takes up to twice the time of the product.

    Args:
      lhs: input, channels last, ``[batch, *window, in]``.
      rhs: kernel, ``[*window, in, out]``.
      window_strides: as of ``lax.conv_general_dilated``, and so are the others.
      padding: a name, or the pixels before and after each axis of the window.
      lhs_dilation: of the input.
      rhs_dilation: of the kernel.
      dimension_numbers: those of the shapes above, as Flax gives them.
      feature_group_count: groups of channels.
      **options: ``precision`` and others that ``lax.dot_general`` has, too.

    Returns:
      What ``lax.conv_general_dilated`` returns.
    """
    is_pixel = all(size == 1 for size in rhs.shape[:-2])
    is_padded = not isinstance(padding, str) and any(before or after for before, after in padding)
    is_dilated = any(step != 1 for step in lhs_dilation or ())
    if not is_pixel or is_padded or is_dilated or feature_group_count != 1:
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            **options,
        )
    # Without padding, which names add none of to a window of one pixel, strides only leave pixels out.
    if any(stride != 1 for stride in window_strides):
        lhs = lax.slice(lhs, (0,) * lhs.ndim, lhs.shape, (1, *window_strides, 1))
    matrix = lax.reshape(rhs, rhs.shape[-2:])
    return lax.dot_general(lhs, matrix, (((lhs.ndim - 1,), (0,)), ((), ())), **options)
