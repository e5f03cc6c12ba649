"""Reads an einsum equation ``input,kernel->output`` as a product with a matrix."""

from __future__ import annotations

import string
from collections.abc import Sequence

from cuttlefish_jax.kernels import RANK, KernelAxes, factor_layouts


def read_einsum(equation: str) -> KernelAxes:
    """The axes of the kernel, which is the second operand.

    A letter of the kernel that the input has, too, is contracted, or, if the output also has it, counts
    independent copies (a batch axis); one that only the output has is an axis of its features.

    Args:
      equation: e.g. ``"...d,dhk->...hk"``.

    Raises:
      ValueError: if the equation is no such product; the message is the reason.

    Example:
      >>> read_einsum("bsd,dhk->bhsk")
      KernelAxes(reduction=(0,), output=(1, 2), batch=())
      >>> read_einsum("gbd,gde->gbe")
      KernelAxes(reduction=(1,), output=(2,), batch=(0,))
    """
    inputs, kernel, output = _parts(equation)
    if "." in kernel:
        raise ValueError(f"its equation {equation!r} has an ellipsis in the kernel")
    for part in (inputs, kernel, output):
        letters = part.replace("...", "")
        if repeated := sorted({letter for letter in letters if letters.count(letter) > 1}):
            raise ValueError(f"its equation {equation!r} repeats {repeated[0]!r} in one operand")
    if alone := [letter for letter in kernel if letter not in inputs + output]:
        raise ValueError(f"its equation {equation!r} sums {alone[0]!r} over the kernel alone")
    axes = KernelAxes(
        reduction=tuple(a for a, x in enumerate(kernel) if x in inputs and x not in output),
        output=tuple(a for a, x in enumerate(kernel) if x in output and x not in inputs),
        batch=tuple(a for a, x in enumerate(kernel) if x in inputs and x in output),
    )
    if not axes.reduction:
        raise ValueError(f"its equation {equation!r} contracts no axis of the kernel")
    if not axes.output:
        raise ValueError(f"its equation {equation!r} has no axis of output features")
    return axes


def einsum_factors(
    equation: str, shape: Sequence[int], rank: int
) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """The equation and the kernel's shape of each of the two factors.

    Args:
      equation: what :func:`read_einsum` can read.
      shape: of the kernel.
      rank: of the factors.

    Example:
      >>> einsum_factors("bsd,dhk->bhsk", (8, 2, 4), 3)
      (('bsd,da->bsa', (8, 3)), ('bsa,ahk->bhsk', (3, 2, 4)))
    """
    inputs, kernel, output = _parts(equation)
    axes = read_einsum(equation)
    letter = next(letter for letter in string.ascii_letters if letter not in equation)
    between = inputs.replace("...", ".")
    between = "".join(x for x in between if x == "." or x in output).replace(".", "...") + letter
    u, v = factor_layouts(axes.reduction, axes.output, axes.batch, axes.batch)
    (u_letters, u_shape), (v_letters, v_shape) = (
        (
            "".join(letter if a == RANK else kernel[a] for a in layout),
            tuple(rank if a == RANK else shape[a] for a in layout),
        )
        for layout in (u, v)
    )
    return (f"{inputs},{u_letters}->{between}", u_shape), (f"{between},{v_letters}->{output}", v_shape)


def _parts(equation: str) -> tuple[str, str, str]:
    operands, arrow, output = equation.replace(" ", "").partition("->")
    inputs, comma, kernel = operands.partition(",")
    if not arrow or not comma or "," in kernel:
        raise ValueError(f"its equation {equation!r} is not of the form 'input,kernel->output'")
    return inputs, kernel, output
