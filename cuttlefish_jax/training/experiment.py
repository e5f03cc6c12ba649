"""Everything of a run that its configuration fixes: task, network, kernels, learning rate."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import numpy as np
import optax

import cuttlefish_jax as cf
from cuttlefish_jax.errors import ConfigError, UserError
from cuttlefish_jax.models.pretrained import load_pretrained
from cuttlefish_jax.training.check import check_config
from cuttlefish_jax.training.config import Config
from cuttlefish_jax.training.data import EvalInput, TrainInput
from cuttlefish_jax.training.method import make_method, plan_from_config
from cuttlefish_jax.training.network import create_network
from cuttlefish_jax.training.parallelism import (
    AXIS,
    DataParallel,
    FullySharded,
    Layout,
    bytes_per_device,
)
from cuttlefish_jax.training.rank_meter import RankMeter
from cuttlefish_jax.training.recipe import frozen_mask, make_optimizer
from cuttlefish_jax.training.schedule import after_switch, make_schedule
from cuttlefish_jax.training.state import TrainState, create_params, create_state
from cuttlefish_jax.training.step import Compiled, make_eval_step, make_train_step
from cuttlefish_jax.training.tasks import Task, load_task


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The fixed parts of a run; built by :meth:`from_config`.

    Attributes:
      config: the configuration.
      task: what is learnt.
      model: the full-rank network.
      kernels: its kernels.
      profile: how much faster each kernel gets when it is factorized; None if that was not measured.
      train: training input.
      evaluation: evaluation inputs, ``"validation"`` and ``"test"`` among them.
      schedule: learning rate of a step, before any switch.
    """

    config: Config
    task: Task
    model: nn.Module
    kernels: cf.Kernels
    profile: cf.KernelProfile | None
    train: TrainInput
    evaluation: Mapping[str, EvalInput]
    schedule: optax.Schedule

    @classmethod
    def from_config(cls, config: Config) -> Experiment:
        """Builds all parts; whatever is wrong with the configuration shows here, before training.

        Raises:
          ConfigError: for a setting that makes no sense.
        """
        check_config(config)
        with _settings("config.data"):
            task = load_task(config)
        with _settings("config.model"):
            model = _create_model(config.model, task)
            task.check_model(model)
        data = config.data
        placement = dict(batch_size=config.batch_size, on_device=data.on_device, workers=data.workers)
        with _settings("config.batch_size"):
            train = TrainInput(task.train, seed=config.seed, repeats=data.repeated_augmentation, **placement)
            evaluation = {split: EvalInput(source, **placement) for split, source in task.evaluation.items()}
            _check_accumulation(config)
        schedule = make_schedule(config.schedule, epochs=config.epochs, steps_per_epoch=train.steps_per_epoch)
        with _settings("config.model"):
            kernels = cf.find_kernels(model, *task.inputs, train=False)
        experiment = cls(
            config=config,
            task=task,
            model=model,
            kernels=kernels,
            profile=None,
            train=train,
            evaluation=evaluation,
            schedule=schedule,
        )
        # For their errors, which must not wait for training.
        _ = experiment.phase(), experiment.candidates, experiment.num_trained(experiment.phase())
        return experiment

    @functools.cached_property
    def candidates(self) -> tuple[str, ...]:
        """Paths of the kernels that may be factorized; the switch waits for their ranks alone.

        Raises:
          ConfigError: if there are none: a typo must not show at the switch.
        """
        # As if every kernel had one singular value, but for rounding.
        spectra = {
            p: np.eye(1, k.max_rank)[0] + np.zeros((*k.stack_shape, 1)) for p, k in self.kernels.items()
        }
        ranks = {path: np.full(kernel.stack_shape, 1e-6) for path, kernel in self.kernels.items()}
        ones = {path: np.ones(kernel.stack_shape) for path, kernel in self.kernels.items()}
        plan = plan_from_config(
            self.config, self.kernels, ranks, ones, singular_values=spectra, profile=self.profile
        )
        if not plan.ranks and self.config.method != "full_rank":
            raise ConfigError(
                f"there is nothing to switch, every layer would be kept ({_reasons(plan)}): change that, "
                "or train with --config.method=full_rank"
            )
        return tuple(plan.ranks) or tuple(self.kernels)

    def phase(self, plan: cf.FactorizationPlan | None = None, *, switch_step: int = 0) -> Phase:
        """The full-rank phase, or the low-rank one of ``plan``, which begins at ``switch_step``."""
        config, schedule, task = self.config, self.schedule, self.task
        if plan is not None:
            length = dict(epochs=config.epochs, steps_per_epoch=self.train.steps_per_epoch)
            schedule = after_switch(schedule, switch_step, config.schedule, config.switch, **length)
        model = self.model if plan is None else cf.factorize(self.model, plan)
        layout = self._layout(model, plan)
        train_step = make_train_step(
            task,
            layout,
            ema=config.optimizer.ema,
            accumulation_steps=config.optimizer.accumulation_steps,
            skip_nonfinite=config.nonfinite == "skip",
        )
        optimizer = config.optimizer.copy_and_resolve_references()
        method = make_method(config)
        optimizer.frobenius_decay, optimizer.precondition = method.frobenius_decay, method.precondition
        return Phase(
            model=model,
            plan=plan,
            schedule=schedule,
            tx=make_optimizer(optimizer, schedule, plan=plan),
            layout=layout,
            train_step=train_step,
            eval_step=make_eval_step(model.apply, task, layout, num_splits=len(self.evaluation)),
        )

    def _layout(self, model: nn.Module, plan: cf.FactorizationPlan | None) -> Layout:
        if self.config.parallelism == "pmap":
            return DataParallel()
        params = jax.eval_shape(functools.partial(create_params, model, self.task.inputs))
        return FullySharded.of(params, self.kernels, plan)

    def create_state(self, phase: Phase) -> TrainState:
        """A state on the devices, at random initialisation or with the configured pre-trained weights.

        Raises:
          ConfigError: if the weights do not fit the network.
        """
        shardings = phase.layout.shardings(self.abstract_state(phase))
        # Run once: optimising the program would take longer than it saves.
        init = jax.jit(lambda: self._create_state(phase), out_shardings=shardings).lower()
        state = init.compile(compiler_options={"xla_backend_optimization_level": "0"})()
        config = self.config.model
        if not config.pretrained:
            return state
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        with _settings("config.model.pretrained"):
            variables = load_pretrained(
                config.name, variables, config.pretrained, fresh=config.fresh, unused=config.unused
            )
        # A copy: the buffers of a state are donated, and none may be donated twice.
        average = None if state.ema_params is None else jax.tree.map(np.array, variables["params"])
        return phase.layout.place(state.replace(**variables, ema_params=average))

    def abstract_state(self, phase: Phase) -> TrainState:
        """The shapes and dtypes of a state."""
        return jax.eval_shape(lambda: self._create_state(phase))

    def _create_state(self, phase: Phase) -> TrainState:
        config = self.config
        meter = RankMeter(self.kernels, config.ranks.method)
        return create_state(
            phase.model,
            phase.tx,
            self.task.inputs,
            seed=config.seed,
            ema=bool(config.optimizer.ema),
            rank_vectors={} if phase.plan else meter.initial_vectors,
        )

    def count_flops(self, phase: Phase) -> int:
        """Forward FLOPs of a phase's network for one example."""
        variables = self.abstract_state(phase).eval_variables
        return cf.count_flops(
            lambda v, inputs: phase.model.apply(v, *inputs, train=False), variables, self.task.inputs
        )

    def num_trained(self, phase: Phase) -> int:
        """Parameters of a phase's network that are trained: all but the frozen ones."""
        params = self.abstract_state(phase).params
        frozen = frozen_mask(params, self.config.optimizer)
        counts = jax.tree.map(lambda x, is_frozen: 0 if is_frozen else math.prod(x.shape), params, frozen)
        return sum(jax.tree.leaves(counts))


def _create_model(config: Config, task: Task) -> nn.Module:
    axis_name = AXIS if config.sync_batch_norm else None
    model = create_network(config, num_outputs=task.num_outputs, norm_axis_name=axis_name)
    task.check_model(model)
    return model


def _check_accumulation(config: Config) -> None:
    parts = jax.device_count() * config.optimizer.accumulation_steps
    if config.batch_size % parts:
        raise ConfigError(
            f"config.batch_size {config.batch_size} cannot be shared by {jax.device_count()} devices in "
            f"{config.optimizer.accumulation_steps} parts each: use a multiple of {parts}"
        )


def _reasons(plan: cf.FactorizationPlan) -> str:
    """The reasons of a plan's kept layers, each with the number of layers, the most frequent first."""
    counted = Counter(plan.kept[path] for path in plan.kernels).most_common(3)
    return "; ".join(f"{number} layers: {reason}" for reason, number in counted)


@contextlib.contextmanager
def _settings(name: str) -> Iterator[None]:
    """Makes a ValueError one of the settings it comes from."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Phase:
    """A network, its optimizer, and the steps compiled for them.

    Attributes:
      model: full-rank or factorized.
      plan: of the factorized model; ``None`` in the full-rank phase.
      schedule: learning rate of a step.
      tx: the optimizer.
      layout: how its states lie on the devices.
      train_step: see :func:`make_train_step`.
      eval_step: see :func:`make_eval_step`.
    """

    model: nn.Module
    plan: cf.FactorizationPlan | None
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    layout: Layout
    train_step: Compiled
    eval_step: Compiled

    @property
    def name(self) -> str:
        """``"full_rank"`` or ``"low_rank"``."""
        return "full_rank" if self.plan is None else "low_rank"

    @property
    def compile_seconds(self) -> float:
        """How long the phase's steps took to compile."""
        return self.train_step.compile_seconds + self.eval_step.compile_seconds

    def memory(self, state: TrainState) -> dict[str, int | None]:
        """Bytes on a device: of its ``state``, and of a train ``step`` at most, once there was one."""
        size = bytes_per_device(state, self.layout.shardings(state))
        return {"state": size, "step": self.train_step.peak_bytes}
