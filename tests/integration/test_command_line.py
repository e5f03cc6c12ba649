"""Real processes, one after the other: train, inspect, merge, factorize, export, and serve elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cuttlefish_jax as cf
from cuttlefish_jax import serving
from cuttlefish_jax.models import create_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model.width": 8,
    "model.stage_sizes": "(1,1)",
    "epochs": 2,
    "data.train_examples": 320,
    "schedule.warmup_epochs": 0.0,
    "switch.criterion": "at_epoch",
    "switch.epoch": 1,
    "plan.rank_rule": "rank_ratio",
    "plan.keep": "()",
}
SERVER = """
import sys
import jax, numpy as np
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[3], program.call(np.load(sys.argv[2])))
assert not {"cuttlefish_jax", "flax", "orbax"} & set(sys.modules)
"""


def test_from_training_to_serving(tmp_path):
    quick = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | quick

    def python(*arguments, status=0):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    def cuttlefish(*arguments, status=0):
        return python("-W", "error", "-m", "cuttlefish_jax", *arguments, status=status)

    workdir, merged, low = (tmp_path / name for name in ("run", "merged.safetensors", "low.safetensors"))
    settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    python("train.py", "--config=configs/quickstart.py", f"--workdir={workdir}", *settings)

    plan = json.loads((workdir / "plan.json").read_text())
    change = f"{plan['num_params_full']:,} -> {plan['num_params']:,}"
    assert change in cuttlefish("inspect", workdir, "--picture", tmp_path / "spectra.png")
    assert (tmp_path / "spectra.png").exists()
    cuttlefish("merge", workdir, "--out", merged)
    assert "exists" in cuttlefish("merge", workdir, "--out", merged, status=2)
    cuttlefish("factorize", merged, "--out", low, "--config", workdir / "config.json", "--rule", "energy")
    cuttlefish("export", low, "--out", tmp_path / "low", "--config", workdir / "config.json")
    cuttlefish("export", workdir, "--out", tmp_path / "run.stablehlo")

    images = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    model = create_model("resnet18", num_classes=10, width=8, stage_sizes=(1, 1))
    variables, energy_plan = serving.load_safetensors(low)
    expected = cf.factorize(model, energy_plan).apply(variables, images, train=False)
    whole = model.apply(serving.load_safetensors(merged)[0], images, train=False)
    for program, outputs in (("low", expected), ("run.stablehlo", whole)):
        arguments = (tmp_path / program, tmp_path / "images.npy", tmp_path / "outputs.npy")
        python("-I", "-c", SERVER, *arguments)
        np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), outputs, rtol=1e-3, atol=1e-4)
