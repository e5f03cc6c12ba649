"""Learning rates as published, the optimizer as PyTorch's, decay where it belongs."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from cuttlefish_jax.errors import ConfigError
from cuttlefish_jax.factorize import factorize_params, merge_params
from cuttlefish_jax.kernels import find_kernels
from cuttlefish_jax.plan.plan import FactorizationPlan
from cuttlefish_jax.switch import carry_opt_state
from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.losses import cross_entropy
from cuttlefish_jax.training.recipe import make_optimizer
from cuttlefish_jax.training.schedule import after_switch, make_schedule


def schedule_config(**changes):
    config = default_config().schedule
    config.update(changes)
    return config


def optimizer_config(**changes):
    config = default_config().optimizer
    config.update({"precondition": False} | changes)  # what a test is not of, its chain is without
    return config


def switch_config(**changes):
    config = default_config().switch
    config.update(changes)
    return config


def rewarmup(schedule, switch_step, config, *, steps_per_epoch):
    settings = switch_config(learning_rate="rewarmup")
    return after_switch(schedule, switch_step, config, settings, epochs=300, steps_per_epoch=steps_per_epoch)


def cifar():
    return schedule_config(peak=0.8, warmup_epochs=5, warmup_start=0.1)


def test_the_published_cifar_rates():
    schedule = make_schedule(cifar(), epochs=300, steps_per_epoch=10)
    expected = [0.1, 0.24, 0.38, 0.52, 0.66, 0.8] + [0.8] * 144 + [0.08] * 75 + [0.008] * 75
    first, last = (jax.vmap(schedule)(jnp.arange(300) * 10 + offset) for offset in (0, 9))
    np.testing.assert_allclose(first, expected, rtol=1e-6)
    np.testing.assert_array_equal(first, last)
    np.testing.assert_allclose(jax.jit(schedule)(1500), 0.08, rtol=1e-6)
    np.testing.assert_allclose(schedule(10**6), 0.008, rtol=1e-6)


def test_the_published_imagenet_rates():
    config = schedule_config(milestones=(1 / 3, 2 / 3, 8 / 9))
    schedule = make_schedule(config, epochs=90, steps_per_epoch=1)
    rates = [float(schedule(epoch)) for epoch in (0, 29, 30, 59, 60, 79, 80, 89)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4], rtol=1e-5)


def test_a_run_of_one_epoch_trains_at_the_peak():
    schedule = make_schedule(schedule_config(), epochs=1, steps_per_epoch=5)
    np.testing.assert_allclose([schedule(step) for step in range(5)], 0.1, rtol=1e-6)


def test_cosine_goes_step_by_step_from_start_over_peak_to_final():
    config = schedule_config(name="cosine", peak=1e-3, warmup_epochs=5, warmup_start=1e-6, final=1e-5)
    schedule = make_schedule(config, epochs=300, steps_per_epoch=4)
    rates = jax.vmap(schedule)(jnp.arange(1201))
    assert np.all(np.diff(rates[:21]) > 0) and np.all(np.diff(rates[20:]) < 0)
    half = 1e-5 + (1e-3 - 1e-5) / 2
    np.testing.assert_allclose(rates[np.array([0, 20, 610, 1200])], [1e-6, 1e-3, half, 1e-5], rtol=1e-4)


@pytest.mark.parametrize("warmup", [0, 2])
def test_constant_stays(warmup):
    config = schedule_config(name="constant", warmup_epochs=warmup)
    schedule = make_schedule(config, epochs=9, steps_per_epoch=2)
    assert float(schedule(0)) == pytest.approx(0.0 if warmup else 0.1)
    np.testing.assert_allclose([schedule(step) for step in (4, 10, 17)], 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="step"), r"schedule.name = 'step': it must be one of steps, cosine, linear, constant"),
        (dict(peak=-0.1), "schedule.peak = -0.1: it must be above 0"),
        (dict(peak=float("nan")), "schedule.peak = nan"),
        (dict(warmup_start=-1.0), "schedule.warmup_start"),
        (dict(warmup_epochs=10.0), "schedule.warmup_epochs = 10.0: it must be .* less than epochs = 10"),
        (dict(warmup_epochs=-1.0), "schedule.warmup_epochs"),
        (dict(milestones=(0.5, 30)), r"schedule.milestones = \(0.5, 30\): it must be shares of the run"),
        (dict(milestones=(0.0,)), "schedule.milestones"),
        (dict(decay=0.0), "schedule.decay"),
        (dict(final=-1e-3), "schedule.final"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(schedule_config(**changes), epochs=10, steps_per_epoch=1)


@pytest.mark.parametrize(("epochs", "steps"), [(0, 1), (-1, 1), (1, 0)])
def test_runs_of_no_length_are_refused(epochs, steps):
    with pytest.raises(ConfigError, match="must be 1 or more"):
        make_schedule(schedule_config(), epochs=epochs, steps_per_epoch=steps)


def test_the_rate_warms_up_again_after_the_switch():
    schedule = make_schedule(cifar(), epochs=300, steps_per_epoch=10)
    again = rewarmup(schedule, 800, cifar(), steps_per_epoch=10)
    before, after = jnp.arange(800), jnp.arange(850, 3000)
    np.testing.assert_array_equal(jax.vmap(again)(before), jax.vmap(schedule)(before))
    np.testing.assert_array_equal(jax.vmap(again)(after), jax.vmap(schedule)(after))
    warm = jax.jit(jax.vmap(again))(800 + jnp.arange(6) * 10)
    np.testing.assert_allclose(warm, [0.1, 0.24, 0.38, 0.52, 0.66, 0.8], rtol=1e-6)
    assert float(again(809)) == float(again(800))


def test_the_second_warmup_starts_at_its_start_in_any_phase():
    schedule = make_schedule(cifar(), epochs=300, steps_per_epoch=1)
    again = rewarmup(schedule, 148, cifar(), steps_per_epoch=1)
    # The milestone at 150 falls into the warm-up, whose end moves with it.
    expected = [0.1, 0.24, 0.1 - 0.02 * 0.4, 0.1 - 0.02 * 0.6, 0.1 - 0.02 * 0.8, 0.08]
    np.testing.assert_allclose([again(148 + k) for k in range(6)], expected, rtol=1e-5)


def test_the_second_warmup_of_a_cosine_goes_step_by_step():
    config = schedule_config(name="cosine", warmup_epochs=1)
    schedule = make_schedule(config, epochs=10, steps_per_epoch=4)
    again = rewarmup(schedule, 20, config, steps_per_epoch=4)
    expected = [float(schedule(20 + k)) * k / 4 for k in range(5)]
    np.testing.assert_allclose([again(20 + k) for k in range(5)], expected, rtol=1e-5, atol=1e-9)


def test_without_warmup_nothing_changes_at_the_switch():
    schedule = make_schedule(schedule_config(), epochs=10, steps_per_epoch=1)
    assert rewarmup(schedule, 5, schedule_config(), steps_per_epoch=1) is schedule


@pytest.mark.parametrize(("name", "milestones"), [("cosine", ()), ("steps", (0.5,)), ("linear", ())])
def test_the_schedule_starts_again_from_its_peak_in_what_is_left(name, milestones):
    config = schedule_config(name=name, milestones=milestones, warmup_epochs=2, final=0.01)
    schedule = make_schedule(config, epochs=10, steps_per_epoch=4)
    settings = switch_config(learning_rate="restart", learning_rate_factor=0.5)
    again = after_switch(schedule, 24, config, settings, epochs=10, steps_per_epoch=4)
    before = jnp.arange(24)
    np.testing.assert_array_equal(jax.vmap(again)(before), jax.vmap(schedule)(before))
    config.warmup_epochs = 0.0
    left = make_schedule(config, epochs=4, steps_per_epoch=4)
    expected = 0.5 * np.asarray(jax.vmap(left)(jnp.arange(16)))
    np.testing.assert_allclose(jax.jit(jax.vmap(again))(24 + jnp.arange(16)), expected, rtol=1e-6)
    np.testing.assert_allclose(again(24), 0.05, rtol=1e-6)


def test_the_rate_goes_on_times_a_factor():
    schedule = make_schedule(schedule_config(name="linear"), epochs=10, steps_per_epoch=1)
    np.testing.assert_allclose(schedule(5), 0.05, rtol=1e-6)
    settings = switch_config(learning_rate_factor=2.0)
    twice = after_switch(schedule, 5, schedule_config(), settings, epochs=10, steps_per_epoch=1)
    np.testing.assert_allclose([twice(4), twice(5), twice(9)], [0.06, 0.1, 0.02], rtol=1e-5)


def steps_of(tx, params, gradients):
    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_of_pytorch(nesterov):
    """Against torch.optim.SGD's update rule, written out, with a rate that changes on the way."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 4))
    gradients = rng.normal(size=(5, 3, 4))
    rates, momentum, decay = [0.1, 0.1, 0.5, 0.5, 0.01], 0.9, 0.05
    weight, buffer = start.copy(), None
    for gradient, rate in zip(gradients, rates, strict=True):
        gradient = gradient + decay * weight
        buffer = gradient if buffer is None else momentum * buffer + gradient
        weight = weight - rate * (gradient + momentum * buffer if nesterov else buffer)
    config = optimizer_config(momentum=momentum, nesterov=nesterov, weight_decay=decay)
    tx = make_optimizer(config, lambda count: jnp.asarray(rates)[count])
    params = steps_of(tx, {"kernel": jnp.asarray(start)}, [{"kernel": jnp.asarray(g)} for g in gradients])
    np.testing.assert_allclose(params["kernel"], weight, rtol=1e-5, atol=1e-6)


def test_adamw_is_that_of_optax():
    config = optimizer_config(name="adamw", weight_decay=0.05, b1=0.8, b2=0.99)
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4)))}
    gradients = [{"kernel": jnp.asarray(rng.normal(size=(3, 4)))} for _ in range(5)]
    expected = steps_of(optax.adamw(0.1, b1=0.8, b2=0.99, weight_decay=0.05), params, gradients)
    actual = steps_of(make_optimizer(config, optax.constant_schedule(0.1)), params, gradients)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    config = optimizer_config(clip_norm=1.0, weight_decay=0.0, momentum=0.0)
    gradient = {"a": {"kernel": jnp.full((2, 2), 30.0)}, "b": {"bias": jnp.full(4, 40.0)}}
    params = steps_of(
        make_optimizer(config, lambda _: 1.0), jax.tree.map(jnp.zeros_like, gradient), [gradient]
    )
    assert float(optax.tree.norm(params)) == pytest.approx(1.0)
    np.testing.assert_allclose(params["a"]["kernel"], -0.3, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_kernels_and_embeddings_decay(name):
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
        "scanned": {"kernel": jnp.ones((6, 4, 4)), "bias": jnp.ones((6, 4)), "scale": jnp.ones((6, 4))},
        "embed": {"embedding": jnp.ones((10, 4))},
        "cls_token": jnp.ones((1, 1, 4)),
        "kernel": jnp.ones(4),
    }
    tx = make_optimizer(optimizer_config(name=name, weight_decay=0.5), lambda _: 1.0)
    moved = steps_of(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    paths = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, x in
             jax.tree_util.tree_leaves_with_path(moved) if np.any(x != 1)]  # fmt: skip
    assert paths == ["conv/kernel", "embed/embedding", "scanned/kernel"]


class TwoLayers(nn.Module):
    """A model with one layer to factorize and one to keep."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="head")(nn.Dense(8, name="body")(x))


@pytest.fixture(scope="module")
def low_rank():
    model, x = TwoLayers(), jnp.ones((1, 8))
    plan = FactorizationPlan.from_ranks(find_kernels(model, x), {"body": 2})
    params = model.init(jax.random.key(0), x)["params"]
    return plan, params, factorize_params(params, plan)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_factors_have_the_decay_of_their_product_in_place_of_their_own(low_rank, name):
    plan, _, params = low_rank
    config = optimizer_config(name=name, weight_decay=0.5, frobenius_decay=0.25)
    moved = steps_of(
        make_optimizer(config, lambda _: 1.0, plan=plan), params, [jax.tree.map(jnp.zeros_like, params)]
    )
    u, v = (params["body"][factor]["kernel"] for factor in "uv")
    np.testing.assert_allclose(moved["body"]["u"]["kernel"], u - 0.25 * u @ (v @ v.T), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved["body"]["v"]["kernel"], v - 0.25 * (u.T @ u) @ v, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moved["head"]["kernel"], 0.5 * params["head"]["kernel"], rtol=1e-5)


def test_without_frobenius_decay_the_factors_decay_like_kernels(low_rank):
    plan, _, params = low_rank
    tx = make_optimizer(optimizer_config(weight_decay=0.5), lambda _: 1.0, plan=plan)
    moved = steps_of(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    for factor in "uv":
        np.testing.assert_allclose(
            moved["body"][factor]["kernel"], 0.5 * params["body"][factor]["kernel"], rtol=1e-5
        )


def test_preconditioned_sgd_moves_the_product_as_it_would_the_kernel(low_rank):
    plan, _, params = low_rank
    tx = make_optimizer(optimizer_config(weight_decay=0.5, precondition=True), lambda _: 1e-3, plan=plan)
    moved = steps_of(tx, params, [jax.tree.map(jnp.zeros_like, params)])
    before, after = (merge_params(tree, plan)["body"]["kernel"] for tree in (params, moved))
    np.testing.assert_allclose(after - before, -0.5e-3 * before, rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(moved["head"]["kernel"], (1 - 0.5e-3) * params["head"]["kernel"], rtol=1e-5)


def test_preconditioned_adamw_moves_the_product_by_the_norm_of_its_updates(low_rank):
    plan, _, params = low_rank
    config = optimizer_config(name="adamw", weight_decay=0.0, precondition=True)
    gradient = jax.tree.map(jnp.zeros_like, params)
    gradient["body"]["u"]["kernel"] = params["body"]["u"]["kernel"] ** 3  # Adam makes its entries ones
    moved = steps_of(make_optimizer(config, lambda _: 1e-3, plan=plan), params, [gradient])
    change = merge_params(moved, plan)["body"]["kernel"] - merge_params(params, plan)["body"]["kernel"]
    np.testing.assert_allclose(jnp.linalg.norm(change), 1e-3 * np.sqrt(8 * 2), rtol=2e-3)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_state_has_one_structure_on_both_sides_of_the_switch(low_rank, name, clip):
    plan, full, _ = low_rank
    config = optimizer_config(name=name, frobenius_decay=1e-4, clip_norm=clip, precondition=bool(clip))
    before = make_optimizer(config, optax.constant_schedule(0.1)).init(full)
    after = make_optimizer(config, optax.constant_schedule(0.1), plan=plan).init(full)
    assert jax.tree.structure(before) == jax.tree.structure(after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="lion"), "optimizer.name = 'lion': it must be one of sgd, adamw"),
        (dict(momentum=1.0), "optimizer.momentum = 1.0: it must be 0 or more, and below 1"),
        (dict(b2=-0.1), "optimizer.b2"),
        (dict(weight_decay=-1e-4), "optimizer.weight_decay = -0.0001: it must be 0 or more"),
        (dict(frobenius_decay=-1e-4), "optimizer.frobenius_decay"),
        (dict(clip_norm=float("inf")), "optimizer.clip_norm = inf"),
    ],
)
def test_optimizers_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(optimizer_config(**changes), optax.constant_schedule(0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_its_definition(smoothing):
    logits, labels = np.random.default_rng(0).normal(size=(4, 5)), np.array([0, 4, 2, 2])
    targets = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    expected = -(targets * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)
    actual = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_cross_entropy_of_half_precision_is_computed_in_float32():
    logits = jnp.asarray([[300.0, 0.0]], jnp.bfloat16)
    loss = cross_entropy(logits, jnp.asarray([1]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 300.0)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing"):
        cross_entropy(jnp.ones((1, 2)), jnp.asarray([0]), label_smoothing=smoothing)


def test_frozen_kernels_stay_and_have_no_state_and_no_part_in_clipping():
    params = {
        "ffn": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        "query": {"kernel": jnp.ones((4, 4))},
    }
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 1e6), params)
    gradients["query"]["kernel"] = jnp.full((4, 4), 0.5)
    gradients["ffn"]["bias"] = jnp.zeros(4)
    config = optimizer_config(freeze=("ffn",), clip_norm=1.0, momentum=0.5, weight_decay=0.1)
    tx = make_optimizer(config, optax.constant_schedule(1.0))
    state = tx.init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 16 + 4
    updates, _ = jax.jit(tx.update)(gradients, state, params)
    np.testing.assert_array_equal(updates["ffn"]["kernel"], 0)
    # The norm of the trained gradients is 2, so they are halved; the decay is on the kernel alone.
    np.testing.assert_allclose(updates["query"]["kernel"], -(0.25 + 0.1), rtol=1e-6)
    np.testing.assert_allclose(updates["ffn"]["bias"], 0, atol=1e-7)


def test_a_frozen_state_goes_through_the_switch():
    model = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.Dense(8)])
    x = jnp.ones((1, 8))
    params = model.init(jax.random.key(0), x)["params"]
    config = optimizer_config(freeze=("layers_0",))
    plan = FactorizationPlan.from_ranks(find_kernels(model, x), {"layers_1": 2})
    schedule = optax.constant_schedule(0.1)
    tx, tx_low = make_optimizer(config, schedule), make_optimizer(config, schedule, plan=plan)
    _, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    low = factorize_params(params, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        carried = carry_opt_state(state, params, low, tx_low, plan)
    chex.assert_trees_all_equal_shapes_and_dtypes(carried, tx_low.init(low))
    momentum = carried.inner_states["trained"].inner_state[3].trace
    u, v = (np.asarray(low["layers_1"][name]["kernel"], np.float64) for name in "uv")
    gradient = 1 + 1e-4 * np.asarray(params["layers_1"]["kernel"], np.float64)  # with the weight decay
    np.testing.assert_allclose(momentum["layers_1"]["u"]["kernel"], gradient @ v.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(momentum["layers_1"]["v"]["kernel"], u.T @ gradient, rtol=1e-4, atol=1e-5)


def test_a_pattern_that_freezes_nothing_is_refused():
    tx = make_optimizer(optimizer_config(freeze=("fnn",)), optax.constant_schedule(0.1))
    with pytest.raises(ConfigError, match="freeze: 'fnn' matches no layer with a kernel"):
        tx.init({"ffn": {"kernel": jnp.ones((2, 2))}})


def test_cross_entropy_of_a_distribution_is_the_mean_over_its_classes():
    logits = jnp.array([[1.0, -2.0, 0.5]])
    mixed = jnp.array([[0.7, 0.0, 0.3]])
    for smoothing in (0.0, 0.1):
        single = [
            float(cross_entropy(logits, jnp.array([k]), label_smoothing=smoothing)[0]) for k in range(3)
        ]
        np.testing.assert_allclose(
            cross_entropy(logits, mixed, label_smoothing=smoothing)[0],
            0.7 * single[0] + 0.3 * single[2],
            rtol=1e-6,
        )
