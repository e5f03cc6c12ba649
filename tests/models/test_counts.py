"""Parameters and FLOPs of every network, full-rank and factorized, to the last digit; nothing is computed.

``pytest tests/models/test_counts.py -s`` prints the table. FLOPs are compared to as many digits as were
published, by torchvision or with the method; of the networks where none were, with a count by hand.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

import cuttlefish_jax as cf
from cuttlefish_jax.models import create_model


def image(size):
    return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network at the size of its experiment, and what is known of it."""

    name: str
    params: int
    gmac: str  # billions of multiply-accumulates, forward, for one example
    options: dict = dataclasses.field(default_factory=dict)
    input: jax.ShapeDtypeStruct = dataclasses.field(default_factory=lambda: image(224))
    num_classes: int = 1000

    def __str__(self):
        return "-".join([self.name, *self.options.values()])

    @property
    def model(self):
        return create_model(self.name, num_classes=self.num_classes, **self.options)

    def count(self, model):
        """Parameters and FLOPs of the network or its factorized form, traced."""
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), self.input)
        params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
        return params, cf.count_flops(lambda v, x: model.apply(v, x, train=False), variables, self.input)


CIFAR = dict(options={"stem": "cifar"}, input=image(32), num_classes=10)
IMAGENET = dict(options={"stem": "imagenet"})
GLUE = dict(input=jax.ShapeDtypeStruct((1, 128), jnp.int32), num_classes=2)


def transformer_gmac(width):
    """DeiT's products by hand: patches, 12 blocks of dense layers and attention on 197 tokens, head."""
    blocks = 12 * (197 * 12 * width**2 + 2 * 197**2 * width)
    return f"{(196 * 768 * width + blocks + 1000 * width) / 1e9:.6f}"


def mlp_gmac(depth):
    """ResMLP's products by hand: patches, blocks of token mixing and MLP on 196 tokens, head."""
    blocks = depth * (384 * 196**2 + 196 * 8 * 384**2)
    return f"{(196 * 768 * 384 + blocks + 1000 * 384) / 1e9:.6f}"


def bert_gmac():
    """BERT-base's products by hand: 12 layers on 128 tokens, pooler, classifier."""
    layers = 12 * (128 * 12 * 768**2 + 2 * 128**2 * 768)
    return f"{(layers + 768**2 + 2 * 768) / 1e9:.6f}"


NETWORKS = [
    Network(name="resnet18", params=11_173_962, gmac="0.5554", **CIFAR),
    Network(name="vgg19", params=20_035_018, gmac="0.398", **CIFAR),
    Network(name="resnet18", params=11_689_512, gmac="1.814", **IMAGENET),
    Network(name="resnet34", params=21_797_672, gmac="3.664", **IMAGENET),
    Network(name="resnet50", params=25_557_032, gmac="4.089", **IMAGENET),
    Network(name="resnet101", params=44_549_160, gmac="7.801", **IMAGENET),
    Network(name="wide_resnet50_2", params=68_883_240, gmac="11.398", **IMAGENET),
    Network(name="vgg19", params=143_678_248, gmac="19.632", **IMAGENET),
    Network(name="deit_tiny", params=5_717_416, gmac=transformer_gmac(192)),
    Network(name="deit_small", params=22_050_664, gmac=transformer_gmac(384)),
    Network(name="deit_base", params=86_567_656, gmac="17.564"),
    Network(name="resmlp_s12", params=15_350_872, gmac=mlp_gmac(12)),
    Network(name="resmlp_s24", params=30_020_680, gmac=mlp_gmac(24)),
    Network(name="resmlp_s36", params=44_690_488, gmac=mlp_gmac(36)),
    Network(name="bert_base", params=108_311_810, gmac=bert_gmac(), **GLUE),
]
BY_NAME = {str(network): network for network in NETWORKS}


def check_gmac(flops, expected):
    digits = len(expected.partition(".")[2])
    assert f"{flops / 2e9:.{digits}f}" == expected


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_full_rank(network):
    params, flops = network.count(network.model)
    print(f"\n{network!s:30} {params:>12,} {flops / 2e9:>9.4f} GMAC", end="")
    assert params == network.params
    assert cf.find_kernels(network.model, network.input).num_params == network.params
    check_gmac(flops, network.gmac)


def pufferfish_resnet18(kernels):
    """All convolutions at a quarter of their outputs, but the stem's, the first block's and the shortcuts."""
    return {
        path: kernel.n // 4
        for path, kernel in kernels.items()
        if path.startswith("stage") and not path.startswith("stage1/block1/") and "shortcut" not in path
    }


def pufferfish_vgg19(kernels):
    """The tenth convolution and those after it at rank 128."""
    return dict.fromkeys([path for path in kernels if "conv" in path][9:], 128)


def pufferfish_resnet50(kernels):
    """Stage 4: its nine convolutions at a quarter of the full rank, its shortcut a quarter of its inputs."""
    return {
        path: (kernel.m if "shortcut" in path else kernel.max_rank) // 4
        for path, kernel in kernels.items()
        if path.startswith("stage4/")
    }


def attention_and_mlp(kernels):
    return {path: 384 for path in kernels if path.endswith(("qkv", "fc1", "fc2"))}


def attention(kernels):
    return {path: 345 for path in kernels if "/attention/" in path}


def mlp(kernels):
    return {path: 192 for path in kernels if path.endswith(("fc1", "fc2"))}


@pytest.mark.parametrize(
    ("network", "ranks", "extra_batch_norm", "layers", "params", "gmac"),
    [
        ("resnet18-cifar", pufferfish_resnet18, False, 14, 3_336_266, "0.216"),
        ("resnet18-cifar", pufferfish_resnet18, True, 14, 3_338_122, "0.216"),
        ("vgg19-cifar", pufferfish_vgg19, False, 7, 8_107_466, None),
        ("resnet50-imagenet", pufferfish_resnet50, False, 10, 15_202_344, None),
        ("wide_resnet50_2-imagenet", pufferfish_resnet50, False, 10, 40_047_400, None),
        ("deit_base", attention_and_mlp, False, 36, 58_256_104, None),
        # The count that is published, 28,779,064, has a bias on each first factor. Ours has none: between
        # two factors a bias can do nothing that the one after the second cannot.
        ("resmlp_s36", mlp, False, 72, 28_779_064 - 36 * 2 * 192, None),
        ("bert_base", attention, False, 48, 105_436_418, None),
    ],
)
def test_factorized(network, ranks, extra_batch_norm, layers, params, gmac):
    network = BY_NAME[network]
    kernels = cf.find_kernels(network.model, network.input)
    plan = cf.FactorizationPlan.from_ranks(kernels, ranks(kernels), extra_batch_norm=extra_batch_norm)
    counted, flops = network.count(cf.factorize(network.model, plan))
    print(f"\n{network!s:30} {counted:>12,} {flops / 2e9:>9.4f} GMAC", end="")
    assert len(plan.ranks) == layers
    assert plan.num_params == params
    assert counted == params
    # By another way: whatever is not the kernels' own is the same before and after.
    saved = sum(kernels[path].flops() - kernels[path].flops(rank) for path, rank in plan.ranks.items())
    assert flops == network.count(network.model)[1] - saved
    if gmac is not None:
        check_gmac(flops, gmac)
