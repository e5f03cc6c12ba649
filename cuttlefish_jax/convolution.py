"""Convolutions of one pixel as matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


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
