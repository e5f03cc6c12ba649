"""transformers' names of BERT, bare (as sentence-transformers saves it) or below ``bert.``."""

from __future__ import annotations

from cuttlefish_jax.models.pretrained.naming import Naming, Tensor, as_is, dense, norm, number

_EMBEDDINGS = dict(word="word_embeddings", position="position_embeddings", token_type="token_type_embeddings")
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention/norm": "attention.output.LayerNorm",
    "ffn/intermediate": "intermediate.dense",
    "ffn/output": "output.dense",
    "ffn/norm": "output.LayerNorm",
}
# Checkpoints that were once TensorFlow's, bert-base-cased among them, call the parameters of a norm so.
_OLD_SUFFIXES = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}


def locate_bert(path: str) -> Tensor | None:
    """Where transformers has the parameter at ``path`` of a BERT.

    Example:
      >>> locate_bert("layer1/ffn/output/kernel").names
      ('bert.encoder.layer.0.output.dense.weight', 'encoder.layer.0.output.dense.weight')
    """
    match path.split("/"):
        case ["classifier", leaf]:
            return dense("classifier", leaf)
        case ["pooler", leaf]:
            return _below_bert(dense("pooler.dense", leaf))
        case ["embeddings", "norm", leaf]:
            return _below_bert(norm("embeddings.LayerNorm", leaf))
        case ["embeddings", table, "embedding"] if table in _EMBEDDINGS:
            return _below_bert(Tensor((f"embeddings.{_EMBEDDINGS[table]}.weight",), as_is))
        case [layer, block, sublayer, leaf] if (key := f"{block}/{sublayer}") in _LAYER:
            i = number(layer, "layer")
            make = norm if sublayer == "norm" else dense
            return None if i is None else _below_bert(make(f"encoder.layer.{i - 1}.{_LAYER[key]}", leaf))
    return None


def _below_bert(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    (name,) = tensor.names
    names = [name]
    for suffix, old in _OLD_SUFFIXES.items():
        if name.endswith(suffix):
            names.append(name.removesuffix(suffix) + old)
    return Tensor((*(f"bert.{name}" for name in names), *names), tensor.convert)


BERT = Naming(
    title="transformers BERT",
    signature="*encoder.layer.0.attention.self.query.weight",
    locate=locate_bert,
    buffers=("*embeddings.position_ids",),
)
