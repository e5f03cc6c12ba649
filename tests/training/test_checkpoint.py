"""Checkpoints come back bit for bit, or not at all."""

import errno
import logging
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_tools import (
    assert_same_bits,
    make_state,
    names,
    own_messages,
    restore,
    rewrite_record,
    save_all,
)

from cuttlefish_jax.errors import CheckpointError, StorageError
from cuttlefish_jax.training.checkpoint import Checkpointer


def test_everything_comes_back_bit_for_bit(tmp_path):
    state = make_state(3)
    record = {"phase": "low_rank", "tracker": {"history": [[1.5, 0.1], []], "at": None}, "loss": 1e-300}
    with Checkpointer(tmp_path / "new" / "checkpoints") as checkpointer:
        checkpointer.save(3, state, record)
    restored = restore(tmp_path / "new" / "checkpoints")
    assert (restored.step, restored.record) == (3, record)
    arrays = restored.into(jax.eval_shape(lambda: state))
    assert_same_bits(arrays, state)
    assert arrays["rng"].dtype == state["rng"].dtype
    # What was restored is a training state again.
    jax.random.normal(arrays["rng"][0])
    optax.adam(0.1).update(arrays["params"], arrays["optimizer"])


def test_a_save_has_nothing_to_say(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        save_all(tmp_path, [1, 2, 3])
    assert not caplog.records


def test_the_kind_of_random_key_is_kept(tmp_path):
    state = {"rng": jax.random.key(7, impl="rbg")}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
    restored = restore(tmp_path)
    assert_same_bits(restored.into(state), state)
    with pytest.raises(CheckpointError, match=r"rng is key<rbg>\[4\] there and key<fry>\[2\] here"):
        restored.into({"rng": jax.random.key(7)})


def test_replicated_arrays_are_saved_once_and_whole(tmp_path):
    mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put({"kernel": jax.random.normal(jax.random.key(0), (16, 16))}, replicated)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
    assert_same_bits(restore(tmp_path).into(jax.eval_shape(lambda: state)), jax.device_get(state))


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"kernel": jax.random.normal(jax.random.key(0), (512, 1024))}
    expected = jax.device_get(state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        jax.block_until_ready(change(state))
    assert_same_bits(restore(tmp_path).into(expected), expected)


def test_an_empty_or_missing_directory_has_no_checkpoint(tmp_path):
    assert restore(tmp_path / "missing") is None
    assert not (tmp_path / "missing").exists()
    assert restore(tmp_path) is None


def test_only_the_last_ones_are_kept(tmp_path):
    save_all(tmp_path, [1, 2, 3, 4], keep=2)
    assert names(tmp_path) == ["3", "4"]
    assert restore(tmp_path).step == 4


def test_saving_a_step_again_replaces_it(tmp_path):
    save_all(tmp_path, [1, 2])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, make_state(77), {"epoch": "again"})
    restored = restore(tmp_path)
    assert (restored.step, restored.record) == (2, {"epoch": "again"})
    assert_same_bits(restored.into(make_state(77)), make_state(77))
    assert names(tmp_path) == ["1", "2"]


def test_a_checkpoint_set_aside_counts_until_its_successor_is_whole(tmp_path):
    save_all(tmp_path, [2])
    (tmp_path / "2").rename(tmp_path / "2.replaced")  # killed just after this
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    assert_same_bits(restore(tmp_path).into(make_state(2)), make_state(2))
    save_all(tmp_path, [2])
    assert names(tmp_path) == ["2"]


def test_a_save_over_a_checkpoint_that_fails_leaves_that_one(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_all(tmp_path, [1])
    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(checkpointer._orbax, "save", fails)
        with pytest.raises(StorageError, match="no space left on the disk"):
            checkpointer.save(1, make_state(5), {"epoch": 5})
    restored = restore(tmp_path)
    assert restored.record == {"epoch": 1}
    assert_same_bits(restored.into(make_state(0)), make_state(1))


@pytest.mark.parametrize("keep", [0, -1])
def test_keep_must_be_positive(tmp_path, keep):
    with pytest.raises(ValueError, match="keep = "):
        Checkpointer(tmp_path, keep=keep)


def test_two_leaves_of_one_name_are_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="called 'a/b'"):
        checkpointer.save(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s["params"]["dense"].pop("bias"),
            r"params/dense/bias is float32\[8\] there and not needed",
        ),
        (lambda s: s.update(extra=jnp.ones(2)), r"extra is missing there and float32\[2\] here"),
        (lambda s: s.update(flags=jnp.ones(2)), r"flags is bool\[2\] there and float32\[2\] here"),
        (
            lambda s: s["params"]["dense"].update(kernel=jnp.ones((5, 9))),
            r"params/dense/kernel is float32\[5, 8\] there and float32\[5, 9\] here",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, change, message):
    save_all(tmp_path, [1])
    other = make_state(1)
    change(other)
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path).into(jax.eval_shape(lambda: other))


@pytest.fixture
def end_of_readers():
    yield
    time.sleep(0.2)


def orphaned_readers(test):
    """Allows for readers of other arrays, which orbax leaves behind when the first one fails."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("end_of_readers")(ignored(test))


def data_files(directory):
    return [p for p in sorted(directory.rglob("*")) if p.is_file() and p.stat().st_size]


@orphaned_readers
def test_every_damage_is_noticed(tmp_path):
    """Each file deleted, cut in half and with one bit flipped: never are other bits restored."""
    save_all(tmp_path / "whole", [1])
    expected = make_state(1)
    count = 0
    for index, file in enumerate(data_files(tmp_path / "whole" / "1")):
        for damage in (delete, cut, flip):
            shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
            damage(tmp_path / "damaged" / file.relative_to(tmp_path / "whole"), seed=index)
            try:
                restored = restore(tmp_path / "damaged")
            except CheckpointError:
                count += 1
            else:  # a file that nothing depends on
                assert_same_bits(restored.into(expected), expected)
            assert names(tmp_path / "damaged") == ["1"]
            shutil.rmtree(tmp_path / "damaged")
    assert count >= 10


def delete(file, seed):
    file.unlink()


def cut(file, seed):
    os.truncate(file, file.stat().st_size // 2)


def flip(file, seed):
    contents = bytearray(file.read_bytes())
    contents[np.random.default_rng(seed).integers(len(contents))] ^= 4
    file.write_bytes(contents)


def damage_arrays(directory):
    """Flips one bit in the middle of every file that has numbers of arrays."""
    files = [file for file in data_files(directory / "arrays") if file.name[0].isdecimal()]
    assert files
    for file in files:
        contents = bytearray(file.read_bytes())
        contents[len(contents) // 2] ^= 1
        file.write_bytes(contents)


@orphaned_readers
def test_a_damaged_checkpoint_falls_back_to_the_last_whole_one(tmp_path, caplog):
    save_all(tmp_path, [10, 20, 30], keep=3)
    damage_arrays(tmp_path / "30")
    with caplog.at_level(logging.WARNING):
        restored = restore(tmp_path)
    assert restored.step == 20
    assert_same_bits(restored.into(make_state(20)), make_state(20))
    [warning] = own_messages(caplog)
    assert f"{tmp_path}/30: " in warning
    assert names(tmp_path) == ["10", "20", "30"]


def test_altered_numbers_in_the_record_are_damage(tmp_path, caplog):
    save_all(tmp_path, [12, 13])
    record = tmp_path / "13" / "record" / "metadata"
    text = record.read_text()
    assert '"epoch": 13' in text
    record.write_text(text.replace('"epoch": 13', '"epoch": 17'))
    with caplog.at_level(logging.WARNING):
        assert restore(tmp_path).record == {"epoch": 12}
    assert "13: its record was altered" in caplog.text


@orphaned_readers
def test_an_array_exchanged_for_another_is_damage(tmp_path):
    """Files that are all valid, but belong to another save: only the digests can tell."""
    save_all(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / "2" / "arrays")
    shutil.copytree(tmp_path / "1" / "arrays", tmp_path / "2" / "arrays")
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(CheckpointError, match=r"2: its array .* was altered"):
        restore(tmp_path)


@orphaned_readers
def test_a_run_goes_on_over_damaged_checkpoints(tmp_path):
    """Fall back, save the same step again, and be left with whole checkpoints only."""
    save_all(tmp_path, [10, 20, 30, 40], keep=4)
    damage_arrays(tmp_path / "30")
    shutil.rmtree(tmp_path / "40" / "arrays")
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.restore().step == 20
        assert names(tmp_path) == ["10", "20", "30", "40"]
        checkpointer.save(30, make_state(30), {"epoch": 30})
        checkpointer.wait()
        assert names(tmp_path) == ["20", "30"]
        assert checkpointer.restore().step == 30
        checkpointer.save(40, make_state(40), {"epoch": 40})
    assert names(tmp_path) == ["30", "40"]
    assert restore(tmp_path).step == 40


def test_no_whole_checkpoint_is_an_error_and_deletes_nothing(tmp_path):
    save_all(tmp_path, [1, 2])
    for step in ("1", "2"):
        cut(tmp_path / step / "record" / "metadata", seed=0)
    before = [(file, file.read_bytes()) for file in data_files(tmp_path)]
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* is whole \(2: .*; 1: .*another --workdir"
    ):
        restore(tmp_path)
    assert [(file, file.read_bytes()) for file in data_files(tmp_path)] == before


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(tmp_path):
    save_all(tmp_path, [1, 2])
    rewrite_record(tmp_path / "2", lambda payload: payload.update(format=4))
    before = [(file, file.read_bytes()) for file in data_files(tmp_path)]
    with pytest.raises(CheckpointError, match=r"/2 is of format 4, .* reads formats up to 3: update it, or"):
        restore(tmp_path)
    assert [(file, file.read_bytes()) for file in data_files(tmp_path)] == before


def copy_of_format_2(checkpoint):
    """Of the version before: all arrays in one database, and no names of files in the record."""
    shutil.copytree(Path(__file__).parent / "golden" / "format_2", checkpoint)


def test_a_checkpoint_of_format_2_is_read(tmp_path):
    copy_of_format_2(tmp_path / "1")
    restored = restore(tmp_path)
    assert restored.record == {"epoch": 1}
    assert_same_bits(restored.into(make_state(1)), make_state(1))
    save_all(tmp_path, [2])
    assert names(tmp_path) == ["1", "2"]


def test_names_that_are_no_names_of_files(tmp_path):
    awkward = [
        "..",
        "a\\b",
        "Käse 乳酪",
        "é",
        "è",
        "Dense",
        "dense",
        "x" * 300,
        "x" * 300 + "y",
        "",
        "CON",
        "0",
    ]
    state = {name: jnp.full(2, index, jnp.int8) for index, name in enumerate(awkward)}
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, {"block": state}, {})
    assert_same_bits(restore(tmp_path / "checkpoints").into({"block": state}), {"block": state})
    assert names(tmp_path) == ["checkpoints"]
    files = [path.name for path in (tmp_path / "checkpoints" / "1" / "arrays").iterdir() if path.is_dir()]
    assert len({file.lower() for file in files}) == len(awkward)
    assert all(file.isascii() and len(file) < 120 for file in files)


def test_a_checkpoint_of_format_1_is_read_and_what_it_lacks_has_defaults(tmp_path):
    copy_of_format_2(tmp_path / "1")  # the format of its arrays was the same
    rewrite_record(tmp_path / "1", lambda payload: payload.update(format=1))
    restored = restore(tmp_path)
    old = make_state(1)
    assert_same_bits(restored.into(old), old)
    wanted = make_state(2) | {"ema": {"bias": jnp.ones(8)}}
    # Defaults stand back behind what was saved, and may have more than is wanted.
    defaults = {
        "ema": {"bias": np.full(8, 3, np.float32)},
        "params": {"dense": {"bias": np.ones(8)}},
        "no": 1,
    }
    completed = restored.into(wanted, defaults=defaults)
    np.testing.assert_array_equal(completed.pop("ema")["bias"], np.full(8, 3, np.float32))
    assert_same_bits(completed, old)
    with pytest.raises(CheckpointError, match=r"ema/bias is float32\[9\] there and float32\[8\] here"):
        restored.into(wanted, defaults={"ema": {"bias": np.ones(9, np.float32)}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda payload: payload.update(format="2"), "its files are damaged"),
        (
            lambda payload: payload["leaves"]["half"].update(shape=[2**44]),
            "it declares arrays of 32,768.0 GiB",
        ),
        (lambda payload: payload["leaves"]["half"].update(shape=[-1]), "it declares an array of type"),
        (lambda payload: payload["leaves"]["half"].update(dtype="V99999999"), "it declares an array of type"),
        (lambda payload: payload["leaves"]["half"].update(shape=[2, 2]), "its array half was altered"),
        (lambda payload: payload["leaves"]["half"].update(dtype="object"), "its files are damaged"),
        (lambda payload: payload["leaves"]["empty"].update(shape=[0, 2**62]), "its files are damaged"),
        (lambda payload: payload["leaves"].update({"../../half": payload["leaves"]["half"]}), "are damaged"),
        (lambda payload: payload["leaves"]["half"].update(file="../../half"), "are damaged"),
        (lambda payload: payload["leaves"].pop("half"), "its files are damaged"),
        (lambda payload: payload.update(leaves=[1]), "its files are damaged"),
    ],
)
def test_a_record_made_by_somebody_who_means_harm(tmp_path, change, message):
    """Its own hash is right: whoever can write the file can compute that, too."""
    save_all(tmp_path / "checkpoints", [1])
    rewrite_record(tmp_path / "checkpoints" / "1", change)
    with pytest.raises(CheckpointError, match=message):
        restore(tmp_path / "checkpoints")
    assert names(tmp_path) == ["checkpoints"]


def test_a_record_that_is_nested_too_deep(tmp_path):
    save_all(tmp_path / "checkpoints", [1])
    (tmp_path / "checkpoints" / "1" / "record" / "metadata").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="its files are damaged"):
        restore(tmp_path / "checkpoints")
