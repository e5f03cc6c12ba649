"""Einsum equations read as products with a matrix, judged by NumPy."""

import numpy as np
import pytest

from cuttlefish_jax.einsum import einsum_factors, read_einsum
from cuttlefish_jax.kernels import Kernel, KernelAxes

SIZES = {"b": 2, "s": 3, "g": 2, "d": 6, "e": 5, "h": 2, "k": 4}


@pytest.mark.parametrize(
    ("equation", "reduction", "output", "batch"),
    [
        ("bsd,de->bse", (0,), (1,), ()),
        ("bsd,ed->bse", (1,), (0,), ()),
        ("...d,dhk->...hk", (0,), (1, 2), ()),
        ("bs...d, hdk -> hb...sk", (1,), (0, 2), ()),
        ("bhkd,dehk->be", (0, 2, 3), (1,), ()),
        ("bgd,dge->bge", (0,), (2,), (1,)),
        ("ghbd,hkdg->bkgh", (2,), (1,), (0, 3)),
        ("bsd,de->be", (0,), (1,), ()),  # the input is summed over s before all else
    ],
)
def test_axes_and_factors(equation, reduction, output, batch):
    axes = read_einsum(equation)
    assert axes == KernelAxes(reduction=reduction, output=output, batch=batch)
    inputs, rest = equation.replace(" ", "").split(",")
    letters, _ = rest.split("->")
    rng = np.random.default_rng(0)
    x = rng.standard_normal([SIZES[a] for a in inputs.replace("...", "s" * ("..." in inputs))])
    shape = tuple(SIZES[a] for a in letters)
    kernel = Kernel(
        path="",
        layer="Einsum",
        shape=shape,
        reduction_axes=reduction,
        output_axes=output,
        stack_axes=batch,
        stack_indices=batch,
    )
    (u_equation, u_shape), (v_equation, v_shape) = einsum_factors(equation, shape, 3)
    u, v = kernel.factors(3)
    assert (u.shape, v.shape) == (u_shape, v_shape)
    factors = [rng.standard_normal(factor.shape) for factor in (u, v)]
    product = np.matmul(*(np.asarray(f.to_matrix(a)) for f, a in zip((u, v), factors, strict=True)))
    expected = np.einsum(equation, x, np.asarray(kernel.from_matrix(product)))
    actual = np.einsum(v_equation, np.einsum(u_equation, x, factors[0]), factors[1])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)  # JAX multiplied in float32


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("bd,de", "is not of the form 'input,kernel->output'"),
        ("bd->bd", "is not of the form"),
        ("bd,de,ef->bf", "is not of the form"),
        ("bd,d...->b...", "has an ellipsis in the kernel"),
        ("bdd,de->be", "repeats 'd' in one operand"),
        ("bd,dde->be", "repeats 'd' in one operand"),
        ("bd,dek->be", "sums 'k' over the kernel alone"),
        ("bd,e->bde", "contracts no axis of the kernel"),
        ("bd,d->bd", "contracts no axis of the kernel"),
        ("bd,d->b", "has no axis of output features"),
    ],
)
def test_what_is_no_matrix_product_has_its_reason(equation, reason):
    with pytest.raises(ValueError) as error:
        read_einsum(equation)
    assert str(error.value).startswith(f"its equation {equation!r} {reason}")
