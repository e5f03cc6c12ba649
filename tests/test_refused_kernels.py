"""Kernels that are no matrices of real numbers, and layers that compute with more than their params."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cuttlefish_jax as cf
from cuttlefish_jax.command.tree_kernels import kernels_of_tree
from cuttlefish_jax.kernels import Kernel, Kernels

X = jnp.ones((2, 8))
DTYPES = [jnp.complex64, jnp.int8, jnp.int32, jnp.bool_]


def integers(key, shape, dtype):
    return jnp.ones(shape, dtype)


class Mixed(nn.Module):
    """A layer of a dtype between others."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="before")(x)
        x = nn.Dense(8, use_bias=False, kernel_init=integers, param_dtype=self.dtype, name="odd")(x).real
        return nn.Dense(8, name="after")(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_that_are_not_floating_point_are_skipped(dtype):
    kernels = cf.find_kernels(Mixed(dtype), X)
    reason = f"its kernel is of {jnp.dtype(dtype)}, which is not floating-point"
    assert list(kernels) == ["before", "after"]
    assert kernels.skipped == {"odd": reason}
    layer = nnx.Linear(8, 8, use_bias=False, kernel_init=integers, param_dtype=dtype, rngs=nnx.Rngs(0))
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), layer)
    kernels = cf.find_kernels(model, X)
    assert list(kernels) == ["layers/0"]
    assert kernels.skipped == {"layers/1": reason}
    kernels = kernels_of_tree(
        {"odd": {"kernel": np.ones((8, 8), dtype)}, "even": {"kernel": np.ones((8, 8))}}
    )
    assert list(kernels) == ["even"]
    assert kernels.skipped == {"odd": reason}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_floating_point_kernels_are_found(dtype):
    assert list(cf.find_kernels(Mixed(dtype), X)) == ["before", "odd", "after"]


def one_kernel(dtype, seed=0):
    kernel = Kernel(path="a/b", layer="Dense", shape=(6, 5), reduction_axes=(0,), output_axes=(1,))
    values = np.random.default_rng(seed).integers(-9, 9, (6, 5))
    return {"a": {"b": {"kernel": jnp.asarray(values, dtype)}}}, Kernels((kernel,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit])
def test_params_that_are_not_floating_point_have_no_factors(dtype, transform):
    params, kernels = one_kernel(dtype)
    plan = cf.FactorizationPlan.from_ranks(kernels, {"a/b": 2})
    message = f"^the kernel at 'a/b' has dtype {jnp.dtype(dtype)}, expected a floating-point one"
    with pytest.raises(ValueError, match=message):
        transform(lambda params: cf.factorize_params(params, plan))(params)


@pytest.mark.parametrize(
    "measure",
    [
        cf.stable_ranks,
        cf.singular_values,
        cf.accumulative_ranks,
        lambda params, kernels: cf.warm_stable_ranks(params, kernels, cf.initial_vectors(kernels))[0],
    ],
)
def test_spectra_of_complex_params_are_refused_and_those_of_integers_are_right(measure):
    params, kernels = one_kernel(jnp.complex64)
    with pytest.raises(ValueError, match="the kernel at 'a/b' has dtype complex64, expected a real one"):
        measure(params, kernels)
    expected = measure(one_kernel(jnp.float32)[0], kernels)
    np.testing.assert_allclose(measure(one_kernel(jnp.int8)[0], kernels)["a/b"], expected["a/b"], rtol=1e-6)


# --- Variables beside the params ----------------------------------------------------------------------------


class Counting(nn.Module):
    """A dense layer that also counts its calls."""

    features: int

    @nn.compact
    def __call__(self, x):
        self.variable("counts", "calls", lambda: jnp.zeros(())).value += 1
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        self.sow("intermediates", "inputs", x)
        return self.perturb("outputs", x @ kernel)


class Watched(nn.Module):
    """A dense layer that shows what it gets."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        self.sow("intermediates", "inputs", x)
        return self.perturb("outputs", x @ kernel)


AS_DENSE = cf.LayerType(
    axes=lambda layer: cf.KernelAxes(reduction=(0,), output=(1,)),
    first=lambda layer, rank: {"features": rank},
    second=lambda layer, rank: {"features": layer.features},
    initializer=None,
)
cf.register_layer(Counting, AS_DENSE)
cf.register_layer(Watched, AS_DENSE)


def test_layers_with_variables_of_their_own_are_skipped():
    fp8 = nn.Dense(8, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    for layer, collection in ((fp8, "_overwrite_with_gradient"), (Counting(8), "counts")):
        kernels = cf.find_kernels(nn.Sequential([nn.Dense(8), layer]), X)
        assert list(kernels) == ["layers_0"]
        assert kernels.skipped == {"layers_1": f"it has variables of its own in {collection!r}"}


def test_what_is_sown_is_no_variable_of_the_layer():
    assert list(cf.find_kernels(nn.Sequential([nn.Dense(8), Watched(8)]), X)) == ["layers_0", "layers_1"]


def test_factors_with_a_norm_between_them_are_found():
    model = nn.Sequential([nn.Dense(8), nn.Dense(8)])
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, X), {"layers_0": 3}, extra_batch_norm=True)
    kernels = cf.find_kernels(cf.factorize(model, plan), X)
    assert set(kernels) == {"layers_0/u", "layers_0/v", "layers_1"}
    assert not kernels.skipped
