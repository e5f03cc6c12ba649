"""The example loops, as people run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("nnx_loop", 256), ("linen_loop", 32)])
def test_a_loop_switches_and_learns(name, width):
    command = [sys.executable, f"examples/{name}.py", "--epochs", "16", "--width", str(width)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "switch after epoch" in run.stdout
    full, low = re.search(r"parameters of the model: ([\d,]+) -> ([\d,]+)", run.stdout).groups()
    assert int(low.replace(",", "")) < int(full.replace(",", ""))
    assert f"{low} parameters" in run.stdout
    assert float(re.search(r"final loss ([\d.]+)", run.stdout)[1]) < 0.5
    assert float(re.search(r"test accuracy ([\d.]+)%", run.stdout)[1]) > 80


@pytest.mark.parametrize("name", ["nnx_loop", "linen_loop"])
def test_few_lines_are_added(name):
    lines = (ROOT / f"examples/{name}.py").read_text().splitlines()
    marked = [line for line in lines if line.endswith("# (cf)")]
    assert len(marked) == 6  # with the import
    assert all("cf" in line.split("# (cf)")[0] for line in marked)
