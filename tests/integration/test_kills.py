"""Real processes of train.py, killed (-9) at any point, end with the very numbers of an unbroken run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "model.width": 8,
    "model.stage_sizes": "(1,1)",
    "epochs": 6,
    "data.train_examples": 640,
    "schedule.warmup_epochs": 1.0,
    "switch.criterion": "at_epoch",
    "switch.epoch": 3,
    "plan.keep": "()",
    "optimizer.ema": 0.9,
}


def command(workdir, *more):
    settings = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    return [
        sys.executable,
        "train.py",
        "--config=configs/quickstart.py",
        *settings,
        f"--workdir={workdir}",
        *more,
    ]


@pytest.fixture
def environment(tmp_path):
    # Two devices; the programs are compiled once for all the processes of a test.
    return os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }


def finish(workdir, environment):
    done = subprocess.run(command(workdir), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kill_when(workdir, environment, is_time):
    with subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            if is_time(line):
                process.send_signal(signal.SIGKILL)
                break
        else:
            raise AssertionError("the run ended before it was to be killed")
    assert process.returncode == -signal.SIGKILL


def numbers(workdir):
    """Everything that a run wrote, but for times."""
    timed = {"seconds", "examples_per_second", "rank_seconds"}
    logs = {
        name: [
            {key: value for key, value in json.loads(line).items() if key not in timed}
            for line in (workdir / name).read_text().splitlines()
        ]
        for name in ("metrics.jsonl", "ranks.jsonl")
    }
    summary = json.loads((workdir / "summary.json").read_text())
    logs["summary"] = {key: value for key, value in summary.items() if "second" not in key}
    logs["plan"] = (workdir / "plan.json").read_text()
    return logs


def test_killed_before_during_and_after_the_switch(tmp_path, environment):
    finish(tmp_path / "unbroken", environment)

    broken = tmp_path / "broken"
    kill_when(broken, environment, lambda line: line.startswith("epoch 2/6"))
    kill_when(broken, environment, lambda line: line.startswith("Switching to low rank"))
    kill_when(broken, environment, lambda line: line.startswith("epoch 5/6"))
    said = finish(broken, environment)

    assert "going on after epoch" in said
    assert numbers(broken) == numbers(tmp_path / "unbroken")


def test_killed_at_an_arbitrary_moment_and_damaged(tmp_path, environment):
    """A kill between the lines, and the last checkpoint damaged: the one before it is gone on with."""
    finish(tmp_path / "unbroken", environment)
    broken = tmp_path / "broken"

    def soon_after_epoch_4(line):
        if line.startswith("epoch 4/6"):
            time.sleep(0.3)
            return True
        return False

    kill_when(broken, environment, soon_after_epoch_4)
    latest = max(
        (path for path in (broken / "checkpoints").iterdir() if path.name.isdigit()),
        key=lambda p: int(p.name),
    )
    data = max((path for path in latest.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    contents = bytearray(data.read_bytes())
    contents[len(contents) // 2] ^= 0xFF
    data.write_bytes(contents)

    done = subprocess.run(command(broken), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"passing over a damaged checkpoint, {broken / 'checkpoints'}/{latest.name}" in done.stderr
    assert numbers(broken) == numbers(tmp_path / "unbroken")


def test_the_command_line_refuses_in_one_line(tmp_path, environment):
    def refused(*more):
        done = subprocess.run(
            command(tmp_path, *more), cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return line

    assert 'Did you mean "width"' in refused("--config.model.widht=3")
    assert "digitz" in refused("--config.data.name=digitz")
    assert "batch_size 63 cannot be shared evenly by 2 devices" in refused("--config.batch_size=63")
    assert "unexpected arguments again" in refused("again")
    assert "No such file or directory: 'configs/quickstat.py'" in refused("--config=configs/quickstat.py")
