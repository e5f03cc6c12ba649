"""Batches made ahead of their use: read by grain, put on the devices by a thread."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import NamedSharding

HostBatch = dict[str, np.ndarray]
Batch = dict[str, jax.Array]

READER_THREADS = 4
BATCHES_AHEAD_ON_HOST = 8
BATCHES_AHEAD_ON_DEVICE = 2
NO_END = 2**62  # a number of steps that no run reaches


class Stream:
    """The batches of steps 0, 1, 2, ...: a function of the step, called ahead of time.

    What is read ahead is not thrown away between two calls of :meth:`steps` if the second begins where the
    first ended: while a run evaluates, the next epoch's first batches are being made. Any other start
    closes the readers and opens new ones.
    """

    def __init__(
        self,
        make: Callable[[int], HostBatch],
        sharding: NamedSharding,
        *,
        workers: int,
        take: Callable[[HostBatch], HostBatch] = lambda batch: batch,
    ) -> None:
        """Opens nothing yet.

        Args:
          make: the step's batch, arrays ``[devices, per_device, ...]``; pure, and can be pickled.
          sharding: of the batch's leading axis over the devices.
          workers: processes that call ``make``; 0 is threads of this process.
          take: looks at each batch in this process, and returns what goes to the devices.
        """
        self._make = make
        self._sharding = sharding
        self._workers = workers
        self._take = take
        self._position = 0
        self._readers: list[Any] = []  # the open grain iterator, if there is one
        # Also at the interpreter's exit, before grain's modules are torn down under its threads.
        weakref.finalize(self, _close, self._readers)

    def steps(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps ``start`` to ``stop - 1``, on the devices."""
        for step in range(start, stop):
            if not self._readers or self._position != step:
                self._open(step)
            batch = next(self._readers[0])
            self._position = step + 1
            yield batch

    def close(self) -> None:
        """Stops the reader threads and processes; :meth:`steps` would start them again."""
        _close(self._readers)

    def _open(self, start: int) -> None:
        self.close()
        # One element is one batch: a reader decodes a whole batch by one call, and nothing is collated.
        reading = grain.ReadOptions(num_threads=READER_THREADS, prefetch_buffer_size=BATCHES_AHEAD_ON_HOST)
        batches = grain.MapDataset.range(start, NO_END).map(self._make).to_iter_dataset(reading)
        if self._workers:
            # grain reads absl flags here; a program that is not an absl app never parses them.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            batches = batches.mp_prefetch(options)
        # A partial, not a method: the threads must not keep alive the stream whose end stops them.
        placed = batches.map(functools.partial(_place, self._sharding, self._take))
        ahead = grain.experimental.ThreadPrefetchIterDataset(
            placed, prefetch_buffer_size=BATCHES_AHEAD_ON_DEVICE
        )
        self._readers.append(iter(ahead))
        self._position = start


def place(batch: HostBatch, sharding: NamedSharding) -> Batch:
    """This host's part of global arrays, on its devices."""
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}


def _place(sharding: NamedSharding, take: Callable[[HostBatch], HostBatch], batch: HostBatch) -> Batch:
    return place(take(batch), sharding)


def _close(readers: list[Any]) -> None:
    while readers:
        readers.pop().close()
