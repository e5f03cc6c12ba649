"""Eight simulated CPU devices for every test; set before JAX starts its backend."""

import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version

import pytest

flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ and version("jaxlib").startswith("0.10."):
    # As slow as the optimisations that this is to do without; later versions have no such flag.
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The compiled programs that train.py keeps: no test may find those of another day.
_cache = tempfile.TemporaryDirectory(prefix="cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name


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
