"""Automatic low-rank training for JAX and Flax (Cuttlefish, Wang et al., MLSys 2023)."""

from cuttlefish_jax import linen as _linen  # registers the front end for Linen
from cuttlefish_jax.decay import frobenius_decay
from cuttlefish_jax.factorize import factorize, factorize_batch_stats, factorize_params, merge_params
from cuttlefish_jax.flops import count_flops
from cuttlefish_jax.kernels import Kernel, Kernels, find_kernels
from cuttlefish_jax.plan import FactorizationPlan, Rule, gaussian_scale, make_plan
from cuttlefish_jax.switch import carry_opt_state, switch

__version__ = "0.1.0"
