"""What the layers of a network are given, measured on training batches before the switch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import cuttlefish_jax as cf
from cuttlefish_jax.kernels import kernel_array
from cuttlefish_jax.linen.calibration import kernel_gradients, observe, watch_calls
from cuttlefish_jax.training.data import TrainInput, materialize
from cuttlefish_jax.training.parallelism import DataParallel, Layout
from cuttlefish_jax.training.state import TrainState
from cuttlefish_jax.training.step import Compiled, abstract
from cuttlefish_jax.training.tasks import Task


class Calibrator:
    """Measures what the layers of the full-rank network are given; see :func:`cuttlefish_jax.calibrate`.

    Args:
      task: what is learnt.
      model: the network.
      kernels: its kernels.
      layout: of the states on the devices; by default every device has all of them.

    Attributes:
      step: the compiled measurement of one batch.
    """

    def __init__(
        self, task: Task, model: nn.Module, kernels: Mapping[str, cf.Kernel], layout: Layout | None = None
    ):
        layout = layout or DataParallel()
        self._kernels = kernels
        self._calls = watch_calls(model, kernels, *task.inputs, train=False)

        def step(state: TrainState, resident: Any, batch: Any) -> Any:
            step_key = jax.random.fold_in(state.key, state.step)
            shared = state.batch_stats, step_key, resident
            mapped = layout.on_each_device(on_device, gives_gradients=True)
            return mapped(state.params, shared, batch)[0]

        def on_device(params: Any, shared: Any, batch: Any) -> tuple[Any, tuple[()]]:
            batch_stats, step_key, resident = shared
            augment_key, _ = jax.random.split(step_key)
            inputs, _ = task.train_inputs(augment_key, materialize(resident, batch))

            def nothing(params: Any) -> jax.Array:
                variables = {"params": params, "batch_stats": batch_stats}
                return observe(model, kernels, self._calls, variables, *inputs, train=False)

            return layout.mean(jax.grad(layout.whole(nothing))(params)), ()

        self.step = Compiled(layout.program(step, gives_gradients=True), num_shapes=task.num_lengths)
        # One sum at a time: a tree of every batch would be as many times the parameters.
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
        self._mean: Any = None
        self._lock = threading.Lock()

    def measure(
        self, state: TrainState, data: TrainInput, *, epoch: int, batches: int
    ) -> dict[str, jax.Array]:
        """The mean over training batches.

        Args:
          state: of the full-rank phase; not donated.
          data: the training input.
          epoch: whose first batches are taken, those that training is going to see.
          batches: how many, at least 1; at most those of an epoch are taken.

        Returns:
          ``{path: f32}``, of the kernels' shapes, and lying as they do.
        """
        total, number = None, 0
        for batch in itertools.islice(data.epoch(epoch), batches):
            with self._lock:  # waits for what another thread compiles
                found = self.step(state, data.resident, batch)
            total, number = found if total is None else self._add(total, found), number + 1
        if self._mean is None:
            shardings = {path: leaf.sharding for path, leaf in self.abstract(abstract(state)).items()}
            self._mean = jax.jit(self._mean_of_kernels, out_shardings=shardings)
        return self._mean(total, number)

    def _mean_of_kernels(self, total: Any, number: Any) -> dict[str, jax.Array]:
        of_kernels = kernel_gradients(total, self._kernels, self._calls)
        return {path: of_kernel / number for path, of_kernel in of_kernels.items()}

    def compile_for(self, state: TrainState, inputs: Sequence[tuple[Any, ...]]) -> None:
        """Compiles for a state and data, all abstract, that it is not compiled for; in any thread."""
        for data in inputs:
            with self._lock:
                if data not in self.step.inputs:
                    self.step.compile_for(state, *data)

    def abstract(self, state: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and shardings of what :meth:`measure` returns, for an abstract state."""
        params = {path: kernel_array(state.params, kernel) for path, kernel in self._kernels.items()}
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
            for path, leaf in params.items()
        }
