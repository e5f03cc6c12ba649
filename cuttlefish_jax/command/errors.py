"""Errors of the command line: one line, and exit status 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cuttlefish_jax.errors import UserError


@contextlib.contextmanager
def mendable() -> Iterator[None]:
    """Makes a ValueError of the library one that the user can mend."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error


def check_output(path: Path | None, *, force: bool) -> None:
    """Refuses to write where something is, unless it is to be replaced, or where there is no folder.

    Raises:
      UserError: names the path and the way out.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    if path.exists() and not force:
        raise UserError(f"{path} exists: give another name, or --force to replace it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.parent}: make it first")


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
    """Imports inside are of a package that the core does without.

    Raises:
      UserError: names the extra, if it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"this needs {package}: pip install 'cuttlefish-jax[command]'") from error
