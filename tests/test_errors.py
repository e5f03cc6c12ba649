"""Which errors are the user's to mend, and what they are told."""

import errno
import os
from types import SimpleNamespace

import pytest

from cuttlefish_jax.errors import ConfigError, StorageError, UserError, storage_errors


def wrapped(error):
    """The error as the cause of another, inside an exception group."""
    try:
        raise RuntimeError("a thread failed") from error
    except RuntimeError as outer:
        return ExceptionGroup("threads", [KeyError("other"), outer])


def caused(error):
    """An error that was made from another one."""
    outer = RuntimeError("a save failed")
    outer.__cause__ = error
    return outer


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


@pytest.mark.parametrize(
    "number",
    [
        errno.EIO, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EMFILE, errno.ESTALE,
        errno.ENOENT,
    ],
)  # fmt: skip
@pytest.mark.parametrize("disguise", [lambda error: error, caused])
def test_whatever_else_the_file_system_refuses_is_one_line(number, disguise):
    reason = os.strerror(number)
    with (
        pytest.raises(StorageError, match=rf"^cannot write /some/file: {reason}\. .*--workdir$"),
        storage_errors("/some/file"),
    ):
        raise disguise(OSError(number, reason, "/some/.file.tmp"))


@pytest.mark.parametrize("error", [KeyError("x"), OSError("of a library"), ValueError("x")])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, storage_errors("/tmp"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.ENOTDIR])
def test_what_is_missing_below_what_is_read_is_damage(number):
    error = OSError(number, "x", "/checkpoints/3/record")
    for disguised in (error, caused(error)):
        with pytest.raises(type(disguised)) as caught, storage_errors("/checkpoints/3", action="read"):
            raise disguised
        assert caught.value is disguised
    with pytest.raises(StorageError), storage_errors("/checkpoints/3/record", action="read"):
        raise error


def test_the_part_of_a_path_that_is_a_file_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with (
        pytest.raises(StorageError, match=rf"^cannot write {file}/a/b: {file} is a file, not a directory\. "),
        storage_errors(file / "a" / "b"),
    ):
        (file / "a" / "b").mkdir()


@pytest.mark.parametrize(("files", "what"), [(100, "no inodes left"), (0, r"\d+ MiB free")])
def test_a_disk_that_has_space_and_no_inodes_says_so(tmp_path, monkeypatch, files, what):
    space = SimpleNamespace(f_files=files, f_favail=0, f_bavail=5000, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: space)
    with (
        pytest.raises(StorageError, match=rf"no space left on the disk \({what}.*\)\. Free some"),
        storage_errors(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "x")


def test_a_user_error_keeps_its_own_words():
    with pytest.raises(ConfigError, match=r"^mine: No space left on device$"), storage_errors("/tmp"):
        raise ConfigError("mine: No space left on device")


def test_the_way_out_is_an_option_of_the_program_at_hand(tmp_path):
    message = r"Change the permissions, or give another --out$"
    with pytest.raises(StorageError, match=message), storage_errors(tmp_path, option="--out"):
        raise PermissionError(errno.EACCES, "no")
