"""From a data set to the batches of a mapped step: one order of examples, and two ways to bring them.

*On device*, the whole data set lies in the memory of every device, and a step is sent indices alone. *From
the host*, grain reads the examples ahead of time. Both ways, any number of hosts, and a run that was resumed
give the same examples to the same step. The step is compiled alike for both, e.g.::

    def step(state, resident, batch):
        examples = materialize(resident, batch)  # e.g. {"image", "label", "index"}
        ...

    step = jax.pmap(step, axis_name="batch", in_axes=(None, None, 0), out_axes=(None, 0))
    for batch in train_input.epoch(0):
        state, metrics = step(state, train_input.resident, batch)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cuttlefish_jax.training.data.damage import DAMAGED, damage_taker
from cuttlefish_jax.training.data.sources import Arrays, Source, in_memory
from cuttlefish_jax.training.data.stream import Batch, HostBatch, Stream, place
from cuttlefish_jax.training.parallelism import AXIS, device_mesh

Devices = Sequence[Any]  # of jax.Device, which is no type to a type checker


def materialize(resident: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """The examples of a batch; to be called inside the compiled step.

    Args:
      resident: ``TrainInput.resident`` or ``EvalInput.resident``.
      batch: one device's part of a batch: ``"index"`` ``int32[b]``, and the source's arrays if they are not
        resident.

    Returns:
      The batch with the source's arrays: ``"label"``, and e.g. ``"image"`` ``uint8[b, h, w, c]``.
    """

    def gather(array: Any) -> jax.Array:
        # Repetitions of an example count on from the number of examples.
        position = batch["index"] % len(array)
        return jnp.asarray(array).at[position].get(mode="promise_in_bounds")

    return {**batch, **{name: gather(array) for name, array in resident.items()}}


class TrainInput:
    """Training batches: every example at most once in an epoch, in an order of the seed and the epoch.

    An epoch has ``len(source) // batch_size`` steps; the few examples that are left over are others in
    each epoch. With ``repeats`` each epoch has so many differently augmented copies of a part of the examples
    instead (repeated augmentation, Hoffer et al., CVPR 2020): copy ``k`` of example ``i`` has the index
    ``i + k * len(source)``.

    Attributes:
      resident: the source's arrays on every device, or ``{}`` if the batches bring them.
      steps_per_epoch: batches in an epoch.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        on_device: bool,
        workers: int = 0,
        repeats: int = 1,
        process_index: int | None = None,
        process_count: int | None = None,
        devices: Devices | None = None,
    ) -> None:
        """Places the data set on the devices if it is to be there; reads nothing else yet.

        Args:
          source: the training examples, the same on every host.
          batch_size: examples in a step, over all devices of all hosts.
          seed: of the order.
          on_device: whether the whole data set is kept in the memory of each device.
          workers: processes that read where it is not; 0 reads in threads.
          repeats: copies of an example in an epoch that has it.
          process_index: of this host; default ``jax.process_index()``.
          process_count: number of hosts, each with as many devices; default ``jax.process_count()``.
          devices: of this host; default ``jax.local_devices()``, in a mesh with those of the other hosts.

        Raises:
          ValueError: if the devices cannot share a batch evenly, or there is not one whole batch.
        """
        share = _Share.make(batch_size, process_index, process_count, devices)
        if len(source) < batch_size:
            raise ValueError(
                f"{len(source)} training examples are less than one batch of {batch_size}: lower it"
            )
        self.steps_per_epoch = len(source) // batch_size
        self.resident, read_from, sharding = _bring(source, on_device, devices)
        make = functools.partial(_train_batch, read_from, share, len(source), seed, repeats)
        self._stream = Stream(make, sharding, workers=workers if read_from else 0, take=damage_taker(source))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from ``start_step`` on: global arrays, of which each host has its part.

        Args:
          epoch: from 0.
          start_step: the first step within the epoch; a resumed run goes on where it stopped.

        Yields:
          ``{"index": int32[devices, per_device]}``, with the source's arrays, ``[devices, per_device, ...]``,
          if they are not resident.

        Raises:
          ValueError: if the epoch has no such step.
        """
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"no step {start_step} in epoch {epoch} of {self.steps_per_epoch} steps")
        first = epoch * self.steps_per_epoch
        return self._stream.steps(first + start_step, first + self.steps_per_epoch)

    def close(self) -> None:
        """Stops the threads and processes that read ahead."""
        self._stream.close()


class EvalInput:
    """Evaluation batches: every example exactly once, in order.

    The last batch is filled up with copies of example 0 of weight 0.

    Attributes:
      resident: the source's arrays on every device, or ``{}`` if the batches bring them.
      num_steps: batches in one pass.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        on_device: bool,
        workers: int = 0,
        process_index: int | None = None,
        process_count: int | None = None,
        devices: Devices | None = None,
    ) -> None:
        """Places the data set on the devices if it is to be there; arguments as for :class:`TrainInput`.

        Raises:
          ValueError: if the devices cannot share a batch evenly, or there are no examples.
        """
        share = _Share.make(batch_size, process_index, process_count, devices)
        if not len(source):
            raise ValueError("no examples to evaluate on")
        self.num_steps = -(-len(source) // batch_size)
        self.resident, read_from, sharding = _bring(source, on_device, devices)
        make = functools.partial(_eval_batch, read_from, share, len(source))
        self._stream = Stream(make, sharding, workers=workers if read_from else 0, take=damage_taker(source))
        self._passes = 0

    def batches(self) -> Iterator[Batch]:
        """One pass over the examples: global arrays, of which each host has its part.

        Yields:
          As :meth:`TrainInput.epoch`, with ``"weight"`` ``f32[devices, per_device]``: 1, or 0 for filling.
        """
        # Passes follow on each other like epochs, so that the next one's first batches are read ahead.
        first = self._passes * self.num_steps
        self._passes += 1
        return self._stream.steps(first, first + self.num_steps)

    def close(self) -> None:
        """Stops the threads and processes that read ahead."""
        self._stream.close()


@dataclasses.dataclass(frozen=True)
class _Share:
    """How a batch is shared: the positions of a global batch that fall to this host, and their shape."""

    batch_size: int
    process_index: int
    process_count: int
    num_devices: int

    @classmethod
    def make(
        cls,
        batch_size: int,
        process_index: int | None,
        process_count: int | None,
        devices: Devices | None,
    ) -> _Share:
        hosts = jax.process_count() if process_count is None else process_count
        index = jax.process_index() if process_index is None else process_index
        per_host = len(jax.local_devices() if devices is None else devices)
        total = hosts * per_host
        if batch_size < 1 or batch_size % total:
            below = batch_size // total * total
            near = f"{below} or {below + total}" if below > 0 else str(total)
            raise ValueError(
                f"batch_size {batch_size} cannot be shared evenly by {total} devices "
                f"({hosts} hosts x {per_host}): use {near}"
            )
        return cls(batch_size, index, hosts, per_host)

    def own(self, batch: np.ndarray) -> np.ndarray:
        """``[batch_size]`` of a global batch -> ``[devices, per_device]``, this host's part of it."""
        return batch.reshape(self.process_count, self.num_devices, -1)[self.process_index]


def _bring(
    source: Source, on_device: bool, devices: Devices | None
) -> tuple[Batch, Source | None, NamedSharding]:
    """What is resident on the devices, what batches are read from, and the sharding of batches."""
    # Of all hosts: each brings its part, and the arrays are global ones.
    mesh = device_mesh(devices)
    sharded = NamedSharding(mesh, PartitionSpec(AXIS))
    if not on_device:
        return {}, source, sharded
    # Placed on all devices now: pmap would copy an array that lies on one device to the others every step.
    everywhere = NamedSharding(mesh, PartitionSpec())
    return place(dict(in_memory(source).arrays), everywhere), None, sharded


def _train_batch(
    source: Source | None, share: _Share, num_examples: int, seed: int, repeats: int, step: int
) -> HostBatch:
    epoch, step_in_epoch = divmod(step, num_examples // share.batch_size)
    first = step_in_epoch * share.batch_size
    batch = _epoch_order(num_examples, seed, epoch, repeats)[first : first + share.batch_size]
    index = share.own(batch)
    if source is None:
        return {"index": index}
    seeds = [(seed, epoch, int(i)) for i in index.ravel()]
    examples = source.read(index.ravel() % num_examples, seeds=seeds, batch=batch % num_examples)
    return {"index": index, **_per_device(examples, index.shape)}


@functools.lru_cache(maxsize=2)  # one epoch ends while the next is read ahead
def _epoch_order(num_examples: int, seed: int, epoch: int, repeats: int) -> np.ndarray:
    """The examples in the order of one epoch, ``int32[num_examples]``.

    Not by ``grain.MapDataset.shuffle``: that takes 10 to 25 microseconds for each index, which is seconds for
    each epoch of a data set that lies on the device. ``RandomState``, because NumPy promises that its
    stream never changes: hosts agree, and a run resumes, whatever their versions.
    """
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    order = np.random.RandomState(bits).permutation(num_examples).astype(np.int32)
    copies = order[:, None] + num_examples * np.arange(repeats, dtype=np.int32)
    order = copies.ravel()[:num_examples]
    order.setflags(write=False)
    return order


def _eval_batch(source: Source | None, share: _Share, num_examples: int, step: int) -> HostBatch:
    first = step % -(-num_examples // share.batch_size) * share.batch_size
    positions = np.arange(first, first + share.batch_size)
    real = positions < num_examples
    batch = np.where(real, positions, 0).astype(np.int32)
    index = share.own(batch)
    filled = {"index": index, "weight": share.own(real.astype(np.float32))}
    if source is None:
        return filled
    filled |= _per_device(source.read(index.ravel(), batch=batch), index.shape)
    if DAMAGED in filled:  # there is another example in their place, which must not count twice
        filled["weight"] *= filled[DAMAGED] < 0
    return filled


def _per_device(examples: Arrays, shape: tuple[int, ...]) -> HostBatch:
    return {name: array.reshape(*shape, *array.shape[1:]) for name, array in examples.items()}
