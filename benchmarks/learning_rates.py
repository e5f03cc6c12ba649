"""The learning rate after the switch: published ways, the plain one, and the kernel's own step.

    python benchmarks/learning_rates.py [--seeds 3] [--networks resnet18 deit_tiny resmlp_s12] [--json FILE]
    python benchmarks/learning_rates.py --networks bert_base bert_base_recipe --weights FOLDER [--data_dir D]
    python benchmarks/learning_rates.py --networks deit_tiny resmlp_s12 --control [BERT as above]

Each way continues the same training (same seed, same switch, same ranks). ``projected`` is the default: the
schedule goes on, and the factors are preconditioned. The others have plain factors: ``continue`` lets the
schedule go on; ``rewarmup`` is that of CIFAR in the original, ``restart`` that of ResNet-50, ``x 1/3`` that
of DeiT and ``x 2`` that of BERT. The networks are small ones on scikit-learn's digits, with few examples and
ranks at a quarter, so that there is something to lose: what counts is the test loss. BERT is fine-tuned on
sentences of SST-2, from weights and a tokenizer in --weights, which no package of the project has; as
``bert_base`` all its layers have ranks at a quarter, as ``bert_base_recipe`` it is what the configuration
makes of it. With --control one layer alone is factorized, at three quarters of its rank (0.45 of BERT's
recipe): what the ways do to training that is as good as full-rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

from common import report

from configs import bert_glue, deit_base, quickstart, resmlp_s36
from cuttlefish_jax.training.loop import run

PLAIN = {"optimizer.precondition": False}
WAYS: dict[str, dict[str, Any]] = {
    "projected": {},
    "projected x 2": {"switch.learning_rate_factor": 2.0},
    "continue": PLAIN,
    "rewarmup": PLAIN | {"switch.learning_rate": "rewarmup"},
    "restart": PLAIN | {"switch.learning_rate": "restart"},
    "x 1/3": PLAIN | {"switch.learning_rate_factor": 1 / 3},
    "x 2": PLAIN | {"switch.learning_rate_factor": 2.0},
}
DIGITS = {
    "epochs": 24,
    "batch_size": 32,
    "data.train_examples": 800,
    "data.image_size": 8,
    "data.channels": 1,
    "data.crop_padding": 1,
    "schedule.warmup_epochs": 2.0,
    "evaluation.every_epochs": 24,
    "switch.criterion": "at_epoch",
    "switch.epoch": 10,
    "plan.rank_rule": "rank_ratio",
    "profile.enabled": False,
}
TOKENS = DIGITS | {"model.patch": 2, "model.width": 64, "model.depth": 4, "model.dtype": "float32"}
# Without the regularisation and the average of the ImageNet recipe, which are for 300 epochs.
TOKENS |= {"data.mixup": 0.0, "data.cutmix": 0.0, "data.repeated_augmentation": 1, "optimizer.ema": 0.0}
TOKENS |= {"model.drop_path": 0.0, "loss.label_smoothing": 0.0, "data.train_examples": 1365}
TOKENS |= {"epochs": 40, "switch.epoch": 16, "evaluation.every_epochs": 40, "schedule.warmup_epochs": 4.0}
TEXTS = {
    "data.train_examples": 600,
    "data.max_length": 32,
    "data.lengths": (32,),
    "model.unused": (),
    "schedule.peak": 1e-4,
    "optimizer.freeze": (),
    "evaluation.every_epochs": 3,
    "plan.rank_ratio": 0.25,
    "plan.keep": ("pooler",),
    "profile.enabled": False,
}
# As in the configuration: the feed-forward kernels are frozen, and attention's have 0.45 of their rank.
RECIPE = {
    key: value
    for key, value in TEXTS.items()
    if key not in ("optimizer.freeze", "plan.rank_ratio", "plan.keep")
}


def one_layer(*kept: str, ratio: float = 0.75) -> dict[str, Any]:
    """The settings that keep all others full-rank."""
    return {"plan.keep": kept, "plan.rank_ratio": ratio}


CONTROL = {
    "deit_tiny": one_layer("block[2-4]/*", "block1/attention/*", "block1/mlp/fc2"),
    "resmlp_s12": one_layer("block[2-4]/*", "block1/token_mixing", "block1/mlp/fc2"),
    "bert_base": one_layer("layer[2-6]/*", "layer1/attention/*", "layer1/ffn/output", "pooler"),
    # A square kernel, which would not get smaller at three quarters.
    "bert_base_recipe": one_layer("layer[2-6]/*", "layer1/attention/[kvo]*", "*/ffn/*", "pooler", ratio=0.45),
}
# The peaks are the best ones of full-rank training, among 3, 1, 0.3 ... times the recipe's.
NETWORKS = {
    "resnet18": (lambda: quickstart.get_config(), DIGITS | {"model.width": 32, "plan.keep": ()}),
    "deit_tiny": (
        lambda: deit_base.get_config("digits"),
        TOKENS | {"model.heads": 4, "schedule.peak": 5e-4, "optimizer.clip_norm": 1.0},
    ),
    "resmlp_s12": (lambda: resmlp_s36.get_config("digits"), TOKENS | {"schedule.peak": 1e-2}),
    "bert_base": (lambda: bert_glue.get_config("sst2"), TEXTS),
    "bert_base_recipe": (lambda: bert_glue.get_config("sst2"), RECIPE | {"model.name": "bert_base"}),
}
TEXT_NETWORKS = ("bert_base", "bert_base_recipe")


def train(network: str, way: str, seed: int, places: dict[str, str], control: bool) -> dict[str, Any]:
    """The summary and the last line of the metrics of one run; ``places`` are settings that name files."""
    make, settings = NETWORKS[network]
    config = make()
    if network in TEXT_NETWORKS:
        settings = settings | places
    if control:
        settings = settings | CONTROL[network]
    config.update_from_flattened_dict({"model.name": network} | settings | WAYS[way] | {"seed": seed})
    with tempfile.TemporaryDirectory() as workdir, warnings.catch_warnings():
        summary = run(config, Path(workdir) / "run")
        lines = (Path(workdir) / "run" / "metrics.jsonl").read_text().splitlines()
    return summary | json.loads(lines[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS)[:3], choices=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--control", action="store_true", help="with one layer factorized: see above")
    parser.add_argument("--weights", help="a folder with pre-trained weights of the BERT family")
    parser.add_argument("--data_dir", default="", help="where the prepared GLUE is")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", help="write the table to this file too")
    arguments = parser.parse_args()
    if not arguments.weights and set(TEXT_NETWORKS) & set(arguments.networks):
        parser.error(f"{' and '.join(TEXT_NETWORKS)} need --weights FOLDER")
    weights = dict.fromkeys(("model.pretrained", "model.config_file"), arguments.weights)
    places = weights | {"data.data_dir": arguments.data_dir}
    if arguments.control and not set(arguments.networks) <= set(CONTROL):
        parser.error(f"--control is of {', '.join(CONTROL)} alone")
    rows = []
    for network in arguments.networks:
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in arguments.ways}
        for seed in range(arguments.seeds):
            for way, found in runs.items():
                found.append(train(network, way, seed, places, arguments.control))
        for way, found in runs.items():
            losses = [summary["test_loss"] for summary in found]
            rows.append(
                {
                    "network": network,
                    "way": way,
                    "test loss": statistics.mean(losses),
                    "least-most": f"{min(losses):.4f}-{max(losses):.4f}",
                    "test accuracy %": 100 * statistics.mean(s["test_accuracy"] for s in found),
                    "params x fewer": found[0]["params_full"] / found[0]["params_final"],
                }
            )
    report(rows, arguments.json)
