"""BERT with a classifier on top, as transformers has it, of any size.

References:
  Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, NAACL 2019.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from cuttlefish_jax.files import read_document
from cuttlefish_jax.models.layers import check_positive, check_rate, floating

# By the names that a config.json has for them: "gelu" is the exact one, "gelu_new" its tanh approximation.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = MappingProxyType(
    {
        "gelu": functools.partial(nn.gelu, approximate=False),
        "gelu_new": functools.partial(nn.gelu, approximate=True),
        "relu": nn.relu,
    }
)
_SHARED = (
    "dtype",
    "width",
    "heads",
    "ffn_width",
    "activation",
    "dropout",
    "attention_dropout",
    "layer_norm_epsilon",
    "init_std",
)


class BertLayers(nn.Module):
    """Base of the modules below: the settings that all their layers share.

    Attributes:
      dtype: of the computation; parameters are float32.
      width: features of a token.
      heads: of the attention; they share ``width``.
      ffn_width: features inside a feed-forward block.
      activation: a key of ``ACTIVATIONS``.
      dropout: rate, of the embeddings and of every block's output.
      attention_dropout: rate, of the attention weights.
      layer_norm_epsilon: added to the variance.
      init_std: standard deviation of the initial kernels and embeddings.
    """

    dtype: DTypeLike = jnp.float32
    width: int = 768
    heads: int = 12
    ffn_width: int = 3072
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_epsilon: float = 1e-12
    init_std: float = 0.02

    @property
    def shared(self) -> dict[str, Any]:
        """The settings, for the construction of a submodule that is one of these, too."""
        return {name: getattr(self, name) for name in _SHARED}

    def dense(self, features: int, name: str) -> nn.Dense:
        """A dense layer over the features of each token."""
        init = nn.initializers.normal(self.init_std)
        return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

    def embed(self, entries: int, name: str) -> nn.Embed:
        """A table of ``entries`` vectors."""
        init = nn.initializers.normal(self.init_std)
        return nn.Embed(entries, self.width, dtype=self.dtype, embedding_init=init, name=name)

    def norm(self, name: str) -> nn.LayerNorm:
        """Layer normalisation."""
        return nn.LayerNorm(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype, use_fast_variance=False, name=name
        )

    def drop(self, x: jax.Array, train: bool, rate: float | None = None) -> jax.Array:
        """Dropout; it draws from the stream ``dropout``."""
        return nn.Dropout(self.dropout if rate is None else rate, deterministic=not train)(x)


class Embeddings(BertLayers):
    """The sum of a token's word, position and type.

    Attributes:
      vocab_size: words.
      max_length: positions.
      token_types: types.
    """

    vocab_size: int = 28996
    max_length: int = 512
    token_types: int = 2

    @nn.compact
    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, train: bool = False) -> jax.Array:
        """Maps ids ``i32[b, t]`` and types ``i32[b, t]`` to ``[b, t, width]``."""
        length = input_ids.shape[-1]
        if length > self.max_length:
            raise ValueError(f"inputs of {length} tokens: this BERT has positions for {self.max_length}")
        x = self.embed(self.vocab_size, name="word")(input_ids)
        x += self.embed(self.token_types, name="token_type")(token_type_ids)
        x += self.embed(self.max_length, name="position")(jnp.arange(length))
        return self.drop(self.norm(name="norm")(x), train)


class Attention(BertLayers):
    """Self-attention, with the residual connection and the norm after it."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool = False) -> jax.Array:
        """Maps ``[b, t, width]`` to the same; ``mask``, ``bool[b, 1, 1, t]``, is where to look."""
        query, key, value = (
            self.dense(self.width, name=name)(x).reshape(*x.shape[:-1], self.heads, -1)
            for name in ("query", "key", "value")
        )
        dropped = train and self.attention_dropout > 0
        y = nn.dot_product_attention(
            query,
            key,
            value,
            mask=mask,
            dropout_rng=self.make_rng("dropout") if dropped else None,
            dropout_rate=self.attention_dropout,
            broadcast_dropout=False,
            deterministic=not dropped,
            dtype=jnp.dtype(self.dtype),
            force_fp32_for_softmax=True,
        )
        y = self.dense(self.width, name="output")(y.reshape(x.shape))
        return self.norm(name="norm")(x + self.drop(y, train))


class FeedForward(BertLayers):
    """Two dense layers for each token, with the residual connection and the norm after them."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps ``[b, t, width]`` to the same."""
        y = ACTIVATIONS[self.activation](self.dense(self.ffn_width, name="intermediate")(x))
        y = self.dense(self.width, name="output")(y)
        return self.norm(name="norm")(x + self.drop(y, train))


class Layer(BertLayers):
    """One layer of the encoder."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool = False) -> jax.Array:
        """Maps ``[b, t, width]`` to the same."""
        x = Attention(**self.shared, name="attention")(x, mask, train)
        return FeedForward(**self.shared, name="ffn")(x, train)


class Bert(BertLayers):
    """The encoder, the pooler (the first token through a dense layer and tanh), and a classifier.

    Attributes:
      num_classes: length of the logits.
      depth: layers.
      vocab_size: words.
      max_length: positions.
      token_types: types of tokens: the first sentence's and the second's.
      classifier_dropout: rate, of the pooled features; None is ``dropout``.
    """

    num_classes: int = 2
    depth: int = 12
    vocab_size: int = 28996
    max_length: int = 512
    token_types: int = 2
    classifier_dropout: float | None = None

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Maps token ids to logits ``f32[b, num_classes]``.

        Args:
          input_ids: ``i32[b, t]``, with ``t`` up to ``max_length``.
          attention_mask: ``[b, t]``, 0 at padding, which gets no attention; None is all ones.
          token_type_ids: ``i32[b, t]``; None is all zeros.
          train: whether dropout is on; it needs the random stream ``dropout`` then.

        Raises:
          ValueError: if there are more tokens than positions.
        """
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        mask = None if attention_mask is None else (attention_mask != 0)[:, None, None, :]
        x = Embeddings(
            **self.shared,
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            token_types=self.token_types,
            name="embeddings",
        )(input_ids, token_type_ids, train)
        for i in range(self.depth):
            x = Layer(**self.shared, name=f"layer{i + 1}")(x, mask, train)
        x = jnp.tanh(self.dense(self.width, name="pooler")(x[:, 0]))
        x = self.drop(x, train, self.classifier_dropout)
        return self.dense(self.num_classes, name="classifier")(x).astype(jnp.float32)


def bert_base(
    *,
    num_classes: int,
    vocab_size: int = 28996,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    ffn_width: int = 3072,
    max_length: int = 512,
    token_types: int = 2,
    dropout: float = 0.1,
    layer_norm_epsilon: float = 1e-12,
    config_file: str | Path = "",
    dtype: DTypeLike = "float32",
    norm_axis_name: str | None = None,
) -> Bert:
    """Builds a :class:`Bert`; the defaults are those of bert-base-cased.

    Args:
      num_classes: length of the logits; 1 for a regression.
      vocab_size: words.
      width: features of a token.
      depth: layers.
      heads: of the attention; they share ``width``.
      ffn_width: features inside a feed-forward block.
      max_length: positions.
      token_types: types of tokens.
      dropout: rate of every dropout.
      layer_norm_epsilon: added to the variance.
      config_file: a Hugging Face config.json of a BERT, or a folder with one; what it says about sizes,
        dropout, the norms, the activation and the initialisation replaces the options above.
      dtype: of the computation, e.g. ``"bfloat16"``.
      norm_axis_name: ignored, as there is no batch norm.

    Raises:
      ValueError: if a size is not positive, ``heads`` does not divide ``width``, a rate is not in [0, 1),
        ``dtype`` is not floating-point, or ``config_file`` cannot be read or is not a BERT's.

    Example:
      >>> model = bert_base(num_classes=2, width=8, depth=1, heads=2, ffn_width=16, vocab_size=100)
      >>> ids = jax.ShapeDtypeStruct((4, 32), jnp.int32)
      >>> jax.eval_shape(model.init_with_output, jax.random.key(0), ids)[0].shape
      (4, 2)
    """
    del norm_axis_name
    options: dict[str, Any] = dict(
        vocab_size=vocab_size,
        width=width,
        depth=depth,
        heads=heads,
        ffn_width=ffn_width,
        max_length=max_length,
        token_types=token_types,
        dropout=dropout,
        attention_dropout=dropout,
        layer_norm_epsilon=layer_norm_epsilon,
    )
    if config_file:
        options |= _options_of_config(Path(config_file))
    check_positive(num_classes=num_classes, **{name: options[name] for name in _SIZES.values()})
    if options["width"] % options["heads"]:
        raise ValueError(f"heads={options['heads']} does not divide width={options['width']}")
    rates = {name: rate for name, rate in options.items() if name.endswith("dropout")}
    check_rate(**{name: rate for name, rate in rates.items() if rate is not None})
    return Bert(num_classes=num_classes, dtype=floating(dtype), **options)


# The keys of a config.json, and the attributes of Bert that they give. Without a size there is no network;
# the rest has values that BERTs agree on, which old files leave out.
_SIZES = dict(
    vocab_size="vocab_size",
    hidden_size="width",
    num_hidden_layers="depth",
    num_attention_heads="heads",
    intermediate_size="ffn_width",
    max_position_embeddings="max_length",
    type_vocab_size="token_types",
)
_REST = dict(
    hidden_act="activation",
    hidden_dropout_prob="dropout",
    attention_probs_dropout_prob="attention_dropout",
    classifier_dropout="classifier_dropout",
    layer_norm_eps="layer_norm_epsilon",
    initializer_range="init_std",
)


def _options_of_config(path: Path) -> dict[str, Any]:
    """The attributes of :class:`Bert` that a config.json gives."""
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(read_document(path))
    except OSError as error:
        raise ValueError(f"cannot read config_file {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config_file {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config_file {path} is not an object of JSON")
    # Files older than transformers have no model_type.
    model_type = config.get("model_type", "bert")
    if model_type != "bert":
        raise ValueError(f"config_file {path} has model_type {model_type!r}; only 'bert' is known here")
    if missing := [key for key in _SIZES if key not in config]:
        raise ValueError(f"config_file {path} is not a BERT's: it has no {', '.join(missing)}")
    for key in _SIZES:
        if type(config[key]) is not int:
            raise ValueError(f"config_file {path}: {key} is {config[key]!r}, not an integer")
    for key in _REST:
        if key != "hidden_act" and not isinstance(config.get(key) or 0.0, int | float):
            raise ValueError(f"config_file {path}: {key} is {config[key]!r}, not a number")
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ValueError(
            f"config_file {path} has position_embedding_type {positions!r}; only 'absolute' is known"
        )
    if config.get("is_decoder"):
        raise ValueError(f"config_file {path} is a decoder's (is_decoder); only encoders are known here")
    if config.get("hidden_act", "gelu") not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"config_file {path} has hidden_act {config['hidden_act']!r}; known are {known}")
    return {name: config[key] for key, name in (_SIZES | _REST).items() if key in config}
