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
CORE = sorted(PACKAGE.glob("*.py"))


@pytest.mark.parametrize("name", cf.__all__)
def test_public_names_are_documented(name):
    assert (getattr(cf, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert (
        doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
    )


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_keeps_its_borders(path):
    imports = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(), re.MULTILINE)
    assert not [
        name for name in imports if name.startswith(("cuttlefish_jax.training", "cuttlefish_jax.models"))
    ]
    if path.name != "__init__.py":
        assert not [name for name in imports if name.split(".")[0] == "flax"]
    assert not [
        name for name in imports if name.split(".")[0] in ("orbax", "tensorflow_datasets", "grain", "scipy")
    ]
