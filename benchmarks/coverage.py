"""How much of networks that other people published the transform covers: a table in Markdown.

    python benchmarks/coverage.py [--small] [--only PACKAGE] [--json FILE]

Each network of benchmarks/foreign_models.py whose package is installed, at its usual size and abstractly: no
weight is made. "parameters" is the share of the model's that are in kernels which can be factorized; "forward
FLOPs" the share of all its matrix products and convolutions that are with these kernels (the rest is
attention's products of activations, and layers that are skipped). Which of the kernels a plan factorizes, and
at what ranks, is another question: by default it keeps the first and the last.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
from flax import nnx
from foreign_models import MODELS, ForeignModel

import cuttlefish_jax as cf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """What can be factorized of one network.

    Attributes:
      network, package, version, front_end: as in :class:`ForeignModel`.
      size: parameters of the model.
      kernels: how many can be factorized.
      parameters: the share of the model's that are theirs.
      flops: the share of the model's forward FLOPs.
      skipped: ``{path: reason}``.
    """

    network: str
    package: str
    version: str | None
    front_end: str
    size: int
    kernels: int
    parameters: float
    flops: float
    skipped: Mapping[str, str]


def measure(foreign: ForeignModel, *, small: bool) -> Coverage:
    """The coverage of one network, found without a weight."""
    inputs = jax.eval_shape(lambda: foreign.inputs(small))
    if foreign.front_end == "Linen":
        model = foreign.build(small, nnx.Rngs(0))
        state = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), *inputs)
        forward = model.apply
    else:
        model = nnx.eval_shape(lambda: foreign.build(small, nnx.Rngs(0)))
        graphdef, state = nnx.split(model)

        def forward(state: Any, *x: Any) -> Any:
            return nnx.merge(graphdef, state)(*x)

    kernels = cf.find_kernels(model, *inputs)
    # A kernel's FLOPs are per example: the first axis is the batch, or the nodes of a graph.
    flops = sum(kernel.flops() for kernel in kernels.values()) * inputs[0].shape[0]
    return Coverage(
        network=foreign.name,
        package=foreign.package,
        version=foreign.version,
        front_end=foreign.front_end,
        size=kernels.num_params,
        kernels=len(kernels),
        parameters=sum(kernel.num_params() for kernel in kernels.values()) / kernels.num_params,
        flops=flops / cf.count_flops(forward, state, *inputs),
        skipped=kernels.skipped,
    )


def markdown(coverages: list[Coverage]) -> str:
    """The table."""
    head = (
        "package | network | front end | model's parameters | kernels | parameters | forward FLOPs | skipped"
    )
    lines = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for c in coverages:
        cells = (
            f"{c.package} {c.version}", c.network, c.front_end, f"{c.size:,}", f"{c.kernels}",
            f"{c.parameters:.1%}", f"{c.flops:.1%}", _reasons(c.skipped),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _reasons(skipped: Mapping[str, str]) -> str:
    """The reasons in brief, with the number of layers or parameters that each is given for."""
    brief = (re.sub(r"\(\d+ groups\)", "", why.split(":")[0]).strip() for why in skipped.values())
    return "; ".join(f"{count} x {why}" for why, count in Counter(brief).items())


def main() -> None:
    """Prints the table, and what it was made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the sizes that the tests have")
    parser.add_argument("--only", default="*", metavar="PACKAGE", help="a pattern of packages")
    parser.add_argument(
        "--json", metavar="FILE", help="write it there, too, with every layer that is skipped"
    )
    options = parser.parse_args()
    models = [model for model in MODELS if fnmatch.fnmatch(model.package, options.only)]
    coverages = []
    for model in models:
        if model.version:
            for layer_class, layer_type in model.layer_types().items():
                cf.register_layer(layer_class, layer_type)
            coverages.append(measure(model, small=options.small))
    print(markdown(coverages))
    print(f"\njax {jax.__version__}, flax {flax.__version__}")
    if missing := sorted({model.package for model in models if not model.version}):
        print(f"not installed: {', '.join(missing)}")
    if options.json:
        Path(options.json).write_text(json.dumps([dataclasses.asdict(c) for c in coverages], indent=1) + "\n")


if __name__ == "__main__":
    main()
