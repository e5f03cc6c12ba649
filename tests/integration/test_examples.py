"""The example loops, as people run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from glue_tools import write_bert
from safetensors.numpy import save_file

from cuttlefish_jax.models import create_model
from cuttlefish_jax.models.pretrained.transformers import locate_bert

ROOT = Path(__file__).parents[2]


def run_example(name, *options):
    """What the script prints, and the parameters before and after the switch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, f"examples/{name}.py", *map(str, options)]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "switch after epoch" in run.stdout
    full, low = re.search(r"parameters of the model: ([\d,]+) -> ([\d,]+)", run.stdout).groups()
    assert f"{low} parameters" in run.stdout.splitlines()[-1]
    return run.stdout, int(full.replace(",", "")), int(low.replace(",", ""))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width"),
    [("nnx_loop", 256), ("linen_loop", 32), pytest.param("scan_model", 128, marks=pytest.mark.large)],
)
def test_a_loop_switches_and_learns(name, width):
    output, full, low = run_example(name, "--epochs", 16, "--width", width)
    assert low < full
    assert float(re.search(r"final loss ([\d.]+)", output)[1]) < 0.5
    assert float(re.search(r"test accuracy ([\d.]+)%", output)[1]) > 80
    if name == "scan_model":  # all four copies at the rank of the plan
        rank = int(re.search(r"blocks/up +4x128x256 +(\d+)", output)[1])
        assert f"blocks/up/u/kernel (4, 128, {rank})\n" in output
        assert f"blocks/up/v/kernel (4, {rank}, 256)\n" in output


@pytest.mark.slow
def test_bert_is_fine_tuned_within_its_budget(tmp_path):
    model = create_model("bert_base", num_classes=2, config_file=write_bert(tmp_path, hidden_size=32))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16), int))["params"]
    tensors = {
        locate_bert(path).names[0]: jax.device_get(param.T if path.endswith("/kernel") else param)
        for path, param in traverse_util.flatten_dict(params, sep="/").items()
    }
    save_file({name: tensor.copy() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    output, full, low = run_example("bert_finetune", tmp_path, "--epochs", 2, "--full-rank-epochs", 1)
    assert "switch after epoch 1" in output
    assert low <= 0.8 * full


@pytest.mark.parametrize("name", ["bert_finetune", "linen_loop", "nnx_loop", "scan_model"])
def test_what_is_added_is_few_lines(name):
    lines = (ROOT / f"examples/{name}.py").read_text().splitlines()
    marked = [line for line in lines if line.endswith("# (cf)")]
    assert len(marked) == (7 if name == "bert_finetune" else 6)  # with the import
    # All lines that use the package, and no others but those that they guard or feed.
    assert [line for line in lines if re.search(r"\bcf\.", line) and line not in marked] == []
