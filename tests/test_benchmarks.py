"""The benchmarks go with the package: what they take from it, and from each other, is there."""

import ast
import importlib.util
from pathlib import Path

import pytest

import cuttlefish_jax as cf

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def names_of(script):
    """What a script defines, without running it."""
    found = set()
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {
                name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def is_there(module, name):
    if (FOLDER / f"{module}.py").exists():
        return name in names_of(FOLDER / f"{module}.py")
    found = importlib.import_module(module)
    is_package = hasattr(found, "__path__")
    return hasattr(found, name) or (is_package and bool(importlib.util.find_spec(f"{module}.{name}")))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_takes_is_there(script):
    own = {path.stem for path in SCRIPTS} | {"cuttlefish_jax", "configs", "train"}
    missing = []
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in own:
            missing += [f"{node.module}.{x.name}" for x in node.names if not is_there(node.module, x.name)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cf":
            missing += [] if hasattr(cf, node.attr) else [f"cf.{node.attr}"]
    assert not missing
    assert ast.get_docstring(ast.parse(script.read_text()))
