"""Stacks found from the names: of the package's networks, and of names that are hard to tell apart."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from linen_zoo import prepared

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import Kernel, Kernels
from cuttlefish_jax.models import create_model
from cuttlefish_jax.profiling.stacks import find_stacks


def images(size):
    return (jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),)


def stacks_of(model, *inputs, **kwargs):
    """``{stack: how many kernels}``."""
    stacks = list(find_stacks(cf.find_kernels(model, *inputs, **kwargs)).values())
    return {stack: stacks.count(stack) for stack in stacks}


def named(*layers):
    """Kernels at these paths; ``path:width`` is of another width than 4."""
    entries = []
    for layer in layers:
        path, _, width = layer.partition(":")
        shape = (4, int(width or 4))
        entries.append(Kernel(path=path, layer="Dense", shape=shape, reduction_axes=(0,), output_axes=(1,)))
    return Kernels(tuple(entries))


@pytest.mark.parametrize(
    ("name", "size", "options", "expected"),
    [
        ("resnet18", 32, {}, {"stage1": 4, "stage2": 5, "stage3": 5, "stage4": 5}),
        ("resnet34", 32, {}, {"stage1": 6, "stage2": 9, "stage3": 13, "stage4": 7}),
        ("resnet50", 64, {"stem": "imagenet"}, {"stage1": 10, "stage2": 13, "stage3": 19, "stage4": 10}),
        ("resnet18", 8, {"stage_sizes": (1, 1)}, {"stage1": 2, "stage2": 3}),
    ],
)
def test_resnets(name, size, options, expected):
    model = create_model(name, num_classes=10, width=4, **options)
    assert stacks_of(model, *images(size), train=False) == {"stem_conv": 1, **expected, "classifier": 1}


def test_vgg():
    model = create_model("vgg19", num_classes=10, width=4)
    convs = {f"stage{i}": number for i, number in enumerate((2, 2, 4, 4, 4), start=1)}
    assert stacks_of(model, *images(32), train=False) == {**convs, "classifier": 1}


def test_transformers():
    for name, options, in_block in (("deit_tiny", {"heads": 2}, 4), ("resmlp_s12", {}, 3)):
        model = create_model(name, num_classes=10, width=8, depth=5, patch=8, **options)
        expected = {"patch_embed": 1, "block": 5 * in_block, "head": 1}
        assert stacks_of(model, *images(32), train=False) == expected
    sizes = dict(vocab_size=20, width=8, depth=3, heads=2, ffn_width=16, max_length=6)
    tokens = [jax.ShapeDtypeStruct((2, 6), jnp.int32)] * 3
    model = create_model("bert_base", num_classes=2, **sizes)
    assert stacks_of(model, *tokens, train=False) == {"layer": 18, "pooler": 1, "classifier": 1}


class Block(nn.Module):
    """A transformer block."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        y = nn.Dense(16, name="fc1")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="fc2")(nn.gelu(y))


class Transformer(nn.Module):
    """Blocks of one width, some of them after the tokens were thinned out."""

    thinned: int = 0

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="patch_embed")(x)
        for i in range(12):
            x = Block(name=f"block{i + 1}")(x[:, ::2] if i and i == self.thinned else x)
        return nn.Dense(3, name="head")(x.mean(1))


def test_the_blocks_of_a_transformer():
    x = jax.ShapeDtypeStruct((2, 6, 5), jnp.float32)
    assert stacks_of(Transformer(), x) == {"patch_embed": 1, "block": 72, "head": 1}
    # The same names and shapes, at another resolution.
    assert stacks_of(Transformer(thinned=4), x) == {
        "patch_embed": 1, "block1..block4": 24, "block5..block12": 48, "head": 1
    }  # fmt: skip


def test_layers_of_a_sequence_and_of_a_scan():
    model = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.relu, nn.Dense(8), nn.Dense(2)])
    expected = {"layers_0..layers_3": 3, "layers_4": 1}
    assert stacks_of(model, jnp.ones((2, 8))) == expected
    kernels = prepared("scan")[-1]
    assert find_stacks(kernels) == {
        "stem": "stem", "blocks/Block_0/up": "blocks", "blocks/Block_0/down": "blocks", "head": "head"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ((), []),
        (("",), [""]),
        (("fc",), ["fc"]),
        (("fc1", "fc2"), ["fc", "fc"]),
        (("fc_1", "fc_2"), ["fc", "fc"]),
        (("fc-01", "fc-02"), ["fc", "fc"]),
        (("h1/fc", "h2/fc"), ["h", "h"]),
        (("1/fc", "2/fc"), ["1..2", "1..2"]),  # the names share nothing
        (("fc1", "fc2:5"), ["fc1", "fc2"]),
        (("h1/fc", "h2/fc:5", "h3/fc:5"), ["h1", "h2..h3", "h2..h3"]),
        (("h1/a", "h2/b"), ["h1", "h2"]),
        (("h1/a", "h2/a", "h2/b"), ["h1", "h2", "h2"]),
        (("a1", "b2"), ["a1", "b2"]),
        (("a1", "b", "a2"), ["a1", "b", "a2"]),  # they do not follow each other
        (("a1", "a2", "b", "a3", "a4"), ["a1..a2", "a1..a2", "b", "a3..a4", "a3..a4"]),
        (("a", "a1", "a2"), ["a", "a1..a2", "a1..a2"]),  # "a" is another layer
        (("a1", "a2", "a/fc"), ["a1..a2", "a1..a2", "a"]),
        (("h1/a", "top", "h1/b"), ["h1", "top", "h1"]),  # by name, not by the order of calls
        (("a/h1/fc", "a/h2/fc:5"), ["a", "a"]),  # only the first component counts
    ],
)
def test_names(paths, expected):
    assert list(find_stacks(named(*paths)).values()) == expected


def test_types_and_positions_count():
    def dense(path, **options):
        fields = dict(path=path, layer="Dense", shape=(4, 4), reduction_axes=(0,), output_axes=(1,))
        return Kernel(**{**fields, **options})

    assert set(find_stacks(Kernels((dense("a1"), dense("a2")))).values()) == {"a"}
    for options in ({"positions": 2}, {"layer": "DenseGeneral"}):
        assert len(set(find_stacks(Kernels((dense("a1"), dense("a2", **options)))).values())) == 2
