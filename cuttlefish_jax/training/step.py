"""The compiled steps: one update, one batch of evaluation, each mapped over all devices.

There is one train step, for full-rank and factorized networks, for every task, and however the state lies on
the devices: what differs is in the state, in the task and in the layout.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cuttlefish_jax.training.data import materialize
from cuttlefish_jax.training.nonfinite import checked_step
from cuttlefish_jax.training.parallelism import AXIS, DataParallel, Layout
from cuttlefish_jax.training.state import TrainState
from cuttlefish_jax.training.tasks import Task


def make_train_step(
    task: Task,
    layout: Layout | None = None,
    *,
    ema: float,
    accumulation_steps: int = 1,
    skip_nonfinite: bool = False,
) -> Compiled:
    """One update: ``(state, resident, batch) -> (state, metrics)``.

    Gradients, batch statistics and metrics are averaged over all devices of all hosts. The state is donated.

    Args:
      task: what is learnt.
      layout: of the state on the devices; by default every device has all of it.
      ema: decay of the moving average of the parameters; 0 keeps none.
      accumulation_steps: parts of a device's batch that are computed one after the other, in less memory;
        batch norm normalises each part by itself.
      skip_nonfinite: whether a step whose numbers go bad leaves the state as it was.

    Returns:
      A step over a state of the layout; ``metrics`` are the batch's means, f32 scalars: ``loss``, and
      ``accuracy`` where the targets are classes; and ``nonfinite``, 1 if the step went bad
      (:func:`~cuttlefish_jax.training.nonfinite.checked_step`).
    """
    layout = layout or DataParallel()

    def train_step(state: TrainState, resident: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        on_device = functools.partial(_gradients, task, layout, state.apply_fn, accumulation_steps)
        mapped = layout.on_each_device(on_device, gives_gradients=True)
        step_key = jax.random.fold_in(state.key, state.step)
        grads, (batch_stats, metrics) = mapped(state.params, (state.batch_stats, step_key, resident), batch)
        new = state.apply_gradients(grads=grads, batch_stats=batch_stats)
        if ema:
            new = new.replace(ema_params=optax.incremental_update(new.params, new.ema_params, 1 - ema))
        new, nonfinite = checked_step(state, new, metrics["loss"], skip=skip_nonfinite)
        return new, metrics | {"nonfinite": nonfinite}

    return Compiled(layout.program(train_step, updates=True), num_shapes=task.num_lengths)


def _gradients(
    task: Task, layout: Layout, apply_fn: Callable, num_parts: int, params: Any, shared: Any, batch: Any
) -> tuple[Any, Any]:
    """What one device has to do with its part of a batch; the means of all devices."""
    batch_stats, step_key, resident = shared
    augment_key, device_key = jax.random.split(step_key)
    examples = materialize(resident, batch)
    # Augmentation draws by example, dropout by device: the former is the same on any number of devices.
    inputs, targets = task.train_inputs(augment_key, examples)
    dropout_key = jax.random.fold_in(device_key, jax.lax.axis_index(AXIS))

    def loss_fn(params: Any, part: Any) -> tuple[jax.Array, Any]:
        inputs, targets, index = part
        # Each part of a batch has dropout of its own.
        key = dropout_key if num_parts == 1 else jax.random.fold_in(dropout_key, index[0])
        outputs, updated = apply_fn(
            {"params": params, "batch_stats": batch_stats},
            *inputs,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        loss = jnp.mean(task.train_loss(outputs, targets))
        metrics = jax.tree.map(jnp.mean, task.train_metrics(outputs, targets))
        return loss, (updated.get("batch_stats", {}), {"loss": loss, **metrics})

    def gradients(part: Any) -> tuple[Any, Any]:
        return jax.grad(layout.whole(loss_fn), has_aux=True)(params, part)

    averaged = optax.microbatch(
        gradients,
        argnums=0,
        microbatch_size=None if num_parts == 1 else len(targets) // num_parts,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    grads, others = averaged((inputs, targets, batch["index"]))
    return layout.mean(grads), jax.lax.pmean(others, AXIS)


def make_eval_step(
    apply_fn: Callable, task: Task, layout: Layout | None = None, *, num_splits: int = 1
) -> Compiled:
    """One batch of evaluation: ``(variables, resident, batch) -> results``.

    Args:
      apply_fn: the model's ``apply``.
      task: what is evaluated.
      layout: of the parameters on the devices; by default every device has all of them.
      num_splits: how many splits lie on the devices, each of another size.

    Returns:
      A step over variables of the layout; ``results`` are of the batch's examples on all devices,
      ``[batch_size]``: ``loss``, ``prediction``, ``label``, and ``weight``, 0 for those that only fill up the
      batch.
    """
    layout = layout or DataParallel()

    def eval_step(variables: Any, resident: Any, batch: Any) -> dict[str, jax.Array]:
        def on_device(params: Any, shared: Any, batch: Any) -> dict[str, jax.Array]:
            others, resident = shared
            examples = materialize(resident, batch)

            def apply(params: Any) -> jax.Array:
                return apply_fn({"params": params, **others}, *task.eval_inputs(examples), train=False)

            outputs = layout.whole(apply)(params)
            results = {
                "loss": task.eval_loss(outputs, examples["label"]),
                "prediction": task.predict(outputs),
                "label": examples["label"],
                "weight": batch["weight"],
            }
            return jax.lax.all_gather(results, AXIS, tiled=True)

        others = {name: value for name, value in variables.items() if name != "params"}
        return layout.on_each_device(on_device)(variables["params"], (others, resident), batch)

    return Compiled(layout.program(eval_step), num_shapes=task.num_lengths * num_splits)


class Compiled:
    """A mapped function, compiled for each of the few shapes that its data comes in.

    Calls with more shapes are errors, not silent recompilations.

    Attributes:
      compile_seconds: how long compilation took that a call waited for; 0.0 before the first call.
    """

    def __init__(self, mapped: Any, *, num_shapes: int = 1):
        self._mapped = mapped
        self._num_shapes = num_shapes
        self._executables: dict[tuple, Any] = {}
        self._inputs: list[tuple[Any, ...]] = []
        self.compile_seconds = 0.0

    @property
    def flops(self) -> float:
        """XLA's count of the operations of one call on one device; NaN before the first call.

        Of several shapes it is the last compiled one's.
        """
        cost = self._last.cost_analysis() if self._executables else None
        return cost.get("flops", float("nan")) if cost else float("nan")

    @property
    def memory(self) -> Any:
        """XLA's ``memory_analysis()`` of one call on one device, in bytes; None before the first call.

        Of several shapes it is the last compiled one's.
        """
        return self._last.memory_analysis() if self._executables else None

    @property
    def peak_bytes(self) -> int | None:
        """Bytes that one call takes on one device at most, by XLA's count; None before the first call.

        Arguments, results that are not in their place, and temporary memory.
        """
        if (memory := self.memory) is None:
            return None
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + new + memory.temp_size_in_bytes

    @property
    def _last(self) -> Any:
        return next(reversed(self._executables.values()))

    @property
    def inputs(self) -> list[tuple[Any, ...]]:
        """The data, as shapes and shardings, that it is compiled for."""
        return list(self._inputs)

    def compile_for(self, state: Any, *data: Any) -> Any:
        """Compiles for arguments that may be ``jax.ShapeDtypeStruct``, with their shardings.

        A later call with such arguments runs at once. It may be called by another thread, before the first
        call.

        Returns:
          The executable, of JAX's stages.

        Raises:
          TypeError: for data of more shapes than there can be.
        """
        shapes = _shapes(data)
        if len(self._executables) >= self._num_shapes:
            known = ", ".join(map(str, self._executables))
            raise TypeError(f"data of shapes {shapes}; the step was compiled for {known} alone")
        executable = self._executables[shapes] = self._mapped.lower(state, *data).compile()
        self._inputs.append(abstract(data))
        return executable

    def __call__(self, *args: Any) -> Any:
        """Runs the function on ``(state, *data)``. Data of a new shape is compiled for first."""
        executable = self._executables.get(_shapes(args[1:]))
        if executable is None:
            start = time.perf_counter()
            executable = self.compile_for(*args)
            self.compile_seconds += time.perf_counter() - start
        return executable(*args)


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of arrays on the devices, without them."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _shapes(data: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in jax.tree.leaves(data))
