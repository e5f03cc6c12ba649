"""Times every kernel, full against factorized, on the device that will train: fewer FLOPs are not less time.

A factorized layer moves more activations than the full one. Whether it is faster depends on the device, the
layer's shape and its input's, and only a measurement tells: the number of leading layers that stay full-rank
(K of Cuttlefish, Wang et al., MLSys 2023) is found that way. A layer by itself is a model; it is taken out
of its network with the shape and dtype of its input, factorized as any model is, and both are timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from cuttlefish_jax.factorize import factorize
from cuttlefish_jax.flops import count_marked
from cuttlefish_jax.kernels import Kernels, find_kernels
from cuttlefish_jax.plan.plan import FactorizationPlan
from cuttlefish_jax.profiling.kernel_profile import KernelProfile, KernelTiming
from cuttlefish_jax.profiling.stacks import find_stacks

# Shorter timings are of many calls in a row: the clock and the call itself should not count.
_MIN_SECONDS = 5e-3
_MAX_CALLS = 100
# The timings of one layer stop when they have taken so long: those of a long call vary less.
_MAX_SECONDS = 0.5
_MIN_REPEATS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCall:
    """A call of a layer, seen when its model was traced. Equal calls take the same time.

    Attributes:
      path: the layer's path in the model.
      layer: the layer by itself: a model of one kernel, at path ``""``.
      input: shape and dtype of what it is called with.
      count: how often one forward pass makes this call (loops, copies and mapped axes multiply it).
      method: what is called of it.
    """

    path: str = dataclasses.field(compare=False)
    layer: Any
    input: jax.ShapeDtypeStruct
    count: int = dataclasses.field(compare=False)
    method: str = "__call__"

    def find(self) -> Kernels:
        """The one kernel of the layer by itself."""
        options = {} if self.method == "__call__" else {"method": self.method}
        return find_kernels(self.layer, self.input, include_embeddings=True, **options)

    def as_function(self, model: Any) -> tuple[Callable[[Any, Any], Any], Any]:
        """As :func:`as_function`, of the layer or what is made of it."""
        options = {} if self.method == "__call__" else {"method": self.method}
        return as_function(model, self.input, **options)


@functools.singledispatch
def layer_calls(model: Any, kernels: Kernels, inputs: tuple, kwargs: dict[str, Any]) -> tuple[LayerCall, ...]:
    """Every call of the layers of ``kernels`` in an abstract run of ``model``, at least one of each."""
    raise TypeError(f"profile_kernels needs a Flax module, got {type(model).__name__}")


def count_calls(
    kernels: Kernels, seen: Sequence[tuple[LayerCall, int]], jaxpr: core.Jaxpr
) -> tuple[LayerCall, ...]:
    """Calls that were seen in a traced program, with how often it runs them.

    Args:
      kernels: of the model.
      seen: the calls, and the elements of what each returned, which it marked with its index.
      jaxpr: the program.
    """
    # Elements of all turns of a loop and all mapped copies, by those of the one that was seen. Calls that a
    # transformation traced, but does not run, have none.
    marked = count_marked(jaxpr)
    calls = defaultdict(list)
    for i, (call, size) in enumerate(seen):
        count = marked[str(i)] // max(size, 1)
        calls[call.path].append(dataclasses.replace(call, count=count))
    chosen = []
    for path in kernels:
        run = [call for call in calls[path] if call.count]
        # In a branch that another one outweighs, say.
        chosen += run or [dataclasses.replace(call, count=1) for call in calls[path][-1:]]
    return tuple(chosen)


@functools.singledispatch
def as_function(
    model: Any, x: jax.ShapeDtypeStruct, *, method: str = "__call__"
) -> tuple[Callable[[Any, Any], Any], Any]:
    """A model of one input as a function ``apply(params, x)``, and the shapes and dtypes of its params."""
    raise TypeError(f"profile_kernels needs a Flax module, got {type(model).__name__}")


def profile_kernels(
    model: Any,
    *inputs: Any,
    ratio: float = 1 / 4,
    paths: Collection[str] | None = None,
    repeats: int = 10,
    device: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
    include_embeddings: bool = False,
    **kwargs: Any,
) -> KernelProfile:
    """Measures, layer by layer, how much faster a model gets by factorization.

    Every layer is timed as it is and at rank ``max(1, int(ratio * min(m, n)))``: forward and backward, with
    the gradients of its params and of its input, in the shape and dtype in which its input arrives. Layers of
    equal configuration and input share a measurement. The time is the median of ``repeats`` timings, taken
    in turn full and factorized, so that a slow moment of the machine falls on both; compilation and warm-up
    are left out. Long calls are timed less often, until half a second has passed, but at least five times.

    Each layer is timed alone. What a compiler gains by fusing it with its neighbours is not seen, and calls
    so short that launching them dominates (microseconds) show less of a speed-up than they have. The copies
    that ``scan`` and ``vmap`` make of a layer, and the examples that ``vmap`` maps over, count as that many
    calls of one.

    Args:
      model: a Flax Linen or NNX module.
      *inputs: arrays or ``jax.ShapeDtypeStruct`` to call it with, of the batch that one device will train on;
        the values do not matter.
      ratio: rank of the factorized layers, as a share of ``min(m, n)``.
      paths: the kernels to profile; by default all.
      repeats: timings of each distinct layer, at most.
      device: the ``jax.Device`` to measure on; by default this process's first.
      progress: called with the number of a measurement, how many there will be, and what is measured: before
        each, from 1, and with 0 before everything is compiled.
      include_embeddings: profile embedding tables, too.
      **kwargs: passed on to the model, as by :func:`cuttlefish_jax.find_kernels`.

    Returns:
      A mapping ``path -> full / factorized time``, which also knows the times and the stacks.

    Raises:
      TypeError: if ``model`` is of a kind that has no front end.
      ValueError: if ``ratio`` or ``repeats`` is out of bounds, if the model has no kernel that can be
        factorized, or for one of ``paths`` that is no kernel's.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, cuttlefish_jax as cf
      >>> model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64)])
      >>> profile = cf.profile_kernels(model, jnp.ones((8, 64)), repeats=2)
      >>> list(profile), list(profile.stacks)
      (['layers_0', 'layers_2'], ['layers'])
      >>> full, factorized = profile.seconds("layers_0")
      >>> profile["layers_0"] == full / factorized
      True

    References:
      Wang et al., Cuttlefish: Low-Rank Model Training without All the Tuning, MLSys 2023.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio {ratio} is not in (0, 1]")
    if repeats < 1:
        raise ValueError(f"repeats {repeats} is below 1")
    kernels = find_kernels(model, *inputs, include_embeddings=include_embeddings, **kwargs)
    if not kernels:
        raise ValueError("the model has no kernel that can be factorized: there is nothing to profile")
    # As a plan says it: a path that is no kernel's is an error that names those near it.
    FactorizationPlan.from_ranks(kernels, dict.fromkeys(paths or (), 1))
    chosen = [path for path in kernels if paths is None or path in paths]
    calls = [call for call in layer_calls(model, kernels, inputs, kwargs) if call.path in chosen]
    distinct: list[LayerCall] = []
    for call in calls:
        if call not in distinct:
            distinct.append(call)
    device = jax.local_devices()[0] if device is None else device
    say = progress or (lambda number, total, what: None)
    say(0, len(distinct), "compiling")
    runs = [_prepare(call, _rank(kernels[call.path].max_rank, ratio), device) for call in distinct]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Before anything is timed: compilers use the devices, too.
        list(pool.map(_Run.compile, itertools.chain.from_iterable(runs)))
    seconds = []
    for number, (call, pair) in enumerate(zip(distinct, runs, strict=True), start=1):
        say(number, len(distinct), _describe(call, kernels))
        seconds.append(_measure(pair, repeats))
    stacks = find_stacks(kernels)
    timings = []
    for path in chosen:
        own = [call for call in calls if call.path == path]
        full, factorized = (
            sum(call.count * seconds[distinct.index(call)][i] for call in own) for i in range(2)
        )
        timings.append(
            KernelTiming(
                path=path,
                stack=stacks[path],
                layer=kernels[path].layer,
                shape=kernels[path].shape,
                rank=_rank(kernels[path].max_rank, ratio),
                input_shape=own[0].input.shape,
                input_dtype=str(own[0].input.dtype),
                calls=sum(call.count for call in own),
                full_seconds=full,
                factorized_seconds=factorized,
            )
        )
    return KernelProfile(timings=tuple(timings), ratio=float(ratio), device=device.device_kind)


def _rank(max_rank: int, ratio: float) -> int:
    return max(1, int(ratio * max_rank))


def _describe(call: LayerCall, kernels: Kernels) -> str:
    kernel = kernels[call.path]
    shapes = ("x".join(map(str, shape)) for shape in (kernel.shape, call.input.shape))
    return f"{call.path or '(root)'}: {kernel.layer} {next(shapes)} on {next(shapes)} {call.input.dtype}"


def _prepare(call: LayerCall, rank: int, device: Any) -> tuple[_Run, _Run]:
    """A layer as it is, and factorized."""
    plan = FactorizationPlan.from_ranks(call.find(), {"": rank})
    full, factorized = (
        _Run(*call.as_function(model), call.input, device)
        for model in (call.layer, factorize(call.layer, plan))
    )
    return full, factorized


def _measure(runs: tuple[_Run, _Run], repeats: int) -> tuple[float, float]:
    """Seconds of one call, ``(full, factorized)``: the medians of timings taken in turn."""
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(run.arguments())
            run.seconds(1)  # warms up
        once = [run.seconds(1) for run in runs]
        calls = min(_MAX_CALLS, math.ceil(_MIN_SECONDS / min(once)))
        affordable = int(_MAX_SECONDS / (calls * sum(once)))
        repeats = min(repeats, max(_MIN_REPEATS, affordable))
        rounds = [[run.seconds(calls) for run in runs] for _ in range(repeats)]
    full, factorized = (statistics.median(times) for times in zip(*rounds, strict=True))
    return full, factorized


def forward_and_backward(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """What a layer adds to a training step: ``(params, x, cotangent) -> (output, gradients)``.

    The gradients are those of the params and, unless it is of integers, of ``x``. The output is among the
    results: the gradients of a linear layer need none, and a compiler would leave it out.
    """

    def step(params: Any, x: Any, cotangent: Any) -> tuple[Any, Any]:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            output, pullback = jax.vjp(apply, params, x)
        else:
            output, pullback = jax.vjp(lambda params: apply(params, x), params)
        return output, pullback(cotangent)

    return step


class _Run:
    """A model's forward and backward pass on a device."""

    def __init__(self, apply: Callable[[Any, Any], Any], params: Any, x: jax.ShapeDtypeStruct, device: Any):
        self._device, self._shapes = device, (params, x, jax.eval_shape(apply, params, x))
        sharding = jax.sharding.SingleDeviceSharding(device)
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), self._shapes
        )
        self._lowered = jax.jit(forward_and_backward(apply)).lower(*placed)
        self._step: Any = None
        self._arrays: tuple[Any, ...] = ()

    def compile(self) -> None:
        """Compiles the pass; of several at once in threads."""
        self._step = self._lowered.compile()

    @contextlib.contextmanager
    def arguments(self) -> Iterator[None]:
        """Has the arguments on the device, which need not hold those of all layers at a time."""
        self._arrays = jax.device_put(jax.tree.map(_random, self._shapes), self._device)
        yield
        self._arrays = ()

    def seconds(self, calls: int) -> float:
        """Seconds that one call takes, of so many in a row."""
        (params, x, cotangent), gradients, start = self._arrays, None, time.perf_counter()
        for _ in range(calls):
            # The next call waits for this one's output, as in a training step one layer for the other: a
            # device that can would run independent calls side by side.
            cotangent, gradients = self._step(params, x, cotangent)
        jax.block_until_ready((cotangent, gradients))
        return (time.perf_counter() - start) / calls


def _random(leaf: Any) -> np.ndarray:
    """An array of small random numbers (zeros if of integers); a large one repeats the same few."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return np.zeros(leaf.shape, leaf.dtype)
    values = np.random.default_rng(0).normal(scale=0.1, size=min(math.prod(leaf.shape), 2**16))
    return np.resize(values.astype(leaf.dtype), leaf.shape)
