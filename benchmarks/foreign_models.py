"""Networks that other people wrote and published as packages: small to test with, or of their usual size.

Where a package names no sizes (nanodl), it is 12 layers of width 768.

Those of the extra `foreign` install beside any jax that this package supports. The others ask for more than
their networks need (image augmentation, an older safetensors); `pip install --no-deps` gets them without:

    pip install -e '.[foreign]'
    pip install --no-deps flaxdiff google-tunix google-metrax qwix clu tensorboardX perfetto kagglehub
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import cuttlefish_jax as cf


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A network of somebody else.

    Attributes:
      name: what the table calls it.
      package: the distribution that it comes from.
      front_end: ``"Linen"`` or ``"NNX"``.
      build: ``build(small, rngs)`` gives the module; an NNX one with values from ``rngs``.
      inputs: ``inputs(small)`` gives the arguments of one forward pass, batch of 2.
      layer_types: gives the layer types to register for it, ``{class: LayerType}``.
    """

    name: str
    package: str
    front_end: str
    build: Callable[[bool, nnx.Rngs], Any]
    inputs: Callable[[bool], tuple[Any, ...]]
    layer_types: Callable[[], dict[type, cf.LayerType]] = dict

    @property
    def version(self) -> str | None:
        """The version of its package, ``None`` if that is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def _images(side: int, small_side: int = 32) -> Callable[[bool], tuple[Any, ...]]:
    def make(small: bool) -> tuple[Any, ...]:
        shape = (2, *[small_side if small else side] * 2, 3)
        return (jax.random.normal(jax.random.key(7), shape),)

    return make


def _tokens(length: int, vocabulary: int = 64) -> Callable[[bool], tuple[Any, ...]]:
    def make(small: bool) -> tuple[Any, ...]:
        return (jax.random.randint(jax.random.key(7), (2, 16 if small else length), 0, vocabulary),)

    return make


def _resnet18(small: bool, rngs: nnx.Rngs) -> Any:
    import jax_resnet

    sizes = dict(hidden_sizes=(16, 32), stage_sizes=(1, 1)) if small else {}
    return jax_resnet.ResNet18(n_classes=10 if small else 1000, **sizes)


def _resnext50(small: bool, rngs: nnx.Rngs) -> Any:
    import jax_resnet

    sizes = dict(hidden_sizes=(32, 32), stage_sizes=(1, 1)) if small else {}
    return jax_resnet.ResNeXt50(n_classes=10 if small else 1000, **sizes)


def _nanodl(kind: str) -> Callable[[bool, nnx.Rngs], Any]:
    def build(small: bool, rngs: nnx.Rngs) -> Any:
        import nanodl

        width, heads, layers = (32, 2, 2) if small else (768, 12, 12)
        common = dict(num_layers=layers, hidden_dim=width, num_heads=heads, dropout=0.0)
        if kind == "GPT3":
            options = dict(vocab_size=64 if small else 50257, embed_dim=width, start_token=0, end_token=1)
            options |= dict(feedforward_dim=4 * width, max_length=16 if small else 1024)
        else:
            options = dict(patch_size=(8, 8) if small else (16, 16), n_outputs=10 if small else 1000)
            options |= dict(feedforward_dim=width)  # it takes no other
        return getattr(nanodl, kind)(**common, **options)

    return build


def _flaxdiff_unet(small: bool, rngs: nnx.Rngs) -> Any:
    from flaxdiff.models.simple_unet import Unet

    if not small:
        return Unet()
    sizes = dict(emb_features=32, feature_depths=(16, 32), attention_configs=({"heads": 2}, {"heads": 2}))
    return Unet(num_res_blocks=1, **sizes)


def _flaxdiff_inputs(small: bool) -> tuple[Any, ...]:
    side, tokens, width = (16, 4, 16) if small else (64, 77, 768)
    keys = jax.random.split(jax.random.key(7), 2)
    text = jax.random.normal(keys[1], (2, tokens, width))
    return jax.random.normal(keys[0], (2, side, side, 3)), jnp.ones(2), text


def _mamba2(small: bool, rngs: nnx.Rngs) -> Any:
    import mamba2_jax

    sizes = dict(vocab_size=64, hidden_size=32, state_size=8, head_dim=16, chunk_size=8, num_hidden_layers=2)
    return mamba2_jax.Mamba2ForCausalLM(mamba2_jax.Mamba2Config(**(sizes if small else {})), rngs=rngs)


def _gat(small: bool, rngs: nnx.Rngs) -> Any:
    from jraphx.nn.models import GAT

    width, hidden = (32, 32) if small else (1433, 256)
    return GAT(width, hidden, 3, out_features=7, heads=4, rngs=rngs)


def _graph(small: bool) -> tuple[Any, ...]:
    nodes, width = (12, 32) if small else (2708, 1433)
    keys = jax.random.split(jax.random.key(7), 2)
    edges = jax.random.randint(keys[1], (2, 2 * nodes), 0, nodes)
    return jax.random.normal(keys[0], (nodes, width)), edges


def _qwen3(small: bool, rngs: nnx.Rngs) -> Any:
    from tunix.models.qwen3 import model as qwen3

    if not small:
        return qwen3.Qwen3(qwen3.ModelConfig.qwen3_0p6b(), rngs=rngs)
    sizes = dict(num_layers=2, vocab_size=64, embed_dim=32, hidden_dim=64, num_heads=4, head_dim=8)
    config = qwen3.ModelConfig(num_kv_heads=2, rope_theta=10_000, norm_eps=1e-6, **sizes)
    return qwen3.Qwen3(config, rngs=rngs)


def _qwen3_inputs(small: bool) -> tuple[Any, ...]:
    (tokens,) = _tokens(512)(small)
    length = tokens.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (2, length, length))
    return tokens, positions, None, mask


def _tunix_einsum() -> dict[type, cf.LayerType]:
    """Tunix has an einsum layer of its own: what one tells the transform of it."""
    from tunix.models.qwen3.model import Einsum

    def letters(layer: Any) -> tuple[str, str, str]:
        inputs, rest = layer.einsum_str.split(",")
        return inputs, *rest.split("->")

    def axes(layer: Any) -> cf.KernelAxes:
        inputs, kernel, _ = letters(layer)
        reduction = tuple(i for i, letter in enumerate(kernel) if letter in inputs)
        return cf.KernelAxes(reduction=reduction, output=tuple(set(range(len(kernel))) - {*reduction}))

    def first(layer: Any, rank: int) -> dict[str, Any]:
        inputs, kernel, _ = letters(layer)
        reduced = "".join(kernel[i] for i in axes(layer).reduction)
        kept = "".join(letter for letter in inputs if letter not in reduced)
        shape = (*(layer.shape[i] for i in axes(layer).reduction), rank)
        return dict(einsum_str=f"{inputs},{reduced}r->{kept}r", shape=shape)

    def second(layer: Any, rank: int) -> dict[str, Any]:
        output = tuple(layer.shape[i] for i in axes(layer).output)
        return dict(in_features=rank, out_features=output, use_bias=False, dtype=layer.dtype)

    layer_type = cf.LayerType(
        param="w", axes=axes, first=first, second=second, second_type=nnx.LinearGeneral, initializer=None
    )
    return {Einsum: layer_type}


MODELS = (
    ForeignModel(
        name="ResNet-18", package="jax-resnet", front_end="Linen", build=_resnet18, inputs=_images(224)
    ),
    ForeignModel(
        name="ResNeXt-50", package="jax-resnet", front_end="Linen", build=_resnext50, inputs=_images(224)
    ),
    ForeignModel(name="ViT", package="nanodl", front_end="Linen", build=_nanodl("ViT"), inputs=_images(224)),
    ForeignModel(
        name="MLP-Mixer", package="nanodl", front_end="Linen", build=_nanodl("Mixer"), inputs=_images(224)
    ),
    ForeignModel(
        name="GPT-3", package="nanodl", front_end="Linen", build=_nanodl("GPT3"), inputs=_tokens(512)
    ),
    ForeignModel(
        name="diffusion U-Net",
        package="flaxdiff",
        front_end="Linen",
        build=_flaxdiff_unet,
        inputs=_flaxdiff_inputs,
    ),
    ForeignModel(
        name="Mamba-2 130M", package="mamba2-jax", front_end="NNX", build=_mamba2, inputs=_tokens(512)
    ),
    ForeignModel(name="GAT", package="jraphx", front_end="NNX", build=_gat, inputs=_graph),
    ForeignModel(
        name="Qwen3 0.6B", package="google-tunix", front_end="NNX", build=_qwen3, inputs=_qwen3_inputs
    ),
    ForeignModel(
        name="Qwen3 0.6B, its Einsum registered",
        package="google-tunix",
        front_end="NNX",
        build=_qwen3,
        inputs=_qwen3_inputs,
        layer_types=_tunix_einsum,
    ),
)
