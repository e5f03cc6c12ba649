"""The front end for Flax Linen: finds a model's kernels, and puts factors in their place."""

from cuttlefish_jax.linen import calibration as _calibration  # noqa: F401 (registers calibrate)
from cuttlefish_jax.linen import calls as _calls  # noqa: F401 (registers with profiling)
from cuttlefish_jax.linen import finding as _finding  # noqa: F401 (with find_kernels)
from cuttlefish_jax.linen import layers as _layers  # noqa: F401 (the layer types)
from cuttlefish_jax.linen.factorized import Factorized

__all__ = ["Factorized"]
