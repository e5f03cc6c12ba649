"""Which errors are the user's to mend, and what they are told."""

import errno
import os

import pytest

from cuttlefish_jax.errors import ConfigError, StorageError, UserError, storage_errors


def wrapped(error):
    """The error as the cause of another, inside an exception group."""
    try:
        raise RuntimeError("a thread failed") from error
    except RuntimeError as outer:
        return ExceptionGroup("threads", [KeyError("other"), outer])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        ValueError("RESOURCE_EXHAUSTED: writing: [OS error 28: ENOSPC No space left on device]\nmore"),
        wrapped(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
)
def test_a_full_disk_is_recognised_in_every_disguise(tmp_path, error):
    with (
        pytest.raises(
            StorageError, match=rf"cannot save in {tmp_path}: no space left .* MiB free.*--workdir"
        ),
        storage_errors(tmp_path, action="save in"),
    ):
        raise error


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_missing_permissions_are_one_line_with_a_way_out(number):
    with pytest.raises(StorageError) as caught, storage_errors("/some/where/not/there"):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert message.startswith("cannot write /some/where/not/there: ")
    assert message.endswith("another --workdir")
    assert "\n" not in message
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), FileNotFoundError(2, "x"), KeyError("x")])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, storage_errors("/tmp"):
        raise error
    assert caught.value is error


def test_a_user_error_keeps_its_own_words():
    with pytest.raises(ConfigError, match=r"^mine: No space left on device$"), storage_errors("/tmp"):
        raise ConfigError("mine: No space left on device")


def test_the_way_out_is_an_option_of_the_program_at_hand(tmp_path):
    message = r"Change the permissions, or give another --out$"
    with pytest.raises(StorageError, match=message), storage_errors(tmp_path, option="--out"):
        raise PermissionError(errno.EACCES, "no")
