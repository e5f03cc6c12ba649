"""What compiled programs are made of."""

import math
import re

_COLLECTIVE = re.compile(r"= (\(?[a-z0-9]+\[[^=]*?) (?:all-\w+|collective-\w+|reduce-scatter|ragged-\S+?)\(")


def collective_sizes(text):
    """Elements of the arrays that the communication in a compiled program results in."""
    shapes = [shape for found in _COLLECTIVE.findall(text) for shape in re.findall(r"\[([\d,]*)\]", found)]
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]
