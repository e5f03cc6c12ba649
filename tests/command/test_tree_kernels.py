"""What is read off a params tree is what the model's own kernels are."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import cuttlefish_jax as cf
from cuttlefish_jax.command.tree_kernels import kernels_of_tree


class Attention(nn.Module):
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(7, 8)(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, use_bias=self.use_bias)(x)
        return nn.Dense(3)(x)


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=5,
        )
        return body(nn.Dense(6, name="dense"), x, None)[0]


class Convs(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.Conv(5, (3,))(x.reshape(len(x), -1, 4))
        return nn.DenseGeneral((2, 3))(x.mean(axis=1))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Attention(), jnp.ones((1, 4), int)),
        (Attention(use_bias=False), jnp.ones((1, 4), int)),
        (Stacked(), jnp.ones((1, 6))),
        (Convs(), jnp.ones((1, 8, 8, 2))),
        (nn.Dense(3), jnp.ones((1, 2))),
    ],
    ids=["attention", "attention without biases", "stacked", "convolutions", "root"],
)
def test_kernels_are_those_of_the_model(model, x):
    exact = cf.find_kernels(model, x)
    found = kernels_of_tree(jax.eval_shape(model.init, jax.random.key(0), x)["params"])
    assert dict(found) == {
        path: dataclasses.replace(kernel, positions=1, stack_indices=None) for path, kernel in exact.items()
    }
    assert found.num_params == exact.num_params
    assert set(found.skipped) == set(exact.skipped)


def test_names_are_sorted_by_their_numbers():
    tree = {f"layer{i}": {"kernel": np.ones((2, 3))} for i in (10, 2, 1)}
    assert list(kernels_of_tree(tree)) == ["layer1", "layer2", "layer10"]


def test_first_and_last_are_guessed_by_their_names():
    names = ("classifier", "block1/head_norm", "stem_conv", "block2/attention/qkv")
    tree = traverse_util.unflatten_dict({f"{name}/kernel": np.ones((2, 3)) for name in names}, sep="/")
    found = kernels_of_tree(tree)
    assert list(found) == ["stem_conv", "block1/head_norm", "block2/attention/qkv", "classifier"]
    assert not found.embedding_first
    assert kernels_of_tree(tree | {"tokens": {"embedding": np.ones((5, 4))}}).embedding_first


def test_what_is_no_matrix_is_skipped_with_the_reason():
    shapes = {"a": (3, 3, 1, 16), "b": (3, 3, 1, 16), "c": (1, 1, 16, 4), "d": (2,) * 6}
    found = kernels_of_tree({layer: {"kernel": np.ones(shape)} for layer, shape in shapes.items()})
    assert list(found) == ["a", "c"]
    assert found.skipped == {
        "b": "one input channel: a depthwise convolution",
        "d": "shape (2, 2, 2, 2, 2, 2) is neither a Dense nor a Conv",
    }
