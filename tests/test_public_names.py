"""What people's code relies on: the public names, their docstrings, and what the core may import."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import cuttlefish_jax as cf

PACKAGE = Path(cf.__file__).parent
MODULES = ["cuttlefish_jax", *(m.name for m in pkgutil.walk_packages(cf.__path__, "cuttlefish_jax."))]
FRONT_ENDS = ("linen", "nnx")
# What people run and what serves stand outside; __main__ is the command.
CORE = sorted(
    path
    for folder in ("", "plan", "profiling", *FRONT_ENDS)
    for path in (PACKAGE / folder).glob("*.py")
    if path.name != "__main__.py"
)


@pytest.mark.parametrize("name", cf.__all__)
def test_public_names_are_documented(name):
    assert (getattr(cf, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert (
        doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
    )


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_core_keeps_its_borders(path):
    imports = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(), re.MULTILINE)
    outside = tuple(f"cuttlefish_jax.{name}" for name in ("training", "models", "command", "serving"))
    assert not [name for name in imports if name.startswith(outside)]
    if path != PACKAGE / "__init__.py" and path.parent.name not in FRONT_ENDS:
        assert not [name for name in imports if name.split(".")[0] == "flax"]
    assert not [
        name for name in imports if name.split(".")[0] in ("orbax", "tensorflow_datasets", "grain", "scipy")
    ]
