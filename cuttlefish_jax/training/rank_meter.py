"""Measures the stable ranks of a training state without making the devices wait for the host."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import cuttlefish_jax as cf
from cuttlefish_jax.errors import DivergedError
from cuttlefish_jax.training.parallelism import device_mesh
from cuttlefish_jax.training.state import TrainState


class RankMeter:
    """Starts measurements and reads them.

    A measurement is started behind the last step of an epoch, while that is still under way. Its vectors are
    a part of the state, so that a run which was interrupted goes on with the very numbers.

    Args:
      kernels: what is measured.
      method: ``"warm"``, from the vectors of the last measurement; ``"lanczos"``, ``"exact"``: from nothing.
    """

    def __init__(self, kernels: Mapping[str, cf.Kernel], method: str):
        self._kernels = kernels
        self._method: Any = method
        self._started: dict[str, Any] = {}
        self._vectors: Any = None
        # Whole on every device, however the parameters are split.
        everywhere = NamedSharding(device_mesh(), PartitionSpec())
        jit = functools.partial(jax.jit, out_shardings=everywhere)
        self._warm = jit(lambda params, vectors: cf.warm_stable_ranks(params, kernels, vectors))
        self._ranks = jit(lambda params: cf.stable_ranks(params, kernels, method=self._method))
        self._singular_values = jit(
            lambda params, calibration: cf.singular_values(params, kernels, calibration=calibration)
        )

    @property
    def initial_vectors(self) -> dict[str, Any]:
        """``TrainState.rank_vectors`` before the first measurement."""
        return dict(cf.initial_vectors(self._kernels)) if self._method == "warm" else {}

    def start(self, state: TrainState) -> None:
        """Starts a measurement, without waiting for it."""
        if self._method != "warm":
            self._started = self._ranks(state.params)
        else:
            self._started, self._vectors = self._warm(state.params, state.rank_vectors)

    def advance(self, state: TrainState) -> TrainState:
        """The state that was measured, with the vectors that the next measurement starts from."""
        return state if self._method != "warm" else state.replace(rank_vectors=self._vectors)

    def wait(self) -> float:
        """Seconds until the measurement that was started is done.

        Called as soon as all work that was started before is known to be done, as after an epoch, it is what
        the measurement itself takes on the devices.
        """
        start = time.perf_counter()
        jax.block_until_ready(self._started)
        return time.perf_counter() - start

    def read(self) -> dict[str, Any]:
        """``{path: stable rank}``, plain numbers, or lists of them for stacked layers.

        Raises:
          DivergedError: if one is not a finite number.
        """
        ranks = jax.device_get(self._started)
        for path in self._kernels:
            if not np.all(np.isfinite(ranks[path])):
                raise DivergedError(
                    f"the stable rank of {path!r} is {ranks[path].tolist()}: its kernel has a NaN, an "
                    "infinity, or entries too large to be squared; the last checkpoint, if any, is whole"
                )
        return {path: ranks[path].tolist() for path in self._kernels}

    def singular_values(
        self, state: TrainState, calibration: Mapping[str, jax.Array] | None = None
    ) -> dict[str, Any]:
        """All singular values of every kernel, on the host, whitened if there is a calibration."""
        return jax.device_get(self._singular_values(state.params, calibration))
