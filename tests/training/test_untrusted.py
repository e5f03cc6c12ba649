"""Checkpoints made by somebody who means harm: refused in a line, before they cost time or memory."""

import os
import resource
import shutil

import numpy as np
import pytest
from checkpoint_tools import make_state, names, restore, rewrite_record, save_all
from hostile_tools import make_huge, store_in_pieces

from cuttlefish_jax.errors import CheckpointError, StorageError
from cuttlefish_jax.training.checkpoint import Checkpointer
from cuttlefish_jax.training.orbax_tree import read_tree

KERNEL = "00009.params.dense.kernel"  # of shape (5, 8)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint that nothing is wrong with."""
    save_all(tmp_path / "checkpoints", [1])
    return tmp_path / "checkpoints" / "1"


@pytest.mark.parametrize("document", ["record/metadata", "arrays/_METADATA", "_CHECKPOINT_METADATA"])
def test_documents_longer_than_memory(saved, document):
    make_huge(saved / document)
    with pytest.raises(
        CheckpointError, match=r"metadata: it has more than 64 MiB, too much|_METADATA: it has "
    ):
        restore(saved.parent)


@pytest.mark.parametrize("document", ["record/metadata", "arrays/_METADATA", f"arrays/{KERNEL}/.zarray"])
def test_a_pipe_is_not_waited_for(saved, document):
    (saved / document).unlink()
    os.mkfifo(saved / document)
    with pytest.raises(CheckpointError, match=f"{document} is neither a file nor a directory"):
        restore(saved.parent)
    if document.startswith("arrays"):
        with pytest.raises(CheckpointError, match="is neither a file nor a directory"):
            read_tree(saved / "arrays")


def test_an_array_in_pieces_larger_than_itself(saved):
    store_in_pieces(saved / "arrays", KERNEL, [2**20, 2**20])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: restore(saved.parent), lambda: read_tree(saved / "arrays")):
        with pytest.raises(
            CheckpointError, match=r"shape \(5, 8\) is stored in pieces of \(1048576, 1048576\)"
        ):
            read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.parametrize("elsewhere", ["{tmp_path}/elsewhere", "../../../elsewhere"])
def test_an_array_that_is_not_in_the_checkpoint(saved, tmp_path, elsewhere):
    shutil.move(saved / "arrays" / KERNEL, tmp_path / "elsewhere")
    document = saved / "arrays" / "_METADATA"
    document.write_text(document.read_text().replace(KERNEL, elsewhere.format(tmp_path=tmp_path)))
    rewrite_record(saved, lambda payload: payload["leaves"]["params/dense/kernel"].update(file=elsewhere))
    for read in (lambda: restore(saved.parent), lambda: read_tree(saved / "arrays")):
        with pytest.raises(CheckpointError, match=r"is stored outside of it|Invalid file path"):
            read()


def test_a_link_to_elsewhere_is_read_and_nothing_behind_it_deleted(saved, tmp_path):
    elsewhere = tmp_path / "of somebody"
    shutil.move(saved, elsewhere)
    saved.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    assert restore(saved.parent).step == 1
    with Checkpointer(saved.parent, keep=1) as checkpointer:
        checkpointer.save(1, make_state(3), {"epoch": 1})
        checkpointer.save(2, make_state(4), {"epoch": 2})
    assert restore(saved.parent).step == 2
    assert {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()} == before


def test_a_link_that_leads_round_in_a_circle(saved):
    (saved / "arrays" / "round").symlink_to(saved)
    assert restore(saved.parent).step == 1
    (saved / "record" / "metadata").unlink()
    (saved / "record" / "metadata").symlink_to("metadata")
    with pytest.raises((CheckpointError, StorageError), match=r"."):
        restore(saved.parent)
    assert names(saved.parent) == ["1"]


def test_arrays_of_orbax_are_read_in_whatever_pieces_fit(tmp_path):
    """Those of others are cut as they were sharded, or as somebody wanted."""
    import orbax.checkpoint as ocp

    tree = {"kernel": np.arange(24.0).reshape(4, 6), "scalar": np.float32(3), "empty": np.zeros((0, 3))}
    with ocp.PyTreeCheckpointer() as checkpointer:
        pieces = {name: ocp.SaveArgs(chunk_byte_size=32) for name in tree}
        checkpointer.save(tmp_path / "saved", {"kernel": tree["kernel"], "scalar": tree["scalar"]},
                          save_args={name: pieces[name] for name in ("kernel", "scalar")})  # fmt: skip
    np.testing.assert_array_equal(read_tree(tmp_path / "saved")["kernel"], tree["kernel"])
