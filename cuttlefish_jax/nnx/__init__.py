"""The front end for Flax NNX."""

from cuttlefish_jax.nnx import calibration as _calibration  # noqa: F401 (registers calibrate)
from cuttlefish_jax.nnx import calls as _calls  # noqa: F401 (registers with profiling)
from cuttlefish_jax.nnx import find as _find  # noqa: F401 (with find_kernels)
from cuttlefish_jax.nnx import layers as _layers  # noqa: F401 (the layer types)
from cuttlefish_jax.nnx import params as _params  # noqa: F401 (with factorize_params, merge_params and spectra)
from cuttlefish_jax.nnx import switch as _switch  # noqa: F401 (with switch)
from cuttlefish_jax.nnx.factors import Factorized

__all__ = ["Factorized"]
