"""What the tests of several files in here need."""

import shutil
import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path, request):
    """A real file system of the size that the test's module states as ``SMALL_DISK``."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"size={request.module.SMALL_DISK}"
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
