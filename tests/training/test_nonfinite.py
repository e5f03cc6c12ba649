"""Steps whose loss or gradients are not finite: found, and left out if that is wanted."""

import dataclasses
import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cuttlefish_jax as cf
from cuttlefish_jax.errors import DivergedError
from cuttlefish_jax.training.data import ArraySource, TrainInput
from cuttlefish_jax.training.epoch import EpochTotals, train_epoch
from cuttlefish_jax.training.nonfinite import finite_or_none
from cuttlefish_jax.training.parallelism import DataParallel, FullySharded
from cuttlefish_jax.training.progress import Progress
from cuttlefish_jax.training.rank_meter import RankMeter
from cuttlefish_jax.training.state import create_state
from cuttlefish_jax.training.step import make_train_step
from cuttlefish_jax.training.tasks import Task

NUM, BATCH = 64, 16
# What is wrong with some of one example's features: the loss is NaN; the loss is finite and its gradient is
# not (the root of nothing); both are finite, and the square of the gradient, in Adam's second moment, is not;
# all these are, and the running variance is not.
FAULTS = {
    "loss": (slice(None), np.nan),
    "gradient": (slice(None), 0.0),
    "second moment": (slice(1, None), 1e22),
    "statistics": (0, 1e12),
}


class Net(nn.Module):
    """A layer, and a batch norm whose statistics move though nothing comes of it."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(256, use_bias=False)(x)
        seen = jnp.concatenate([1e-4 * y, 1e10 * x[:, :1]], axis=-1)
        nn.BatchNorm(use_running_average=not train, use_scale=False, use_bias=False)(seen)
        return y


def source(fault):
    features = np.random.default_rng(0).normal(size=(NUM, 5)).astype(np.float32)
    columns, value = FAULTS[fault]
    features[NUM // 2, columns] = value
    return ArraySource({"features": features, "label": np.zeros(NUM, np.int32)})


def make_task(source):
    return Task(
        num_outputs=256,
        inputs=(jax.ShapeDtypeStruct((1, 5), jnp.float32),),
        train=source,
        evaluation={},
        train_inputs=lambda key, examples: ((examples["features"],), examples["label"]),
        eval_inputs=lambda examples: (examples["features"],),
        train_loss=lambda outputs, _: jnp.sum(jnp.abs(outputs) + jnp.sqrt(jnp.abs(outputs)), axis=-1),
        eval_loss=lambda outputs, _: jnp.sum(outputs, axis=-1),
        predict=lambda outputs: jnp.argmax(outputs, axis=-1),
        metrics=("accuracy",),
    )


def setup(fault, *, skip, parallelism="pmap", **options):
    """The step, a state with all that a step changes, and the data: four batches, one of them bad."""
    examples = source(fault)
    task = make_task(examples)
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda step: 0.1 / (1 + step)))
    state = create_state(Net(), tx, task.inputs, seed=0, ema=True)
    layout = DataParallel()
    if parallelism == "fsdp":
        layout = FullySharded.of(state.params, cf.find_kernels(Net(), *task.inputs))
    step = make_train_step(task, layout, ema=0.9, skip_nonfinite=skip, **options)
    return step, layout.place(state), TrainInput(examples, batch_size=BATCH, seed=0, on_device=True)


def is_bad(batch):
    return NUM // 2 in np.asarray(batch["index"])


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("loss", {}),
        ("loss", {"accumulation_steps": 2}),
        ("loss", {"parallelism": "fsdp"}),
        ("gradient", {}),
        ("second moment", {"parallelism": "fsdp"}),
        ("statistics", {}),
    ],
)
def test_a_skipped_step_changes_nothing_but_its_number_and_the_schedule(fault, options):
    step, state, data = setup(fault, skip=True, **options)
    seen = []
    for number, batch in enumerate(data.epoch(0), 1):
        before = jax.device_get(state.replace(key=None))
        state, metrics = step(state, data.resident, batch)
        after = jax.device_get(state.replace(key=None))
        seen.append(bool(metrics["nonfinite"]))
        assert seen[-1] == is_bad(batch)
        adam, schedule = after.opt_state
        assert (after.step, schedule.count) == (number, number)
        assert adam.count == number - sum(seen)
        parts_of = [(s.params, s.ema_params, s.opt_state[0], s.batch_stats) for s in (before, after)]
        for old, new in zip(*map(jax.tree.leaves, parts_of), strict=True):
            assert np.all(np.isfinite(new))
            assert np.array_equal(old, new) == seen[-1]
    assert sum(seen) == 1 and not seen[-1]


@pytest.mark.parametrize(
    ("fault", "what"),
    [("loss", "the loss is nan"), *((fault, "a gradient") for fault in list(FAULTS)[1:])],
)
def test_an_epoch_with_a_bad_step_stops(fault, what):
    step, state, data = setup(fault, skip=False)
    bad = [is_bad(batch) for batch in data.epoch(0)].index(True)
    with pytest.raises(
        DivergedError, match=f"^{what}.* at step {bad} of epoch 0 .* last checkpoint"
    ) as error:
        train_epoch(step, state, data, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pause", [0, 1, 3], ids=["in one go", "in 1 and 3 steps", "in 3 and 1 steps"])
def test_an_epoch_skips_a_bad_step_and_says_so_once(pause):
    step, state, data = setup("loss", skip=True)
    losses = []
    for batch in data.epoch(0):
        state, metrics = step(state, data.resident, batch)
        losses += [] if metrics["nonfinite"] else [float(metrics["loss"])]
    assert len(losses) == 3

    step, again, data = setup("loss", skip=True)
    totals = EpochTotals()
    with pytest.warns(UserWarning, match=r"^1 of 4 steps of epoch 0 were skipped: their loss or") as said:
        for pauses in [lambda steps: steps == pause] * (2 if pause else 1):
            # By way of the JSON of a checkpoint.
            totals = EpochTotals(**json.loads(json.dumps(dataclasses.asdict(totals))))
            totals = dataclasses.replace(totals, seconds=totals.seconds + 1000)
            again, totals = train_epoch(step, again, data, 0, so_far=totals, max_skipped=1, pauses=pauses)
    assert len(said) == 1
    assert totals.means.items() >= {"train_loss": sum(losses) / 3, "train_skipped_steps": 1}.items()
    assert totals.steps == 4 and totals.seconds > (2000 if pause else 1000)
    chex.assert_trees_all_equal(state.params, again.params)


def test_too_many_skipped_steps_stop_the_run():
    step, state, data = setup("loss", skip=True)
    # From here on no step is good, though the loss is: the statistics stay NaN.
    state = state.replace(batch_stats=jax.tree.map(lambda x: x * np.nan, state.batch_stats))
    poison = jax.tree.map(jnp.copy, state)
    with pytest.raises(
        DivergedError,
        match=r"^a gradient, or what came of it, .* at step 2 of epoch 1 .*, and 2 steps before",
    ):
        train_epoch(step, state, data, 1, max_skipped=2)
    with pytest.raises(
        DivergedError, match=r"^all 4 steps of epoch 1 went bad and were skipped: lower"
    ) as error:
        train_epoch(step, poison, data, 1, max_skipped=9)
    assert "\n" not in str(error.value)


def test_totals_count_rows_of_skipped_steps():
    totals, rows = EpochTotals(), []
    for is_good in (False, False, True, False):
        totals = totals.add({"loss": 2.0}) if is_good else totals.skip()
        rows.append(totals.skipped_in_a_row)
    assert rows == [1, 2, 0, 1]
    assert (totals.steps, totals.skipped, totals.means["train_loss"]) == (4, 3, 2.0)


def test_a_stable_rank_that_is_not_finite_names_the_layer():
    kernels = cf.find_kernels(Net(), jnp.ones((1, 5)))
    _, state, _ = setup("loss", skip=False)
    state = state.replace(params=jax.tree.map(lambda x: x.at[0, 0].set(jnp.inf), state.params))
    meter = RankMeter(kernels, "exact")
    meter.start(state)
    with pytest.raises(DivergedError, match=r"^the stable rank of 'Dense_0' is nan: its kernel has a NaN, "):
        meter.read()


def test_an_evaluation_that_is_not_finite_is_null_and_never_the_best():
    with pytest.warns(UserWarning, match="^the test split has loss inf: written as null$"):
        found = finite_or_none({"loss": np.inf, "accuracy": 0.5}, "test")
    assert found == {"loss": None, "accuracy": 0.5}
    progress = Progress(cf.RankTracker())

    def line(score, loss):
        return {"validation_accuracy": score, "validation_loss": loss}

    ascending = [line(None, None), line(0.5, None), line(0.5, 9.0), line(0.5, 2.0), line(0.6, None)]
    for index, best in enumerate(ascending):
        progress.best = best
        verdicts = [progress.is_better(other, "accuracy") for other in ascending]
        assert verdicts == [place > index for place in range(len(ascending))]
