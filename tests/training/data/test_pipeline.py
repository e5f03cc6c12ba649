import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cuttlefish_jax.training.config import default_config
from cuttlefish_jax.training.data import ArraySource, EvalInput, TrainInput, load_dataset, materialize

NUM, BATCH = 53, 16


@pytest.fixture(scope="module")
def source():
    """Examples that can be told apart: pixel [0, 0, 0] is the index."""
    images = np.random.default_rng(0).integers(0, 256, (NUM, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(NUM)
    return ArraySource({"image": images, "label": np.arange(NUM, dtype=np.int32) * 7 % 10})


def train_input(source, **options):
    return TrainInput(source, **{"batch_size": BATCH, "seed": 1, "on_device": True, **options})


def indices(batches):
    return [np.asarray(batch["index"]) for batch in batches]


def examples(pipeline, batches):
    step = jax.pmap(materialize, axis_name="batch", in_axes=(None, 0))
    return [jax.tree.map(np.asarray, step(pipeline.resident, batch)) for batch in batches]


def test_an_epoch_has_every_example_at_most_once_in_another_order_each_time(source):
    pipeline = train_input(source)
    epochs = [np.concatenate(indices(pipeline.epoch(e)), axis=None) for e in range(4)]
    assert pipeline.steps_per_epoch == 3
    for order in epochs:
        assert len(order) == 48
        assert len(set(order.tolist())) == 48
        assert order.min() >= 0
        assert order.max() < NUM
    for first, second in itertools.combinations(epochs, 2):
        assert not np.array_equal(first, second)
    # What is left over differs, so four epochs reach every example.
    assert set(np.concatenate(epochs).tolist()) == set(range(NUM))


def test_the_order_is_given_by_the_seed(source):
    first, same, other = (np.stack(indices(train_input(source, seed=seed).epoch(2))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    # Seeds and epochs are not interchangeable: seed 2 does not run one epoch ahead of seed 1.
    ahead = np.stack(indices(train_input(source, seed=1).epoch(3)))
    assert not np.array_equal(ahead, other)


def test_the_order_is_shuffled_well():
    """The rank correlation of positions and indices is that of random permutations."""
    images, labels = np.zeros((5000, 1, 1, 1), np.uint8), np.zeros(5000, np.int32)
    source = ArraySource({"image": images, "label": labels})
    pipeline = TrainInput(source, batch_size=1000, seed=0, on_device=True)
    for epoch in range(3):
        order = np.concatenate(indices(pipeline.epoch(epoch)), axis=None)
        # Standard deviation 1 / sqrt(5000) = 0.014.
        assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.06
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.06


@pytest.mark.parametrize("on_device", [True, False])
def test_repeated_augmentation_has_copies_of_a_part_of_the_examples(source, on_device):
    pipeline = train_input(source, repeats=3, on_device=on_device)
    assert pipeline.steps_per_epoch == 3
    seen = []
    for batch in examples(pipeline, pipeline.epoch(0)):
        np.testing.assert_array_equal(batch["image"][..., 0, 0, 0], batch["index"] % NUM)
        seen += batch["index"].ravel().tolist()
    assert len(set(seen)) == 48  # every copy has an index of its own, and with it an augmentation
    assert {i // NUM for i in seen} == {0, 1, 2}
    counts = np.bincount(np.asarray(seen) % NUM, minlength=NUM)
    assert sorted(counts[counts > 0].tolist()) == [3] * 16
    # Copies are neighbours, so that they fall to one batch.
    assert seen[0] % NUM == seen[1] % NUM == seen[2] % NUM


def test_readers_are_told_seeds_and_the_whole_batch(source):
    calls = []

    class Telling:
        def __len__(self):
            return NUM

        def read(self, indices, *, seeds=None, batch=None):
            calls.append((indices, seeds, batch))
            return source.read(indices)

    half = dict(process_index=1, process_count=2, devices=jax.local_devices()[:4], on_device=False)
    (index,) = indices([next(train_input(Telling(), seed=5, repeats=2, **half).epoch(1))])
    # Several threads read ahead, and any of them may be the first to ask.
    own, seeds, batch = next(call for call in calls if np.array_equal(call[0], index.ravel() % NUM))
    assert seeds == [(5, 1, i) for i in index.ravel().tolist()]
    assert len(batch) == BATCH
    np.testing.assert_array_equal(batch[BATCH // 2 :], own)

    calls.clear()
    next(EvalInput(Telling(), batch_size=BATCH, **half).batches())
    without_seeds = [call for call in calls if call[1] is None]
    own, _, batch = min(without_seeds, key=lambda call: call[2][0])
    np.testing.assert_array_equal(batch, np.arange(BATCH))
    np.testing.assert_array_equal(own, np.arange(BATCH // 2, BATCH))


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("on_device", [True, False])
def test_hosts_share_the_same_global_batches(source, hosts, on_device):
    per_host = jax.local_device_count() // hosts
    alone = indices(train_input(source).epoch(1))
    parts = [
        indices(
            train_input(
                source,
                on_device=on_device,
                process_index=host,
                process_count=hosts,
                devices=jax.local_devices()[host * per_host : (host + 1) * per_host],
            ).epoch(1)
        )
        for host in range(hosts)
    ]
    for step, expected in enumerate(alone):
        assert all(part[step].shape == (per_host, BATCH // hosts // per_host) for part in parts)
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), expected)


@pytest.mark.parametrize("epoch", [0, 3])
def test_both_ways_give_the_same_examples_to_the_same_step(source, epoch):
    resident, streamed = train_input(source), train_input(source, on_device=False)
    assert streamed.resident == {}
    assert set(resident.resident) == {"image", "label"}
    pairs = list(
        zip(
            examples(resident, resident.epoch(epoch)),
            examples(streamed, streamed.epoch(epoch)),
            strict=True,
        )
    )
    assert len(pairs) == 3
    for ours, theirs in pairs:
        assert set(ours) == set(theirs) == {"index", "image", "label"}
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours["image"], source.arrays["image"][ours["index"]])
        np.testing.assert_array_equal(ours["label"], source.arrays["label"][ours["index"]])


def test_records_read_from_disk_are_the_same_on_device_and_from_the_host(prepared):
    data = default_config().data
    data.update(name="fashion_mnist", data_dir=prepared, image_size=28, channels=1)
    source = load_dataset(data).train
    ways = [train_input(source, on_device=on_device) for on_device in (True, False)]
    first, second = (examples(way, way.epoch(0)) for way in ways)
    assert len(first) == 2
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("on_device", [True, False])
def test_resuming_gives_the_steps_that_were_left(source, on_device):
    whole = train_input(source, on_device=on_device)
    expected = [*indices(whole.epoch(0)), *indices(whole.epoch(1))]
    resumed = train_input(source, on_device=on_device)
    rest = [*indices(resumed.epoch(0, 2)), *indices(resumed.epoch(1))]
    np.testing.assert_array_equal(rest, expected[2:])
    assert indices(resumed.epoch(1, 3)) == []


def test_iterators_do_not_disturb_each_other(source):
    pipeline = train_input(source, on_device=False)
    expected = indices(pipeline.epoch(0))
    first, second = pipeline.epoch(0), pipeline.epoch(0)
    interleaved = [indices([next(iterator)])[0] for iterator in (first, first, second, first, second)]
    for got, step in zip(interleaved, [0, 1, 0, 2, 1], strict=True):
        np.testing.assert_array_equal(got, expected[step])
    del first, second
    np.testing.assert_array_equal(indices(pipeline.epoch(0)), expected)


def test_closed_input_opens_again(source):
    pipeline = train_input(source, on_device=False)
    expected = indices(pipeline.epoch(0))
    pipeline.close()
    pipeline.close()
    np.testing.assert_array_equal(indices(pipeline.epoch(0)), expected)


@pytest.mark.parametrize("close", [True, False])
def test_no_reader_outlives_its_input(source, close):
    def readers():
        return {thread for thread in threading.enumerate() if "prefetch" in thread.name}

    before = readers()
    pipeline = train_input(source, on_device=False)
    batches = pipeline.epoch(0)
    next(batches)
    assert readers() - before
    if close:
        pipeline.close()
    del pipeline, batches
    # grain tells its pool to stop and does not wait for it.
    deadline = time.monotonic() + 30
    while readers() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers() - before


def test_batches_are_on_the_devices_already(source):
    pipeline = train_input(source, on_device=False)
    batch = next(pipeline.epoch(0))
    for array in batch.values():
        assert isinstance(array, jax.Array)
        assert [shard.device for shard in array.addressable_shards] == jax.local_devices()
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {1}
    assert batch["image"].shape == (8, 2, 4, 4, 3)


@pytest.mark.parametrize("on_device", [True, False])
def test_steps_are_compiled_once(source, on_device):
    traces = []

    def step(resident, batch):
        traces.append(None)
        return jax.lax.psum(materialize(resident, batch)["image"].astype(jnp.float32).sum(), "batch")

    compiled = jax.pmap(step, axis_name="batch", in_axes=(None, 0), out_axes=None)
    pipeline = train_input(source, on_device=on_device)
    totals = []
    for epoch in range(2):
        for batch in pipeline.epoch(epoch):
            totals.append(
                (float(compiled(pipeline.resident, batch)), source.arrays["image"][batch["index"]].sum())
            )
    assert len(totals) == 6
    assert len(traces) == 1
    for got, expected in totals:
        assert got == expected


@pytest.mark.slow
def test_worker_processes_read_the_same_batches_in_the_same_order(source):
    expected = train_input(source, on_device=False)
    pipeline = train_input(source, on_device=False, workers=2)
    for epoch in range(2):
        for ours, theirs in zip(pipeline.epoch(epoch), expected.epoch(epoch), strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    pipeline.close()


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("num", [NUM, 48, 5])
def test_evaluation_covers_every_example_once(source, hosts, on_device, num):
    source = source.take(np.arange(num))
    per_host = jax.local_device_count() // hosts
    seen = []
    for host in range(hosts):
        pipeline = EvalInput(
            source,
            batch_size=BATCH,
            on_device=on_device,
            process_index=host,
            process_count=hosts,
            devices=jax.local_devices()[host * per_host : (host + 1) * per_host],
        )
        assert pipeline.num_steps == -(-num // BATCH)
        for _ in range(2):
            batches = list(pipeline.batches())
            assert len(batches) == pipeline.num_steps
        for batch in batches:
            assert {array.shape[:2] for array in batch.values()} == {(per_host, BATCH // hosts // per_host)}
            assert batch["weight"].dtype == jnp.float32
            weight, index = np.asarray(batch["weight"]), np.asarray(batch["index"])
            assert set(weight.ravel().tolist()) <= {0.0, 1.0}
            seen += index[weight == 1].tolist()
            if not on_device:
                np.testing.assert_array_equal(batch["image"], source.arrays["image"][index])
                np.testing.assert_array_equal(batch["label"], source.arrays["label"][index])
    assert sorted(seen) == list(range(num))


def test_evaluation_in_a_compiled_step_is_the_same_both_ways(source):
    def images_of(on_device):
        pipeline = EvalInput(source, batch_size=BATCH, on_device=on_device)
        return examples(pipeline, pipeline.batches())

    first, second = images_of(True), images_of(False)
    assert set(first[0]) == {"index", "weight", "image", "label"}
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=20), r"batch_size 20 .* by 8 devices \(1 hosts x 8\): use 16 or 24"),
        (dict(batch_size=4), r"batch_size 4 cannot be shared evenly by 8 devices .* use 8$"),
        (dict(batch_size=0), r"batch_size 0 cannot be shared evenly"),
        (dict(batch_size=24, process_count=2, process_index=0), r"16 devices \(2 hosts x 8\): use 16 or 32"),
        (dict(batch_size=56), "53 training examples are less than one batch of 56"),
    ],
)
def test_impossible_batches_are_one_line_errors(source, options, message):
    with pytest.raises(ValueError, match=message) as error:
        train_input(source, **options)
    assert "\n" not in str(error.value)


def test_steps_that_an_epoch_does_not_have(source):
    with pytest.raises(ValueError, match="no step 4 in epoch 0 of 3 steps"):
        train_input(source).epoch(0, 4)


def test_evaluation_needs_examples(source):
    with pytest.raises(ValueError, match="no examples"):
        EvalInput(source.take(np.arange(0)), batch_size=BATCH, on_device=True)
