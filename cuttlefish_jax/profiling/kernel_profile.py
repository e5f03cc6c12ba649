"""What profiling measured: the time of every kernel, full against factorized, layer by layer and by stack."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping

from cuttlefish_jax.json_reader import JsonReader
from cuttlefish_jax.kernels import Kernels
from cuttlefish_jax.text_table import align

_FORMAT = 1
_DAY = 86_400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelTiming:
    """The time that one kernel's layer takes in one training step, forward and backward.

    Attributes:
      path: the layer's path.
      stack: the stack that it is of, see :func:`cuttlefish_jax.profiling.stacks.find_stacks`.
      layer: the layer's type.
      shape: of the kernel, stack axes included.
      rank: at which the factorized layer was timed.
      input_shape: of the layer's first call, one copy's where ``scan`` or ``vmap`` run several.
      input_dtype: the same call's.
      calls: how often the layer is called in one step, all copies together.
      full_seconds: of all calls, full-rank.
      factorized_seconds: of all calls, factorized.

    Raises:
      ValueError: for a rank or a number of calls below 1, or seconds that are none.
    """

    path: str
    stack: str
    layer: str
    shape: tuple[int, ...]
    rank: int
    input_shape: tuple[int, ...]
    input_dtype: str
    calls: int
    full_seconds: float
    factorized_seconds: float

    def __post_init__(self):
        if self.rank < 1 or self.calls < 1:
            raise ValueError(f"{self.path!r} has a rank or a number of calls below 1")
        for seconds in (self.full_seconds, self.factorized_seconds):
            if not 0 < seconds < _DAY:
                raise ValueError(f"{self.path!r} took {seconds} s, expected more than 0 and less than a day")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelProfile(Mapping[str, float]):
    """Speed-ups measured by :func:`cuttlefish_jax.profile_kernels`: a mapping ``path -> full / factorized``.

    Iteration is over the kernels' paths in call order. ``profile[stack]`` is a stack's speed-up: the time of
    all its profiled kernels, full-rank, by their time factorized.

    Attributes:
      timings: one for each kernel.
      ratio: the rank of the factorized layers, as a share of ``min(m, n)``.
      device: the kind of device that they were measured on.

    Raises:
      ValueError: if the parts contradict each other.
    """

    timings: tuple[KernelTiming, ...]
    ratio: float
    device: str

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio {self.ratio} is not in (0, 1]")
        if len(self._by_path) < len(self.timings):
            raise ValueError("two of its kernels have one path")
        members = Counter(timing.stack for timing in self.timings)
        for path, timing in self._by_path.items():
            if path in members and (timing.stack != path or members[path] > 1):
                raise ValueError(f"{path!r} is a kernel, and a stack with other kernels")

    @functools.cached_property
    def _by_path(self) -> dict[str, KernelTiming]:
        return {timing.path: timing for timing in self.timings}

    @functools.cached_property
    def _by_stack(self) -> dict[str, tuple[KernelTiming, ...]]:
        stacks = dict.fromkeys(timing.stack for timing in self.timings)
        return {stack: tuple(t for t in self.timings if t.stack == stack) for stack in stacks}

    def __getitem__(self, name: str) -> float:
        full, factorized = self.seconds(name)
        return full / factorized

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self.timings)

    @property
    def stacks(self) -> dict[str, float]:
        """``{stack: speed-up}``, in call order."""
        return {stack: self[stack] for stack in self._by_stack}

    def stack_of(self, path: str) -> str:
        """The stack of the kernel at ``path``; a KeyError if it was not profiled."""
        return self._by_path[path].stack

    def seconds(self, name: str) -> tuple[float, float]:
        """``(full, factorized)`` seconds of a kernel or a stack in one step, at the measured rank."""
        timings = (self._by_path[name],) if name in self._by_path else self._by_stack[name]
        return sum(t.full_seconds for t in timings), sum(t.factorized_seconds for t in timings)

    def predicted_seconds(self, path: str, rank: int) -> float:
        """Seconds that the factorized kernel takes at another rank than the measured one: an upper estimate.

        Above the measured rank the time is taken to grow in proportion to the rank, although a part of it
        (the traffic of input and output) does not grow; below it, not to fall.

        Raises:
          ValueError: if ``rank`` is below 1.
        """
        if rank < 1:
            raise ValueError(f"rank {rank} for {path!r} is below 1")
        timing = self._by_path[path]
        return timing.factorized_seconds * max(1.0, rank / timing.rank)

    def predicted_speedup(self, path: str, rank: int) -> float:
        """Full by factorized time of a kernel at ``rank``: a lower estimate, by :meth:`predicted_seconds`."""
        return self._by_path[path].full_seconds / self.predicted_seconds(path, rank)

    def check(self, kernels: Kernels) -> None:
        """Raises a ValueError if this is the profile of another model than ``kernels`` are of."""
        for timing in self.timings:
            if timing.path not in kernels:
                raise ValueError(f"the profile is of another model: this one has no kernel {timing.path!r}")
            if (shape := kernels[timing.path].shape) != timing.shape:
                raise ValueError(
                    f"the profile is of another model: its kernel {timing.path!r} has shape {timing.shape}, "
                    f"this one's {shape}"
                )

    def report(self) -> str:
        """A table for people: every kernel with its input and times, then every stack."""
        rows = [("layer", "stack", "kernel", "input", "rank", "full ms", "factorized ms", "speed-up")]
        for t in self.timings:
            kernel, shape = "x".join(map(str, t.shape)), "x".join(map(str, t.input_shape))
            called = f"{t.calls} times " if t.calls > 1 else ""
            names = (t.path or "(root)", t.stack or "(root)")
            rows.append(
                (*names, kernel, f"{called}{shape} {t.input_dtype}", f"{t.rank}", *self._times(t.path))
            )
        totals = [("stack", "layers", "full ms", "factorized ms", "speed-up")]
        for stack, members in self._by_stack.items():
            totals.append((stack or "(root)", f"{len(members)}", *self._times(stack)))
        about = (
            f"forward and backward in one training step, at {self.ratio:g} of the full rank, on {self.device}"
        )
        lines = [*align(rows, right={4, 5, 6, 7}), "", *align(totals, right={1, 2, 3, 4}), "", about]
        return "\n".join(lines)

    def _times(self, name: str) -> tuple[str, str, str]:
        full, factorized = self.seconds(name)
        return f"{1e3 * full:.3f}", f"{1e3 * factorized:.3f}", f"{self[name]:.2f}x"

    def to_json(self) -> str:
        """The profile as a JSON document that :meth:`from_json` reads back to an equal profile."""
        document = {
            "format": _FORMAT,
            "ratio": self.ratio,
            "device": self.device,
            "kernels": [dataclasses.asdict(timing) for timing in self.timings],
        }
        return json.dumps(document, indent=1)

    @classmethod
    def from_json(cls, text: str) -> KernelProfile:
        """Reads :meth:`to_json`'s document.

        Raises:
          ValueError: if ``text`` is no such document.
        """
        reader = JsonReader("kernel profile")
        document = reader.load(text)
        if (version := reader.get(document, "format", int)) != _FORMAT:
            raise reader.error(f"its format {version} is not {_FORMAT}")
        fields = {
            "ratio": reader.get(document, "ratio", float),
            "device": reader.get(document, "device", str),
        }
        entries = [_timing_fields(reader, entry) for entry in reader.get(document, "kernels", list)]
        try:
            return cls(timings=tuple(KernelTiming(**entry) for entry in entries), **fields)
        except ValueError as error:
            raise reader.error(str(error)) from error


def _timing_fields(reader: JsonReader, entry: object) -> dict:
    fields = {}
    for name, kinds in {
        str: ("path", "stack", "layer", "input_dtype"),
        int: ("rank", "calls"),
        float: ("full_seconds", "factorized_seconds"),
    }.items():
        fields.update({key: reader.get(entry, key, name) for key in kinds})
    return fields | {key: reader.integers(entry, key) for key in ("shape", "input_shape")}
