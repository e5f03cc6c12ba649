"""How the documentation is built: python -m sphinx -W --keep-going -b html docs docs/_build."""

import sys
from pathlib import Path

import cuttlefish_jax

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE)]

project = "cuttlefish_jax"
author = "the cuttlefish_jax authors"
release = cuttlefish_jax.__version__
html_title = f"cuttlefish_jax {release}"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_design",
    "executed",
    "mathml",
    "public_names",
]
exclude_patterns = ["_build", "_pictures"]
html_theme = "furo"
html_copy_source = False
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the types are in the text of the docstrings, with their shapes
napoleon_use_rtype = False
napoleon_attr_annotations = False
