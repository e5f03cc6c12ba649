"""Reads whatever checkpoint people have: params, batch statistics, plan, and what a run knew besides."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import cuttlefish_jax as cf
from cuttlefish_jax.command.errors import mendable, needs
from cuttlefish_jax.command.torch_names import is_of_torch, to_flax
from cuttlefish_jax.errors import CheckpointError, UserError, WorkdirError
from cuttlefish_jax.files import read_document
from cuttlefish_jax.safetensors_file import has_weights
from cuttlefish_jax.serving import load_safetensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
      path: where it was found.
      params: nested dicts of arrays.
      batch_stats: the same, ``{}`` if there are none.
      plan: of params that are factorized.
      config: the settings of the run that it is of, a ConfigDict.
      ranks_0: ``{path: stable rank}`` at the random initialisation, if the run measured them.
      is_of_torch: whether it was in the names and the layout of PyTorch.
    """

    path: Path
    params: Mapping[str, Any]
    batch_stats: Mapping[str, Any]
    plan: cf.FactorizationPlan | None = None
    config: Any = None
    ranks_0: Mapping[str, Any] | None = None
    is_of_torch: bool = False

    @property
    def variables(self) -> dict[str, Any]:
        """What a Linen module is applied to."""
        return {"params": self.params} | ({"batch_stats": self.batch_stats} if self.batch_stats else {})

    @property
    def num_params(self) -> int:
        """How many parameters there are."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))

    def full_rank(self) -> Mapping[str, Any]:
        """The params with every kernel whole, products of factors among them.

        Raises:
          UserError: if the plan has extra batch norms, or does not fit.
        """
        if self.plan is None:
            return self.params
        with mendable():
            return jax.device_get(cf.merge_params(self.params, self.plan))


def read_checkpoint(source: str, plan: str | None = None) -> Checkpoint:
    """Reads a checkpoint of any kind; nothing is changed on the disk.

    Args:
      source: a safetensors file, or a folder of one; a run's workdir, whose best epoch is read, or its
        folder ``checkpoints`` or ``best``; or what orbax saved elsewhere.
      plan: a file with the plan of a factorized checkpoint that does not have it.

    Raises:
      UserError: if there is none, it is damaged, or has no params, or if the plan is not its plan.
    """
    checkpoint = _read(Path(source))
    if plan is None:
        return checkpoint
    if checkpoint.plan is not None:
        raise UserError(f"{checkpoint.path} has its plan: --plan {plan} is not needed")
    with mendable():
        try:
            found = cf.FactorizationPlan.from_json(read_document(Path(plan)).decode())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {plan}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{plan}: {error}") from error
    return dataclasses.replace(checkpoint, plan=found)


def _read(path: Path) -> Checkpoint:
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}")
    if path.is_dir() and (path / "config.json").is_file():
        for name in ("best", "checkpoints"):
            if _is_ours(path / name):
                return _read_run(path / name)
    if path.is_dir() and _is_ours(path):
        return _read_run(path)
    if path.is_dir() and (path / "record").is_dir() and _is_ours(path.parent):
        raise UserError(f"{path} is one of several checkpoints: give {path.parent}, its last one is read")
    if path.is_dir() and not has_weights(path):
        return _read_orbax(path)
    with mendable():
        tree, plan = load_safetensors(path)
    if plan is None and is_of_torch(tree):
        return Checkpoint(path=path, is_of_torch=True, **_variables(to_flax(tree), path))
    return Checkpoint(path=path, plan=plan, **_variables(tree, path))


def _is_ours(directory: Path) -> bool:
    """Whether these are checkpoints of train.py: every step has an item ``record``."""
    return directory.is_dir() and any((step / "record").is_dir() for step in directory.iterdir())


def _read_run(directory: Path) -> Checkpoint:
    with needs("orbax-checkpoint"):
        from cuttlefish_jax.training.checkpoint import Checkpointer
    with Checkpointer(directory) as checkpointer:
        restored = checkpointer.restore()
    if restored is None:
        raise CheckpointError(f"there is no whole checkpoint in {directory}")
    tree: dict[str, Any] = {}
    for name, leaf in restored.leaves.items():
        *parents, last = name.split("/")
        node: Any = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{restored.directory}: an array stands in the way of {name!r}")
        node[last] = leaf
    if tree.get("ema_params"):
        tree["params"] = tree["ema_params"]  # what the run evaluates
    config, plan, record = read_config(directory.parent / "config.json"), None, restored.record
    try:
        if record["plan"] is not None:
            plan = cf.FactorizationPlan.from_json(record["plan"])
        ranks_0 = {path: history[0] for path, history in record["tracker"]["history"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{restored.directory}: its record is not that of a run: {error}") from error
    # Pre-trained weights are not random: what they had at first says nothing.
    known = None if config is None or config.model.pretrained else ranks_0 or None
    return Checkpoint(path=directory, plan=plan, config=config, ranks_0=known, **_variables(tree, directory))


def read_config(file: Path) -> Any:
    """The settings of a run, ``None`` if there is no such file.

    Raises:
      WorkdirError: if the file is damaged.
    """
    with needs("ml-collections"):
        from ml_collections import ConfigDict
    if not file.is_file():
        return None
    try:
        config: Any = ConfigDict(json.loads(read_document(file)))
        _ = config.model.name, config.data.name
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WorkdirError(f"{file} is not the config.json of a run: {error}") from error
    return config


def _read_orbax(directory: Path) -> Checkpoint:
    with needs("orbax-checkpoint"):
        from cuttlefish_jax.training.orbax_tree import read_tree
    return Checkpoint(path=directory, **_variables(read_tree(directory), directory))


def _variables(tree: Any, path: Path) -> dict[str, Any]:
    """Params and batch statistics, wherever a training state has them."""
    stats: Any = {}
    while isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        stats, tree = tree.get("batch_stats") or stats, tree["params"]
    params = _without_boxes(tree)
    if not isinstance(params, dict) or not params:
        raise UserError(f"{path} has no params: it is a {type(tree).__name__}, not nested dicts of arrays")
    return {"params": params, "batch_stats": _without_boxes(stats) or {}}


def _without_boxes(tree: Any) -> Any:
    """Nested dicts with text keys; NNX may have saved an array as ``{"value": array}``."""
    if not isinstance(tree, Mapping):
        return tree
    if set(tree) == {"value"} and not isinstance(tree["value"], Mapping):
        return tree["value"]
    return {str(key): _without_boxes(value) for key, value in tree.items() if value is not None}
