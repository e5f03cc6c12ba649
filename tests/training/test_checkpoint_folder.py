"""Which checkpoints are kept: whatever happens when, there is a whole one as new as can be."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from checkpoint_tools import assert_same_bits, damage, make_state, names, restore, save_all

from cuttlefish_jax.errors import StorageError
from cuttlefish_jax.training.checkpoint import Checkpointer


@pytest.fixture
def set_aside(tmp_path):
    """A checkpoint that was set aside, and a newer one of the same step, which is damaged."""
    save_all(tmp_path, [1])
    (tmp_path / "1").rename(tmp_path / "1.replaced")
    with Checkpointer(tmp_path / "newer") as checkpointer:
        checkpointer.save(1, make_state(5), {"epoch": 5})
    (tmp_path / "newer" / "1").rename(tmp_path / "1")
    (tmp_path / "newer").rmdir()
    damage(tmp_path / "1")
    return tmp_path


@pytest.mark.parametrize("is_read", [True, False])
def test_a_whole_one_never_gives_way_to_a_damaged_one_of_its_step(set_aside, is_read, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpointer = Checkpointer(set_aside)
    if is_read:
        assert checkpointer.restore().directory.name == "1.replaced"
    monkeypatch.setattr(checkpointer._orbax, "save", fails)
    with pytest.raises(StorageError):
        checkpointer.save(1, make_state(7), {"epoch": 7})
    restored = restore(set_aside)
    assert (restored.directory.name, restored.record) == ("1.replaced", {"epoch": 1})
    save_all(set_aside, [1])
    assert names(set_aside) == ["1"]


def test_a_damaged_one_takes_no_place_of_those_that_are_kept(tmp_path):
    save_all(tmp_path, [1, 2, 3], keep=3)
    damage(tmp_path / "3")
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.restore().step == 2
        checkpointer.save(4, make_state(4), {})
    assert names(tmp_path) == ["2", "4"]


def test_an_earlier_step_of_which_two_are_there_keeps_both_until_one_is_read(set_aside):
    save_all(set_aside, [2])
    assert names(set_aside) == ["1", "1.replaced", "2"]
    damage(set_aside / "2")
    assert restore(set_aside).directory.name == "1.replaced"


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE])
def test_an_error_of_the_disk_is_no_damage(tmp_path, monkeypatch, number):
    """To pass over an intact checkpoint would be to delete it later."""
    save_all(tmp_path, [1, 2])

    def fails(*args, **kwargs):
        raise ValueError("cannot read") from OSError(number, os.strerror(number))

    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(checkpointer._orbax, "restore", fails)
        with pytest.raises(StorageError, match=os.strerror(number)):
            checkpointer.restore()
        monkeypatch.undo()
        assert checkpointer.restore().step == 2
    assert names(tmp_path) == ["1", "2"]


def test_a_file_that_is_called_like_a_checkpoint(tmp_path):
    for _ in range(3):
        (tmp_path / "7").write_text("")
        save_all(tmp_path, [7])
        assert names(tmp_path) == ["7"]
        shutil.rmtree(tmp_path / "7")


def test_what_a_checkpoint_makes_superfluous_goes_if_it_is_whole(tmp_path):
    save_all(tmp_path, [1, 2, 3], keep=3)
    damage(tmp_path / "3")
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert not checkpointer.settle(3) and not checkpointer.settle(4)
        assert names(tmp_path) == ["1", "2", "3"]
        assert checkpointer.settle(2)
    assert names(tmp_path) == ["2"]


_SAVE_AND_CUT_THE_POWER = """
    import fcntl, os, struct, sys
    from checkpoint_tools import make_state
    from cuttlefish_jax.training.checkpoint import Checkpointer
    with Checkpointer(sys.argv[1] + "/checkpoints", keep=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), {"epoch": step})
            checkpointer.wait()
        disk = os.open(sys.argv[1], os.O_RDONLY)
        fcntl.ioctl(disk, 0x8004587D, struct.pack("I", 2))  # of ext4: stop, and write nothing any more
        os._exit(0)
"""


@pytest.mark.slow
def test_what_is_saved_survives_a_power_cut(tmp_path):
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    image.write_bytes(b"")
    os.truncate(image, 64 * 2**20)
    mount = ["mount", "-o", "loop", str(image), str(disk)]
    for command in (["mkfs.ext4", "-q", str(image)], mount):
        if not shutil.which(command[0]) or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system of its own")
    try:
        program = [sys.executable, "-c", textwrap.dedent(_SAVE_AND_CUT_THE_POWER), str(disk)]
        paths = {
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        }
        subprocess.run(program, check=True, env=os.environ | paths)
        subprocess.run(["umount", str(disk)], check=True)
        subprocess.run(mount, check=True)
        restored = restore(disk / "checkpoints")
        assert restored.step == 3
        assert_same_bits(restored.into(make_state(3)), make_state(3))
    finally:
        subprocess.run(["umount", "-l", str(disk)], capture_output=True)
