"""Eight simulated CPU devices for every test; set before JAX starts its backend."""

import os
import tempfile
from importlib.metadata import version

flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ and version("jaxlib").startswith("0.10."):
    # As slow as the optimisations that this is to do without; later versions have no such flag.
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The compiled programs that train.py keeps: no test may find those of another day.
_cache = tempfile.TemporaryDirectory(prefix="cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name
