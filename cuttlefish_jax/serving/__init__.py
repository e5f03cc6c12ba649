"""Ways out: a model as a compiled program of its own, and parameters as safetensors with their plan.

    from cuttlefish_jax import serving

The programs run wherever JAX is, the files are read wherever safetensors is; neither needs this package.
"""

from cuttlefish_jax.serving.program import export
from cuttlefish_jax.serving.safetensors import load_safetensors, save_safetensors

__all__ = ["export", "load_safetensors", "save_safetensors"]
