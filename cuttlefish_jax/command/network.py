"""The network of a checkpoint: of a run's settings, or one that the command line names."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import cuttlefish_jax as cf
from cuttlefish_jax.command.checkpoints import Checkpoint, read_config
from cuttlefish_jax.command.errors import mendable
from cuttlefish_jax.errors import CheckpointError, UserError
from cuttlefish_jax.models import MODELS, create_model

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """A full-rank network and the shapes of its inputs, for a batch of one.

    Attributes:
      model: a Linen module.
      inputs: what it is called with, besides ``train=False``.
    """

    model: nn.Module
    inputs: tuple[jax.ShapeDtypeStruct, ...]

    def kernels(self) -> cf.Kernels:
        """Its kernels, in call order."""
        with mendable():
            return cf.find_kernels(self.model, *self.inputs, train=False)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which network a checkpoint is of."""
    group = parser.add_argument_group(
        "the network",
        "A run's workdir has it in its config.json. The number of classes is read off the checkpoint.",
    )
    group.add_argument("--config", metavar="FILE", help="the config.json of the run that it comes from")
    group.add_argument("--model", metavar="NAME", help=f"or its name: {', '.join(MODELS)}")
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of --model, e.g. width=16; repeatable",
    )
    group.add_argument(
        "--input", metavar="SIZES", help="of --model: height,width,channels of an image, or tokens of a text"
    )


def find_network(args: argparse.Namespace, checkpoint: Checkpoint) -> Network | None:
    """The network that the options or the checkpoint's run describe; ``None`` if neither does.

    Raises:
      UserError: if the options contradict each other or lack something, if there is no such network, or if
        the checkpoint is not of it: with the first difference.
    """
    if (args.option or args.input) and not args.model:
        raise UserError("--option and --input go with --model NAME")
    if args.model and args.config:
        raise UserError("give --config or --model, not both")
    config = checkpoint.config
    if args.config and (config := read_config(Path(args.config))) is None:
        raise UserError(f"there is no file {args.config}")
    if args.model:
        return _named(args.model, _options(args.option), args.input, checkpoint)
    return None if config is None else _configured(config, checkpoint)


def _configured(config: Any, checkpoint: Checkpoint) -> Network:
    from cuttlefish_jax.training.network import create_network, input_shapes

    inputs = input_shapes(config.data)
    return _fitting(lambda n: create_network(config.model, num_outputs=n), inputs, checkpoint)


def _named(name: str, options: Mapping[str, Any], sizes: str | None, checkpoint: Checkpoint) -> Network:
    if sizes is None:
        raise UserError(f"--model {name} needs --input: 224,224,3 for images, or 128 for texts of 128 tokens")
    try:
        shape = (1, *(int(size) for size in sizes.split(",")))
    except ValueError:
        shape = ()
    if len(shape) not in (2, 4) or min(shape) < 1:
        raise UserError(f"--input {sizes} is neither height,width,channels nor a number of tokens")
    if len(shape) == 2:
        inputs = (jax.ShapeDtypeStruct(shape, jnp.int32),) * 3
    else:
        inputs = (jax.ShapeDtypeStruct(shape, jnp.float32),)
    return _fitting(lambda n: create_model(name, num_classes=n, **options), inputs, checkpoint)


def _options(pairs: list[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--option {pair} is not KEY=VALUE")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value  # a text
    return options


def _fitting(create: Any, inputs: Any, checkpoint: Checkpoint) -> Network:
    """The network with as many classes as the checkpoint has, if it fits otherwise."""
    with mendable():
        one, two = (_shapes(jax.eval_shape(_init(create(n)), *inputs)) for n in (1, 2))
    found = _full_shapes(checkpoint)
    num_classes = 1
    for name, shape in one.items():
        if (axes := [a for a, (x, y) in enumerate(zip(shape, two[name], strict=True)) if x != y]) and (
            len(found.get(name, ())) == len(shape)
        ):
            num_classes = found[name][axes[0]]
    model = create(num_classes)
    wanted = _shapes(jax.eval_shape(_init(model), *inputs))
    for name in [*wanted, *found]:
        if (theirs := found.get(name)) != (ours := wanted.get(name)):
            raise CheckpointError(
                f"{checkpoint.path} is not of this network: {name} is {theirs or 'missing'} there and "
                f"{ours or 'not needed'} in the network"
            )
    return Network(model, inputs)


def _init(model: nn.Module) -> Any:
    def init(*inputs: Any) -> Any:
        variables = model.init(jax.random.key(0), *inputs, train=False)
        return {name: variables[name] for name in ("params", "batch_stats") if name in variables}

    return init


def _shapes(tree: Any) -> dict[str, Shape]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _full_shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """The shapes that the checkpoint's arrays had before it was factorized."""
    shapes = _shapes(checkpoint.variables)
    if (plan := checkpoint.plan) is None:
        return shapes
    full = {}
    for name, shape in shapes.items():
        collection, *keys = name.split("/")
        owner = next((i for i in range(len(keys)) if "/".join(keys[:i]) in plan.ranks), None)
        if owner is None:
            full[name] = shape
            continue
        factor, param = keys[owner], keys[-1]
        path = "/".join(keys[:owner])
        prefix = "/".join([collection, *keys[:owner]])
        if factor == "v" and param == "kernel":
            kernel = plan.kernels[path]
            full[f"{prefix}/{kernel.param}"] = kernel.shape
        elif factor == "v":  # what else the layer has
            full[f"{prefix}/{param}"] = shape
    return full
