"""Fields of a record from elsewhere, named by dotted paths.

    find({"doc": {"answer": "#### 18"}, "resps": [["She has 18."]]}, "doc.answer") == "#### 18"

A part of a path is a key of an object or, counted from 0, a place in a list: `choices.0.message.content`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.regime_w.record import name


def find(record: Mapping[str, Any], path: str) -> Any:
    """The value at `path`, a key that holds dots itself coming first. Raises KeyError when there is none."""
    if path in record:
        return record[path]
    place: Any = record
    for part in path.split("."):
        if isinstance(place, dict) and part in place:
            place = place[part]
        elif isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            place = place[int(part)]
        else:
            raise KeyError(path)
    return place


def require(record: Mapping[str, Any], path: str, option: str) -> Any:
    """As `find`; what is missing raises ValueError, which names the fields there are and the `option`."""
    try:
        return find(record, path)
    except KeyError:
        names = ", ".join(map(repr, list(record)[:12])) or "none"
        raise ValueError(f"field '{path}' is missing; fields found: {names}; name it with {option}") from None


def question_id(value: Any, path: str) -> str:
    """An id that can be paired: text, or a whole number as text. Raises ValueError for anything else."""
    try:
        return name(value)
    except ValueError as error:
        raise ValueError(f"field '{path}' must be {error}, found {value!r:.60}") from None
