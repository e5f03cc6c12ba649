"""Everything of a run that its configuration fixes: data, network, kernels, learning rate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import cuttlefish_jax as cf
from cuttlefish_jax.models import create_model
from cuttlefish_jax.training.config import Config
from cuttlefish_jax.training.data import EvalInput, TrainInput, load_dataset, make_preprocess
from cuttlefish_jax.training.errors import ConfigError, UserError
from cuttlefish_jax.training.method import check_config, plan_from_config
from cuttlefish_jax.training.recipe import make_optimizer, make_schedule, rewarmup
from cuttlefish_jax.training.state import TrainState, create_state
from cuttlefish_jax.training.step import AXIS, Compiled, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The fixed parts of a run; built by :meth:`from_config`.

    Attributes:
      config: the configuration.
      model: the full-rank network.
      kernels: its kernels.
      candidates: paths of the kernels that may be factorized; the switch waits for their ranks alone.
      example: shape and dtype of one preprocessed example with a batch axis.
      train: training input.
      evaluation: evaluation inputs, ``{"validation": ..., "test": ...}``.
      preprocess: for training, with augmentation.
      preprocess_eval: for evaluation.
      schedule: learning rate of a step, before any switch.
    """

    config: Config
    model: nn.Module
    kernels: cf.Kernels
    candidates: tuple[str, ...]
    example: jax.ShapeDtypeStruct
    train: TrainInput
    evaluation: dict[str, EvalInput]
    preprocess: Callable[..., Any]
    preprocess_eval: Callable[..., Any]
    schedule: optax.Schedule

    @classmethod
    def from_config(cls, config: Config) -> Experiment:
        """Builds all parts; whatever is wrong with the configuration shows here, before training.

        Raises:
          ConfigError: for a setting that makes no sense.
        """
        check_config(config)
        with _settings("config.data"):
            dataset = load_dataset(config.data)
        options = dict(config.model)
        name = options.pop("name")
        axis_name = AXIS if options.pop("sync_batch_norm") else None
        with _settings("config.model"):
            model = create_model(name, num_classes=dataset.num_classes, norm_axis_name=axis_name, **options)
        example = jax.ShapeDtypeStruct(
            (1, config.data.image_size, config.data.image_size, config.data.channels), np.float32
        )
        placement = dict(on_device=config.data.on_device, workers=config.data.workers)
        with _settings("config.batch_size"):
            train = TrainInput(dataset.train, batch_size=config.batch_size, seed=config.seed, **placement)
            evaluation = {
                split: EvalInput(source, batch_size=config.batch_size, **placement)
                for split, source in (("validation", dataset.validation), ("test", dataset.test))
            }
        preprocess, preprocess_eval = make_preprocess(config.data, dataset.mean, dataset.std)
        schedule = make_schedule(config.schedule, epochs=config.epochs, steps_per_epoch=train.steps_per_epoch)
        make_optimizer(config.optimizer, schedule)  # for its errors, which must not wait for a phase
        kernels = cf.find_kernels(model, example, train=False)
        return cls(
            config=config,
            model=model,
            kernels=kernels,
            candidates=_candidates(config, kernels),
            example=example,
            train=train,
            evaluation=evaluation,
            preprocess=preprocess,
            preprocess_eval=preprocess_eval,
            schedule=schedule,
        )

    def phase(self, plan: cf.FactorizationPlan | None = None, *, switch_step: int = 0) -> Phase:
        """The full-rank phase, or the low-rank one of ``plan``, which begins at ``switch_step``."""
        config, schedule = self.config, self.schedule
        if plan is not None and config.switch.learning_rate == "rewarmup":
            schedule = rewarmup(
                schedule, switch_step, config.schedule, steps_per_epoch=self.train.steps_per_epoch
            )
        model = self.model if plan is None else cf.factorize(self.model, plan)
        evaluate = {split: make_eval_step(model.apply, self.preprocess_eval) for split in self.evaluation}
        train_step = make_train_step(
            self.preprocess, label_smoothing=config.loss.label_smoothing, ema=config.optimizer.ema
        )
        tx = make_optimizer(config.optimizer, schedule, plan=plan)
        return Phase(model, plan, schedule, tx, train_step, evaluate)

    def create_state(self, phase: Phase) -> TrainState:
        """A state at random initialisation."""
        # Run once: optimising the program would take longer than it saves.
        init = jax.jit(lambda: self._create_state(phase)).lower()
        return init.compile(compiler_options={"xla_backend_optimization_level": "0"})()

    def abstract_state(self, phase: Phase) -> TrainState:
        """The shapes and dtypes of a state."""
        return jax.eval_shape(lambda: self._create_state(phase))

    def _create_state(self, phase: Phase) -> TrainState:
        config = self.config
        return create_state(
            phase.model, phase.tx, self.example, seed=config.seed, ema=bool(config.optimizer.ema)
        )

    def count_flops(self, phase: Phase) -> int:
        """Forward FLOPs of a phase's network for one example."""
        variables = self.abstract_state(phase).eval_variables
        return cf.count_flops(lambda v, x: phase.model.apply(v, x, train=False), variables, self.example)


def _candidates(config: Config, kernels: cf.Kernels) -> tuple[str, ...]:
    """The layers that the rules do not keep, found before training: a typo must not show at the switch."""
    lowest = {path: np.zeros(kernel.stack_shape) for path, kernel in kernels.items()}
    ranks = plan_from_config(config, kernels, lowest, lowest).ranks
    if not ranks and config.method != "full_rank":
        raise ConfigError("config.plan keeps every layer full-rank: there is nothing to switch")
    return tuple(ranks) or tuple(kernels)


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
      train_step: see :func:`make_train_step`.
      eval_steps: one for each split, see :func:`make_eval_step`.
    """

    model: nn.Module
    plan: cf.FactorizationPlan | None
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    train_step: Compiled
    eval_steps: dict[str, Compiled]

    @property
    def name(self) -> str:
        """``"full_rank"`` or ``"low_rank"``."""
        return "full_rank" if self.plan is None else "low_rank"

    @property
    def compile_seconds(self) -> float:
        """How long the phase's steps took to compile."""
        steps = (self.train_step, *self.eval_steps.values())
        return sum(step.compile_seconds for step in steps)
