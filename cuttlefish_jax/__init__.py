"""Automatic low-rank training for JAX and Flax (Cuttlefish, Wang et al., MLSys 2023)."""

from cuttlefish_jax import linen as _linen  # noqa: F401 (registers the front end for Linen)
from cuttlefish_jax import nnx as _nnx  # noqa: F401 (the same for NNX)
from cuttlefish_jax.calibration import calibrate
from cuttlefish_jax.criteria import AtEpoch, Criterion, Never, ReferencePlateau, RelativePlateau
from cuttlefish_jax.decay import frobenius_decay
from cuttlefish_jax.factorize import factorize, factorize_batch_stats, factorize_params, merge_params
from cuttlefish_jax.flops import count_flops
from cuttlefish_jax.kernels import Kernel, KernelAxes, Kernels, find_kernels
from cuttlefish_jax.layer_types import LayerType, register_layer
from cuttlefish_jax.plan.budgets import Budget, BudgetUse, FLOPs, Parameters, Time
from cuttlefish_jax.plan.measured import Measured
from cuttlefish_jax.plan.plan import FactorizationPlan
from cuttlefish_jax.plan.planning import make_plan
from cuttlefish_jax.plan.rank_rules import (
    AccumulativeRank,
    EffectiveRank,
    EnergyRank,
    LargestOf,
    RankRatio,
    RankRule,
    ScaledStableRank,
    StableRank,
    gaussian_scale,
)
from cuttlefish_jax.plan.rules import Rule, tile_size
from cuttlefish_jax.precondition import precondition_factors
from cuttlefish_jax.profiling.kernel_profile import KernelProfile
from cuttlefish_jax.profiling.timing import profile_kernels
from cuttlefish_jax.spectra import (
    accumulative_ranks,
    initial_vectors,
    singular_values,
    stable_ranks,
    warm_stable_ranks,
)
from cuttlefish_jax.switch import carry_opt_state, switch
from cuttlefish_jax.tracker import RankTracker

__version__ = "0.1.0"

__all__ = [
    "AccumulativeRank",
    "AtEpoch",
    "Budget",
    "BudgetUse",
    "Criterion",
    "EffectiveRank",
    "EnergyRank",
    "FLOPs",
    "FactorizationPlan",
    "Kernel",
    "KernelAxes",
    "KernelProfile",
    "Kernels",
    "LargestOf",
    "LayerType",
    "Measured",
    "Never",
    "Parameters",
    "RankRatio",
    "RankRule",
    "RankTracker",
    "ReferencePlateau",
    "RelativePlateau",
    "Rule",
    "ScaledStableRank",
    "StableRank",
    "Time",
    "accumulative_ranks",
    "calibrate",
    "carry_opt_state",
    "count_flops",
    "factorize",
    "factorize_batch_stats",
    "factorize_params",
    "find_kernels",
    "frobenius_decay",
    "gaussian_scale",
    "initial_vectors",
    "make_plan",
    "merge_params",
    "precondition_factors",
    "profile_kernels",
    "register_layer",
    "singular_values",
    "stable_ranks",
    "switch",
    "tile_size",
    "warm_stable_ranks",
]
