"""What all hosts of a run have to agree on: compared, in place of one that waits for another for ever.

Every host calls the functions of this module at the same points of the program. They either return the same
on all hosts, or raise the same error on all of them. On one host they do nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cuttlefish_jax.errors import UserError

# Of stable ranks: twice the error that a measurement may have, for hosts that sum in another order.
RANK_TOLERANCE = 0.02
_MISSING = "missing"


class HostsDifferError(UserError):
    """The hosts of a run are not of one mind."""


def agree(name: str, value: Any, *, tolerance: float = 0.0, advice: str = "") -> Any:
    """The first host's value, if that of every other host is the same.

    Hosts compare SHA-256 digests; only where these differ do they send each other what they have.

    Args:
      name: of the thing, for the message.
      value: JSON.
      tolerance: by how much numbers may differ, as a share of the larger one. With 0 the values are equal.
      advice: what the user can do about a difference, a sentence without its full stop.

    Returns:
      The value of the first host, as it comes from JSON; on one host, ``value`` itself.

    Raises:
      HostsDifferError: on every host, if they differ: it names the hosts and the first difference.
    """
    if jax.process_count() == 1:
        return value
    # With the name: hosts that are at different points of the program differ in it.
    text = json.dumps([name, value])
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    if (multihost_utils.process_allgather(digest) == digest).all():
        everyones = [text]
    else:
        everyones = _gather(text)
        names = _gather(socket.gethostname())
        message = describe_difference([json.loads(text) for text in everyones], names, tolerance=tolerance)
        if message:
            raise HostsDifferError(f"{message}. {advice}" if advice else message)
    return json.loads(everyones[0])[1]


@contextlib.contextmanager
def agreed_outcome() -> Iterator[None]:
    """Makes a problem of one host a problem of all: for code in which no host waits for another.

    Raises:
      UserError: on the host that had it; if any host had one, on all others too, with the host's name.
    """
    if jax.process_count() == 1:
        yield
        return
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    failed = np.asarray(own is not None)
    if multihost_utils.process_allgather(failed).any():
        messages, names = _gather("" if own is None else str(own)), _gather(socket.gethostname())
        if own is not None:
            raise own
        host = next(i for i, message in enumerate(messages) if message)
        raise UserError(f"on {_host(host, names)}: {messages[host]}")


def first_hosts(arrays: Any) -> Any:
    """The first host's arrays: a tree of numpy arrays, whose shapes and dtypes are the same on all hosts."""
    return multihost_utils.broadcast_one_to_all(arrays)


def smallest_of_hosts(value: int) -> int:
    """The smallest value of all hosts, so that all of them take the same decision."""
    if jax.process_count() == 1:
        return value
    return int(np.min(multihost_utils.process_allgather(np.asarray(value, np.int32))))


def first_hosts_text(text: str) -> str:
    """The first host's text; what the other hosts pass is not looked at."""
    return _gather(text)[0]


def describe_difference(
    everyones: Sequence[Sequence[Any]], names: Sequence[str], *, tolerance: float = 0.0
) -> str:
    """One line on how hosts differ from the first one, without a full stop; ``""`` if they do not.

    Args:
      everyones: ``[name of the thing, its value]`` of every host.
      names: of the hosts.
      tolerance: see :func:`agree`.
    """
    (thing, first), *_ = everyones
    elsewhere = [host for host, (other, _) in enumerate(everyones) if other != thing]
    if elsewhere:
        host = elsewhere[0]
        return (
            f"the hosts do not run the same program: {_host(host, names)} is at {everyones[host][0]!r}, "
            f"{_host(0, names)} at {thing!r}"
        )
    differences = {
        host: found
        for host, (_, value) in enumerate(everyones)
        if (found := _first_difference(first, value, tolerance)) is not None
    }
    if not differences:
        return ""
    host, (where, ours, theirs) = next(iter(differences.items()))
    more = [str(other) for other in differences if other != host]
    others = f" (and host{'s' * (len(more) > 1)} {', '.join(more)})" if more else ""
    what = f"{thing}: {where}" if where else thing
    return (
        f"the hosts differ in {what} is {_show(theirs)} on {_host(host, names)}{others}, "
        f"and {_show(ours)} on {_host(0, names)}"
    )


def _first_difference(ours: Any, theirs: Any, tolerance: float, where: str = "") -> tuple | None:
    """Where two JSON values differ first, and the two values there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = dict.fromkeys([*ours, *theirs])
        pairs = [
            (f"{where}.{key}" if where else key, ours.get(key, _MISSING), theirs.get(key, _MISSING))
            for key in keys
        ]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    elif ours == theirs or _are_close(ours, theirs, tolerance):
        return None
    else:
        return where, ours, theirs
    found = (_first_difference(a, b, tolerance, place) for place, a, b in pairs)
    return next((difference for difference in found if difference is not None), None)


def _are_close(a: Any, b: Any, tolerance: float) -> bool:
    if not all(isinstance(x, int | float) for x in (a, b)):
        return False
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= tolerance * max(abs(a), abs(b))


def _show(value: Any) -> str:
    text = value if value is _MISSING else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _host(index: int, names: Sequence[str]) -> str:
    return f"host {index} ({names[index]})"


def _gather(text: str) -> list[str]:
    """The text of every host."""
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(own), np.int32))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(own)] = own
    everyones = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(everyones, lengths, strict=True)]
