"""A whole run: full-rank epochs, the switch, low-rank epochs, and what is left of them in the workdir."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from typing import Any

import jax
import numpy as np

import cuttlefish_jax as cf
from cuttlefish_jax.training import report, resuming
from cuttlefish_jax.training.agreement import RANK_TOLERANCE, agree, agreed_outcome, first_hosts
from cuttlefish_jax.training.calibration import Calibrator
from cuttlefish_jax.training.check import check_config
from cuttlefish_jax.training.checkpoint import Checkpointer
from cuttlefish_jax.training.config import Config, default_config
from cuttlefish_jax.training.epoch import EpochTotals, evaluate_splits, train_epoch
from cuttlefish_jax.training.experiment import Experiment
from cuttlefish_jax.training.hosts import lost_hosts, say_once
from cuttlefish_jax.training.method import (
    make_method,
    needs_singular_values,
    plan_from_config,
    rank_tolerance,
)
from cuttlefish_jax.training.preemption import Notice, Preempted
from cuttlefish_jax.training.profile import get_profile
from cuttlefish_jax.training.rank_meter import RankMeter
from cuttlefish_jax.training.recalibration import recalibrate
from cuttlefish_jax.training.start import check_data, shared_workdir
from cuttlefish_jax.training.summary import draw_ranks, read_metrics, summarize
from cuttlefish_jax.training.switch_timing import next_switch, switch_is_due
from cuttlefish_jax.training.switching import Switcher, nearly_equal
from cuttlefish_jax.training.workdir import Workdir

# Settings that a run may go on with changed.
_MAY_CHANGE = ("parallelism", "checkpoint.every_epochs", "checkpoint.every_steps", "checkpoint.keep")


@lost_hosts()
def run(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains as configured, or goes on with the run that was interrupted in ``workdir``.

    Args:
      config: see :func:`cuttlefish_jax.training.config.default_config`.
      workdir: where everything is written: ``metrics.jsonl``, ``ranks.jsonl``, ``plan.json``,
        ``ranks.png``, ``checkpoints/``, ``best/``, ``summary.json``.

    Returns:
      The contents of ``summary.json``.

    Raises:
      UserError: for everything that the user can mend.
      Preempted: if the process was told to stop, when that is done.
    """
    with shared_workdir(workdir, config) as directory:
        belongs = {"ignore": _MAY_CHANGE, "defaults": default_config()}
        with agreed_outcome():
            check_config(config)
        if directory.is_finished:
            directory.check(config, **belongs)
            say_once(f"{directory.path} is finished: see summary.json there, or give another --workdir")
            return directory.read_json("summary.json") or {}
        with agreed_outcome():
            experiment = Experiment.from_config(config)
            directory.check(config, **belongs)
        check_data(experiment.task)
        with (
            Checkpointer(directory.checkpoints, keep=config.checkpoint.keep) as checkpointer,
            Checkpointer(directory.path / "best", keep=1) as best,
            lost_hosts(),
        ):
            started = _Run(experiment, directory, checkpointer, best)
            with started.notice:
                return started.to_the_end()


class _Run:
    """The changing parts of a run, and what an epoch does to them."""

    def __init__(
        self,
        experiment: Experiment,
        directory: Workdir,
        checkpointer: Checkpointer,
        best: Checkpointer,
    ):
        self.experiment = experiment
        self.config = experiment.config
        self.directory = directory
        self.checkpointer = checkpointer
        self.best = best
        self.notice = Notice()
        self.rank_seconds = 0.0
        self.meter = RankMeter(experiment.kernels, self.config.ranks.method)
        logged = len(directory.read_log("metrics.jsonl"))
        start = resuming.start(experiment, checkpointer, self.meter, epochs_logged=logged)
        self.progress, self.phase, self.state = start.progress, start.phase, start.state
        self.saved = start.place if start.is_resumed else None
        if start.is_resumed:
            say_once(f"going on {self._place()} ({self.phase.name})")
            resuming.mend_best(best, self.progress, self.state)
        self._profile()
        # What was written after the checkpoint will be written again.
        directory.rewind_log("metrics.jsonl", epoch=self.progress.epoch)
        directory.rewind_log(
            "ranks.jsonl", epoch=self.progress.epoch + start.is_resumed, last=self.progress.switch_epoch
        )
        self._measure_first(start.is_resumed)
        self.calibrator = self._calibrator()
        self.switcher = Switcher(self.experiment, self.calibrator)
        if self.directory.read_json("config.json") is None:
            self.directory.claim(self.config)  # not before: until here settings can turn out to be wrong
        self.first_epoch, self.started = self.progress.epoch, time.perf_counter()

    def to_the_end(self) -> dict[str, Any]:
        progress, config = self.progress, self.config
        try:
            for epoch in range(progress.epoch, config.epochs):
                self.notice.stop_if_here()
                if switch_is_due(config, progress, epoch):
                    self._switch(epoch)
                    self.notice.stop_if_here()
                metrics = self._train(epoch)
                self._track(epoch + 1)
                self._look_ahead(epoch + 1)
                progress.seconds["background"] += self.switcher.background_seconds()
                self._log(epoch, metrics)
                progress.epoch, progress.totals = epoch + 1, EpochTotals()
                if self._is_due(epoch + 1, config.checkpoint.every_epochs):
                    self._save()
            return self._finish()
        except Preempted as stopped:
            self._save()
            self.checkpointer.wait()
            say_once(f"{stopped} {self._place()}: saved, and the same command goes on from there")
            raise
        finally:
            self.switcher.close()

    def _place(self) -> str:
        progress, steps = self.progress, self.experiment.train.steps_per_epoch
        within = f", {progress.totals.steps} of {steps} steps of the next" if progress.totals.steps else ""
        return f"after epoch {progress.epoch} of {self.config.epochs}{within}"

    def _is_due(self, epochs_trained: int, every_epochs: int) -> bool:
        """Whether it is time for something that is done after every so many epochs, and after the last."""
        return epochs_trained % every_epochs == 0 or epochs_trained == self.config.epochs

    def _measure_first(self, is_resumed: bool) -> None:
        """The ranks of a new network; and their measurement compiled, not to be behind an epoch's steps."""
        if self.phase.plan is not None:
            return
        start = time.perf_counter()
        self.meter.start(self.state)
        self.progress.seconds["compile"] += time.perf_counter() - start
        self.meter.wait()
        if not is_resumed:
            self.meter.start(self.state)
            self.rank_seconds = self.meter.wait()
            self.state = self.meter.advance(self.state)
            self._track(0)

    def _profile(self) -> None:
        """Finds out which layers get faster; errors in the weights that are read do not wait for it."""
        if self.config.profile.enabled:
            start = time.perf_counter()
            profile = get_profile(self.experiment, self.directory)
            self.experiment = dataclasses.replace(self.experiment, profile=profile)
            self.progress.seconds["profile"] += time.perf_counter() - start

    def _look_ahead(self, epochs_trained: int) -> None:
        """Has the low-rank programs compiled for the ranks of today, if the switch is near."""
        progress = self.progress
        if not self.config.switch.compile_ahead or progress.plan is not None or progress.stays_full_rank:
            return
        epoch = next_switch(self.config, progress, epochs_trained)
        if epoch is None:
            return
        plan = self._plan(self._calibrate(epochs_trained) if needs_singular_values(self.config) else None)
        if not plan.ranks:
            return
        if not self._stands_for(plan):
            progress.foreseen = plan
        assert progress.foreseen is not None
        self.switcher.compile_ahead(progress.foreseen, epoch, self.phase, self.state)

    def _stands_for(self, plan: cf.FactorizationPlan) -> bool:
        """Whether the programs that were compiled ahead may be used for a plan."""
        foreseen = self.progress.foreseen
        return foreseen is not None and nearly_equal(foreseen, plan, rank_tolerance(self.config))

    def _calibrator(self) -> Calibrator | None:
        if self.phase.plan is not None or not make_method(self.config).calibration_batches:
            return None
        experiment = self.experiment
        return Calibrator(experiment.task, experiment.model, experiment.kernels, self.phase.layout)

    def _calibrate(self, epoch: int) -> dict[str, jax.Array] | None:
        """What the layers are given in the first batches of an epoch, if that is asked for."""
        if self.calibrator is None:
            return None
        batches = make_method(self.config).calibration_batches
        return self.calibrator.measure(self.state, self.experiment.train, epoch=epoch, batches=batches)

    def _plan(self, calibration: dict[str, jax.Array] | None) -> cf.FactorizationPlan:
        """The plan for the ranks as they are now."""
        plan = plan_from_config(
            self.config,
            self.experiment.kernels,
            self.progress.ranks_t,
            self.progress.ranks_0,
            singular_values=first_hosts(self.meter.singular_values(self.state, calibration))
            if needs_singular_values(self.config)
            else None,
            profile=self.experiment.profile,
        )
        agree("the plan", json.loads(plan.to_json()))
        return plan

    def _switch(self, epoch: int) -> None:
        """Makes the plan, rewrites the state, and goes on with the steps of the low-rank phase."""
        start = time.perf_counter()
        progress, experiment = self.progress, self.experiment
        calibration = self._calibrate(epoch) if needs_singular_values(self.config) else None
        plan = self._plan(calibration)
        if self._stands_for(plan):
            assert progress.foreseen is not None
            plan = progress.foreseen
        say_once(f"\nSwitching to low rank at epoch {epoch}:\n{plan.report()}\n")
        if not plan.ranks:
            progress.stays_full_rank = True
            warnings.warn("no layer would get smaller: staying full-rank to the end", stacklevel=2)
            return
        low, was_ahead = self.switcher.get(plan, epoch, self.phase, self.state)
        # Not before: the measurement is compiled along with the phase.
        calibration = self._calibrate(epoch) if calibration is None else calibration
        # With the last reference to it, the full-rank state is freed.
        self.phase, self.state = low.phase, low.convert(self.state, calibration)
        calibration = None
        self.state = recalibrate(
            experiment.task,
            self.state,
            experiment.train,
            low.phase.layout,
            epoch=epoch,
            batches=self.config.switch.recalibration_batches,
        )
        jax.block_until_ready(self.state)
        progress.plan, progress.foreseen, progress.switch_epoch = plan, None, epoch
        # The full-rank network is not a candidate for the best low-rank one.
        progress.best = None
        self.directory.write_json("plan.json", json.loads(plan.to_json()))
        stall = time.perf_counter() - start
        progress.seconds["stall"] += stall
        waited = 0.0 if was_ahead else low.seconds
        progress.seconds["compile"] += waited
        progress.seconds["switch"] += stall - waited

    def _train(self, epoch: int) -> dict[str, Any]:
        """Trains for an epoch and evaluates; the epoch's line of ``metrics.jsonl``."""
        progress, phase, config = self.progress, self.phase, self.config
        self._take_steps(epoch)
        # The last step is done, and the measurement follows it.
        self.rank_seconds = 0.0 if phase.plan else self.meter.wait()
        totals = progress.totals
        rate = np.asarray(phase.schedule(epoch * totals.steps)).item()
        metrics: dict[str, Any] = {"epoch": epoch, "phase": phase.name, "learning_rate": rate}
        metrics |= {**totals.means, "seconds": totals.seconds}
        is_evaluated = self._is_due(epoch + 1, config.evaluation.every_epochs)
        compiled_before = phase.eval_step.compile_seconds
        metrics |= evaluate_splits(
            phase.eval_step,
            self.state.eval_variables if is_evaluated else None,
            self.experiment.evaluation,
            self.experiment.task.metrics,
            on_batch=self.notice.stop_if_here,
        )
        progress.seconds["compile"] += phase.eval_step.compile_seconds - compiled_before
        # Nothing stops the run from here to the end of the epoch, so that all of this happens once.
        examples = totals.steps * config.batch_size
        metrics["examples_per_second"] = examples / totals.seconds
        progress.seconds[phase.name] += totals.seconds
        progress.examples[phase.name] += examples
        if phase.plan is None:
            self.state = self.meter.advance(self.state)
        if is_evaluated and progress.is_better(metrics, self.experiment.task.score):
            progress.best = {
                name: metrics[name] for name in metrics if name.startswith(("epoch", "valid", "test"))
            }
            self.best.save(epoch, self.state.eval_variables, progress.to_record())
        return metrics

    def _take_steps(self, epoch: int) -> None:
        """The steps of an epoch that are left; in between, a notice stops the run, or checkpoints are due."""
        progress, train_step, data = self.progress, self.phase.train_step, self.experiment.train
        every = self.config.checkpoint.every_steps
        description = f"epoch {epoch + 1}/{self.config.epochs}"
        measure = {} if self.phase.plan else {"at_end": self.meter.start}

        def pauses(steps: int) -> bool:
            return self.notice.is_here() or (every > 0 and steps % every == 0)

        with report.epoch_bar(data.steps_per_epoch, description=description) as advance:
            advance(progress.totals.steps)
            while True:
                compiled_before = train_step.compile_seconds
                self.state, progress.totals = train_epoch(
                    train_step,
                    self.state,
                    data,
                    epoch,
                    so_far=progress.totals,
                    max_skipped=self.config.max_skipped_steps if self.config.nonfinite == "skip" else 0,
                    pauses=pauses,
                    on_step=advance,
                    **measure,
                )
                progress.seconds["compile"] += train_step.compile_seconds - compiled_before
                progress.measure_memory(self.phase.name, self.phase.memory(self.state))
                if progress.totals.steps == data.steps_per_epoch:
                    return
                self.notice.stop_if_here()
                self._save()

    def _track(self, epochs_trained: int) -> None:
        """Tells the tracker the stable ranks after so many epochs; until the switch."""
        if self.phase.plan is not None:
            return
        ranks = agree("the stable ranks", self.meter.read(), tolerance=RANK_TOLERANCE)
        self.progress.seconds["rank"] += self.rank_seconds
        if not self.progress.stays_full_rank:
            self.progress.tracker.update({path: ranks[path] for path in self.experiment.candidates})
            tracker = self.progress.tracker
            agree("the verdict", {"converged": tracker.converged_at, "switch": tracker.switch_epoch})
        self.directory.append("ranks.jsonl", {"epoch": epochs_trained, **ranks})

    def _log(self, epoch: int, metrics: dict[str, Any]) -> None:
        metrics["rank_seconds"] = self.rank_seconds
        self.directory.append("metrics.jsonl", metrics)
        score = self.experiment.task.score
        shown = ("phase", "train_loss", "test_loss", "learning_rate", "examples_per_second")
        now = time.perf_counter()
        left = (now - self.started) / (epoch + 1 - self.first_epoch) * (self.config.epochs - epoch - 1)
        say_once(
            report.progress_line(
                epoch=epoch,
                epochs=self.config.epochs,
                seconds_left=left,
                test_score=metrics[f"test_{score}"],
                metric=score,
                **{name: metrics[name] for name in shown},
            )
        )

    def _save(self) -> None:
        """Saves the state between two steps, unless that was done."""
        progress = self.progress
        place = progress.epoch, progress.totals.steps, self.phase.name
        if place != self.saved:
            # Best parameters that this state does not have must not be missing beside it.
            if progress.best is not None and not progress.is_right_after(progress.best["epoch"]):
                self.best.wait()
            # A later place in an epoch replaces an earlier one.
            self.checkpointer.save(progress.epoch, self.state, progress.to_record())
            self.saved = place

    def _finish(self) -> dict[str, Any]:
        self.checkpointer.wait()
        self.best.wait()
        summary = summarize(self.experiment, self.phase, self.progress, read_metrics(self.directory))
        self.directory.write_json("summary.json", summary)
        draw_ranks(self.directory, summary, title=f"Stable ranks: {self.config.name}")
        say_once(f"\n{report.summary_table(summary)}\neverything is in {self.directory.path}")
        return summary
