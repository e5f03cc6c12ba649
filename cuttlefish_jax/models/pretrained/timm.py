"""timm's names of DeiTs and ResMLPs."""

from __future__ import annotations

from collections.abc import Callable

from cuttlefish_jax.models.pretrained.naming import Naming, Tensor, affine, as_is, conv, dense, norm, number

# Of a block's layers: what makes them, and what timm calls them.
_Block = dict[str, tuple[Callable[[str, str], Tensor | None], str]]
_DEIT_BLOCK: _Block = {
    "norm1": (norm, "norm1"),
    "attention/qkv": (dense, "attn.qkv"),
    "attention/proj": (dense, "attn.proj"),
    "norm2": (norm, "norm2"),
    "mlp/fc1": (dense, "mlp.fc1"),
    "mlp/fc2": (dense, "mlp.fc2"),
}
_RESMLP_BLOCK: _Block = {
    "norm1": (affine, "norm1"),
    "token_mixing": (dense, "linear_tokens"),
    "norm2": (affine, "norm2"),
    "mlp/fc1": (dense, "mlp_channels.fc1"),
    "mlp/fc2": (dense, "mlp_channels.fc2"),
}
_RESMLP_SCALES = dict(scale1="ls1", scale2="ls2")


def locate_deit(path: str) -> Tensor | None:
    """Where timm has the parameter at ``path`` of a DeiT.

    Example:
      >>> locate_deit("block1/attention/qkv/kernel").names
      ('blocks.0.attn.qkv.weight',)
    """
    match path.split("/"):
        case ["cls_token" | "pos_embed" as name]:
            return Tensor((name,), as_is)
        case ["patch_embed", leaf]:
            return conv("patch_embed.proj", leaf)
        case ["norm", leaf]:
            return norm("norm", leaf)
        case ["head", leaf]:
            return dense("head", leaf)
    return _in_block(path, _DEIT_BLOCK)


def locate_resmlp(path: str) -> Tensor | None:
    """Where timm has the parameter at ``path`` of a ResMLP.

    Example:
      >>> locate_resmlp("block12/norm1/scale").names
      ('blocks.11.norm1.alpha',)
    """
    match path.split("/"):
        case ["patch_embed", leaf]:
            return conv("stem.proj", leaf)
        case ["norm", leaf]:
            return affine("norm", leaf)
        case ["head", leaf]:
            return dense("head", leaf)
        case [block, scale] if scale in _RESMLP_SCALES:
            i = number(block, "block")
            return None if i is None else Tensor((f"blocks.{i - 1}.{_RESMLP_SCALES[scale]}",), as_is)
    return _in_block(path, _RESMLP_BLOCK)


def _in_block(path: str, layers: _Block) -> Tensor | None:
    block, _, rest = path.partition("/")
    layer, _, leaf = rest.rpartition("/")
    i = number(block, "block")
    if i is None or layer not in layers:
        return None
    make, name = layers[layer]
    return make(f"blocks.{i - 1}.{name}", leaf)


DEIT = Naming(title="timm DeiT", signature="blocks.0.attn.qkv.weight", locate=locate_deit)
RESMLP = Naming(title="timm ResMLP", signature="blocks.0.linear_tokens.weight", locate=locate_resmlp)
