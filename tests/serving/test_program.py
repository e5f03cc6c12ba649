"""Exported programs: any batch, the model's own numbers, in a process that knows nothing of this package."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import cuttlefish_jax as cf
from cuttlefish_jax import serving
from tests.serving.serving_tools import IMAGES, factorized

_SERVER = """
import pathlib, sys
import jax, numpy as np
folder = pathlib.Path(sys.argv[1])
program = jax.export.deserialize(bytearray((folder / "program").read_bytes()))
images = np.load(folder / "images.npy")
outputs = [np.asarray(program.call(images[:n])) for n in (1, 3, 7)]
np.savez(folder / "outputs.npz", *outputs)
assert "cuttlefish_jax" not in sys.modules and "flax" not in sys.modules
"""


def deserialize(program):
    return jax.export.deserialize(bytearray(program))


def test_a_process_without_this_package_serves_batches_of_any_size(tmp_path):
    low, variables, _ = factorized()
    (tmp_path / "program").write_bytes(serving.export(low, variables, IMAGES))
    images = np.random.default_rng(0).normal(size=(7, 8, 8, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run(
        [sys.executable, "-I", "-c", _SERVER, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    outputs = list(np.load(tmp_path / "outputs.npz").values())
    assert [len(output) for output in outputs] == [1, 3, 7]
    expected = jax.jit(low.apply)(variables, images)
    for output in outputs:
        np.testing.assert_allclose(output, expected[: len(output)], rtol=1e-5, atol=1e-5)


def test_weights_can_be_an_argument(tmp_path):
    low, variables, plan = factorized()
    serving.save_safetensors(tmp_path / "low.safetensors", variables, plan)
    program = serving.export(low, variables, IMAGES, bake_weights=False)
    assert len(program) < len(serving.export(low, variables, IMAGES)) - 4 * plan.num_params / 2
    loaded, _ = serving.load_safetensors(tmp_path / "low.safetensors")
    images = jnp.ones((2, 8, 8, 3))
    np.testing.assert_allclose(
        deserialize(program).call(loaded, images), jax.jit(low.apply)(variables, images), rtol=1e-5, atol=1e-5
    )


def test_programs_for_other_platforms():
    low, variables, _ = factorized()
    program = deserialize(serving.export(low, variables, IMAGES, platforms=("cpu", "tpu")))
    assert program.platforms == ("cpu", "tpu")


class Pair(nn.Module):
    """Two inputs and a flag, and a method besides."""

    @nn.compact
    def __call__(self, tokens, mask, *, double):
        x = nn.Dense(4)(nn.Embed(10, 8)(tokens)) * mask[..., None]
        return x * 2 if double else x

    def twice(self, tokens, mask):
        return self(tokens, mask, double=True)


def test_all_inputs_have_the_batch_and_options_are_constants():
    tokens, mask = jnp.ones((2, 5), jnp.int32), jnp.ones((2, 5))
    apply = jax.jit(functools.partial(Pair().apply, double=True))
    variables = jax.jit(functools.partial(Pair().init, double=True))(jax.random.key(0), tokens, mask)
    expected = apply(variables, tokens[:1], mask[:1])
    for options in ({"double": True}, {"method": "twice"}):
        program = deserialize(serving.export(Pair(), variables, tokens, mask, **options))
        assert [str(x.shape[0]) for x in program.in_avals] == ["batch", "batch"]
        np.testing.assert_allclose(program.call(tokens[:1], mask[:1]), expected, rtol=1e-6)


def test_symbolic_dimensions_of_the_callers_are_taken_as_they_are():
    batch, length = jax.export.symbolic_shape("n, length")
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), jnp.ones((1, 1, 4)))
    shape = jax.ShapeDtypeStruct((batch, length, 4), jnp.float32)
    program = deserialize(serving.export(model, variables, shape))
    assert program.call(jnp.ones((2, 7, 4))).shape == (2, 7, 3)


def test_functions_are_models_too():
    program = serving.export(lambda scale, x: scale * x, jnp.float32(3), jnp.ones((1, 2)))
    np.testing.assert_array_equal(deserialize(program).call(jnp.ones((4, 2))), np.full((4, 2), 3.0))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.layers[1](self.layers[0](x))))


@pytest.mark.parametrize("bake_weights", [True, False])
def test_nnx_modules(bake_weights, tmp_path):
    model = Nnx(nnx.Rngs(0))
    model.eval()
    x = jax.random.normal(jax.random.key(1), (3, 8))
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), {"layers/1": 3})
    model = cf.factorize(model, plan)
    serving.save_safetensors(tmp_path / "nnx.safetensors", model, plan)
    loaded, loaded_plan = serving.load_safetensors(tmp_path / "nnx.safetensors")
    assert loaded_plan == plan
    assert set(loaded["layers"]["1"]) == {"u", "v"} and set(loaded["norm"]) == {
        "bias",
        "mean",
        "scale",
        "var",
    }
    program = deserialize(serving.export(model, None, x[:1], bake_weights=bake_weights))
    output = program.call(x) if bake_weights else program.call(loaded, x)
    np.testing.assert_allclose(output, model(x), rtol=1e-5, atol=1e-6)


def test_stacked_and_merged_models():
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(
                lambda layer, x, _: (nn.relu(layer(x)), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return body(nn.Dense(16, name="dense"), x, None)[0]

    model, x = Stacked(), jnp.ones((2, 16))
    plan = cf.FactorizationPlan.from_ranks(cf.find_kernels(model, x), {"dense": 4})
    params = cf.factorize_params(jax.jit(model.init)(jax.random.key(0), x)["params"], plan)
    low = deserialize(serving.export(cf.factorize(model, plan), {"params": params}, x))
    merged = deserialize(serving.export(model, {"params": cf.merge_params(params, plan)}, x))
    np.testing.assert_allclose(low.call(jnp.ones((5, 16))), merged.call(jnp.ones((5, 16))), atol=1e-5)


def test_sharding_metadata_and_frozen_dicts_stay_behind(tmp_path):
    names = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    model, x = nn.Dense(4, kernel_init=names), jnp.ones((2, 3))
    variables = freeze(model.init(jax.random.key(0), x))
    program = deserialize(serving.export(model, variables, x, bake_weights=False))
    serving.save_safetensors(tmp_path / "dense.safetensors", variables)
    loaded, _ = serving.load_safetensors(tmp_path / "dense.safetensors")
    np.testing.assert_array_equal(program.call(loaded, x), np.full((2, 4), 3.0))


def test_what_cannot_be_exported_is_refused():
    low, variables, _ = factorized()
    with pytest.raises(ValueError, match="needs an input with a batch axis"):
        serving.export(low, variables)
    with pytest.raises(ValueError, match="Factorized needs its variables"):
        serving.export(low, None, IMAGES)
    with pytest.raises(ValueError, match="Nnx is an NNX module, which has its own variables"):
        serving.export(Nnx(nnx.Rngs(0)), {}, jnp.ones((1, 8)))
