"""Reads JSON documents from elsewhere, which are not trusted: what is wrong with one is a ValueError."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class JsonReader:
    """Takes a document apart; every method raises a ValueError ``not a <what>: ...`` for what does not fit.

    Attributes:
      what: what the document should be, for the messages.
    """

    what: str

    def load(self, text: Any) -> Any:
        """The document of ``text``, without duplicate keys, NaN, infinity, or what is rounded to it."""
        try:
            return json.loads(
                text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise self.error(f"it is not JSON: {error}") from error

    def get(self, document: Any, key: str, kind: type) -> Any:
        """``document[key]``, which must be a ``kind`` (``float`` also takes whole numbers)."""
        if not isinstance(document, dict) or key not in document:
            raise self.error(f"there is no {key!r}")
        value = document[key]
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (kind is not bool and isinstance(value, bool)):
            raise self._unexpected(key, value, kind.__name__)
        try:
            return float(value) if kind is float else value
        except OverflowError as error:
            raise self._unexpected(key, value, "float") from error

    def integers(self, document: Any, key: str) -> tuple[int, ...]:
        """``document[key]``, which must be a list of integers."""
        values = self.get(document, key, list)
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise self._unexpected(key, values, "integers")
        return tuple(values)

    def error(self, message: str) -> ValueError:
        """The error to raise, one line whatever names the document has."""
        return ValueError(f"not a {self.what}: {' '.join(message.splitlines())}")

    def _unexpected(self, key: str, value: Any, expected: str) -> ValueError:
        try:
            shown = f"{value!r:.40}"
        except RecursionError:
            shown = "nested too deep"
        return self.error(f"{key!r} is {shown}, expected {expected}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(document := dict(pairs)) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"an object has the same key twice: {key!r:.100}")
    return document


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number:.100} is too large a number")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
