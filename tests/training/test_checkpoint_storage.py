"""Disks that are full or read-only, processes that are killed, several hosts."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import pytest
from checkpoint_tools import assert_same_bits, make_state, names, own_messages, restore, save_all
from host_tools import run_on_two_hosts

from cuttlefish_jax.errors import StorageError, UserError
from cuttlefish_jax.training.checkpoint import Checkpointer

SMALL_DISK = "4m"  # the size of the fixture of that name


def test_a_directory_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with Checkpointer(tmp_path / "file" / "checkpoints") as checkpointer:
        with pytest.raises(
            StorageError, match=r"cannot save a checkpoint in .*file/checkpoints: .*--workdir"
        ):
            checkpointer.save(1, make_state(1), {})
        with pytest.raises(StorageError, match="cannot read"):
            checkpointer.restore()


@pytest.mark.parametrize("is_foreseen", [True, False])
@pytest.mark.parametrize("free", [0, 100_000, 900_000])
def test_a_full_disk_is_the_users_to_mend_and_leaves_earlier_checkpoints(
    small_disk, free, is_foreseen, monkeypatch, capfd
):
    """However early or late in the save the disk runs full."""
    if not is_foreseen:  # as if others had filled it in the meantime
        monkeypatch.setattr("cuttlefish_jax.training.checkpoint.check_space", lambda *_, **__: None)
    state = {"noise": jax.random.normal(jax.random.key(0), (250_000,))}
    directory = small_disk / "checkpoints"
    checkpointer = Checkpointer(directory)
    checkpointer.save(1, state, {"epoch": 1})
    checkpointer.wait()
    ballast = small_disk / "ballast"
    space = os.statvfs(small_disk)
    ballast.write_bytes(bytes(space.f_bavail * space.f_bsize - free))
    with pytest.raises(
        StorageError,
        match=rf"cannot save a checkpoint in {directory}: no space left .*"
        + (r"\(it needs 1.0 MiB, and 0.\d are free\).*--workdir" if is_foreseen else r"free\).*--workdir"),
    ):
        checkpointer.save(2, state, {"epoch": 2})
        checkpointer.wait()
    checkpointer.close()
    assert not is_foreseen or "Traceback" not in capfd.readouterr().err
    restored = restore(directory)
    assert restored.step == 1
    assert_same_bits(restored.into(state), state)
    # With space again, the same save works and nothing of the failed one is left.
    ballast.unlink()
    with Checkpointer(directory) as again:
        again.save(2, state, {"epoch": 2})
    assert names(directory) == ["1", "2"]
    assert restore(directory).step == 2


def test_a_read_only_disk_is_the_users_to_mend(small_disk):
    save_all(small_disk / "checkpoints", [1])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with Checkpointer(small_disk / "checkpoints") as checkpointer:
        assert checkpointer.restore().step == 1
        with pytest.raises(UserError, match="permission denied"):
            checkpointer.save(2, make_state(2), {})
            checkpointer.wait()


_SAVE_FOR_EVER = """
    import sys, itertools, jax
    from cuttlefish_jax.training.checkpoint import Checkpointer
    state = {"noise": jax.random.normal(jax.random.key(0), (3_000_000,))}
    with Checkpointer(sys.argv[1]) as checkpointer:
        first = checkpointer.restore()
        for step in itertools.count(first.step + 1 if first else 0):
            checkpointer.save(step, state, {"epoch": step})
            print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_whole_checkpoints(tmp_path, caplog):
    expected = {"noise": jax.random.normal(jax.random.key(0), (3_000_000,))}
    last = -1
    for delay in (0.0, 0.03, 0.1):
        command = [sys.executable, "-c", textwrap.dedent(_SAVE_FOR_EVER), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(3):
                announced = int(process.stdout.readline())
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        restored = restore(tmp_path)
        # Every save but the one in progress was whole when the next was announced.
        assert restored.step >= announced - 1 > last
        assert_same_bits(restored.into(expected), expected)
        last = restored.step
    assert not own_messages(caplog)


_TWO_HOSTS = """
    import json, sys, jax, numpy as np
    from cuttlefish_jax.training.checkpoint import Checkpointer
    mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = np.arange(1000, dtype=np.float32)
    make = jax.jit(lambda: {"kernel": jax.numpy.arange(1000.0)}, out_shardings=replicated)
    with Checkpointer(sys.argv[1], keep=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make(), {"epoch": step})
        checkpointer.wait()
        jax.experimental.multihost_utils.sync_global_devices("damage")
        if jax.process_index() == 0:
            open(f"{sys.argv[1]}/3/record/metadata", "w").close()
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        restored = checkpointer.restore()
        kernel = restored.into(jax.eval_shape(make))["kernel"]
        checkpointer.save(3, make(), {"epoch": 3})
        checkpointer.wait()
        again = checkpointer.restore()
        print(json.dumps([restored.step, bool((kernel == values).all()), again.step]))
"""


@pytest.mark.slow
def test_two_hosts_save_one_checkpoint_and_agree_on_what_is_whole(tmp_path):
    for output in run_on_two_hosts(_TWO_HOSTS, tmp_path):
        assert json.loads(output.splitlines()[-1]) == [2, True, 3]
    assert names(tmp_path) == ["1", "2", "3"]
