"""The runs of benchmarks/criteria.py: small networks, trained full-rank or with a switch at an epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import statistics
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from common import environment

import cuttlefish_jax as cf
from configs import bert_glue, deit_base, quickstart, resmlp_s36, vgg19
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.loop import run

IMAGES = {
    "epochs": 30,
    "batch_size": 32,
    "data.train_examples": 600,
    "data.image_size": 16,
    "data.channels": 1,
    "data.crop_padding": 2,
    "data.flip": False,
    "model.width": 12,
    "schedule.warmup_epochs": 2.0,
    "schedule.warmup_start": 0.0,
    "optimizer.weight_decay": 1e-3,
    "plan.rank_rule": "scaled_stable_rank",
    "plan.keep": (),
    "profile.enabled": False,
}
TOKENS = IMAGES | {"epochs": 40, "data.train_examples": 1000, "schedule.warmup_epochs": 4.0}
TOKENS |= {"model.patch": 2, "model.width": 64, "model.depth": 4, "model.dtype": "float32"}
TOKENS |= {"data.image_size": 8, "data.crop_padding": 1, "optimizer.weight_decay": 0.05}
# Without the regularisation and the average of the ImageNet recipe, which are for 300 epochs.
TOKENS |= {"data.mixup": 0.0, "data.cutmix": 0.0, "data.repeated_augmentation": 1, "optimizer.ema": 0.0}
TOKENS |= {"model.drop_path": 0.0, "loss.label_smoothing": 0.0}
TEXTS = {
    "epochs": 10,
    "data.train_examples": 256,
    "data.max_length": 32,
    "data.lengths": (32,),
    "model.unused": (),
    "schedule.peak": 1e-4,
    "optimizer.freeze": (),
    "plan.rank_rule": "scaled_stable_rank",
    "plan.keep": ("pooler",),
    "switch.learning_rate_factor": 1.0,
    "profile.enabled": False,
}


@dataclasses.dataclass(frozen=True)
class Network:
    """A small network that is trained in a minute or two.

    Attributes:
      make: its configuration at full size.
      settings: what makes that small.
      reference: the criterion of the paper's implementation.
    """

    make: Callable[[], Any]
    settings: Mapping[str, Any]
    reference: cf.Criterion


NETWORKS = {
    "resnet18": Network(
        quickstart.get_config, IMAGES | {"model.stage_sizes": ()}, cf.ReferencePlateau.cifar()
    ),
    "vgg19": Network(
        lambda: vgg19.get_config("digits"),
        IMAGES | {"schedule.name": "cosine", "schedule.peak": 0.05},
        cf.ReferencePlateau.cifar(),
    ),
    "deit_tiny": Network(
        lambda: deit_base.get_config("digits"),
        TOKENS | {"model.heads": 4, "schedule.peak": 5e-4, "optimizer.clip_norm": 1.0},
        cf.ReferencePlateau.deit(),
    ),
    "resmlp_s12": Network(
        lambda: resmlp_s36.get_config("digits"),
        TOKENS | {"schedule.peak": 1e-2},
        cf.ReferencePlateau.deit(),
    ),
    # No detector there: one epoch of full-rank training.
    "bert_base": Network(lambda: bert_glue.get_config("sst2"), TEXTS, cf.AtEpoch(1)),
}


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are: paths of the command line.

    Attributes:
      out: runs.
      trajectories: recorded stable ranks.
      weights: pre-trained weights for BERT.
      data_dir: prepared GLUE.
    """

    out: Path
    trajectories: Path
    weights: str
    data_dir: str

    def config(self, network: str, seed: int, switch_epoch: int | None) -> Any:
        """The configuration of a run that switches at an epoch, or never."""
        config = NETWORKS[network].make()
        settings = dict(NETWORKS[network].settings)
        if network == "bert_base":
            settings |= dict.fromkeys(("model.pretrained", "model.config_file"), self.weights)
            settings["data.data_dir"] = self.data_dir
        if switch_epoch is None:
            settings["method"] = "full_rank"
        else:
            settings |= {"switch.criterion": "at_epoch", "switch.epoch": switch_epoch}
            settings["evaluation.every_epochs"] = settings["epochs"]
        settings["checkpoint.every_epochs"] = settings["epochs"]
        config.update_from_flattened_dict(settings | {"model.name": network, "seed": seed})
        return config

    def workdir(self, network: str, seed: int, switch_epoch: int | None) -> Path:
        """Of that run."""
        return self.out / f"{network}-{seed}-{'full' if switch_epoch is None else switch_epoch}"

    def trajectory(self, network: str, seed: int) -> Path:
        """The file of a full-rank run's stable ranks."""
        return self.trajectories / f"{network}_seed{seed}.json"


def train(places: Places, network: str, seed: int, switch_epoch: int | None) -> dict[str, Any]:
    """Summary and last epoch's metrics of a run; leaves the trajectory of one that never switches."""
    workdir = places.workdir(network, seed, switch_epoch)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    config = places.config(network, seed, switch_epoch)
    jax.config.update("jax_compilation_cache_dir", str(places.out / "compiled"))
    with (
        open(f"{workdir}.log", "w") as log,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        summary = run(config, workdir)
    metrics = _read_lines(workdir / "metrics.jsonl")
    if switch_epoch is None:
        where = environment()
        record: dict[str, Any] = {
            "recorded": f"python benchmarks/criteria.py --record --networks {network}, seed {seed}",
            "on": f"{where['device']}, jax {where['jax']}, {where['date']}",
            "layers": "those that the configuration does not keep full-rank",
        }
        for key in ("train_loss", "test_loss", "test_accuracy", "seconds"):
            record[key] = _rounded([line[key] for line in metrics])
        measured = _read_lines(workdir / "ranks.jsonl")
        candidates = Experiment.from_config(config).candidates
        record["history"] = {path: _rounded([line[path] for line in measured]) for path in candidates}
        file = places.trajectory(network, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        # A line for every series.
        text = re.sub(r"\[[^]]*\]", lambda m: " ".join(m[0].split()), json.dumps(record, indent=1))
        file.write_text(text + "\n")
    # With the median epoch of each phase: other programs may have had the processor for a while.
    phases = [[m["seconds"] for m in metrics if m["phase"] == name] for name in ("full_rank", "low_rank")]
    seconds = sum(len(epochs) * statistics.median(epochs) for epochs in phases if epochs)
    return summary | metrics[-1] | {"seconds_of_epochs": seconds}


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _rounded(values: list[float]) -> list[float]:
    """To six significant digits."""
    return [float(f"{value:.6g}") for value in values]
