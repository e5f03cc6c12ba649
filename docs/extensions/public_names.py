"""A public name that is missing from the reference is a warning, and so fails the build."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import cuttlefish_jax as cf
from cuttlefish_jax import serving

_log = logging.getLogger(__name__)


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    documented = set(env.get_domain("py").objects)
    for module in (cf, serving):
        for name in module.__all__:
            if f"{module.__name__}.{name}" not in documented:
                _log.warning("%s.%s is public, and not in docs/reference.md", module.__name__, name)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the check."""
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
