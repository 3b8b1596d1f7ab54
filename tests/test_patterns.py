"""Regular expressions match alike in every Python that is supported."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import stages

ONE = (ops.LITERAL, ops.NOT_LITERAL, ops.IN, ops.ANY)


def parts(argument: Any) -> Iterator[Any]:
    """The parsed patterns inside an argument of a parsed operation."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for one in argument:
            yield from parts(one)


def mistaken(pattern: Any) -> bool:
    """Whether a possessive quantifier stands over more than one character, or there is an atomic group."""
    for operation, argument in pattern:
        if operation is ops.POSSESSIVE_REPEAT and (len(argument[2]) > 1 or argument[2][0][0] not in ONE):
            return True
        if operation is ops.ATOMIC_GROUP or any(map(mistaken, parts(argument))):
            return True
    return False


def test_the_check_finds_such_a_pattern() -> None:
    for pattern in (r"a(?:b|bc)++c", r"x(?:'[a-z]++)*+", r"(?>ab)", r"(?:a(?:\.[0-9]++)?+)"):
        assert mistaken(parser.parse(pattern))
    assert not mistaken(parser.parse(r"[0-9]++(?:,[0-9]{3})*(?:\.[0-9]++)? \s*+"))


def test_no_possessive_quantifier_stands_over_a_group() -> None:
    """Python before 3.11.5 matches it wrong (python/cpython#106052); Debian 12 has 3.11.2."""
    patterns = {}
    for module in pkgutil.walk_packages(stages.__path__, "stages."):
        if "ray" not in module.name and "vllm" not in module.name and module.name != "stages.__main__":
            found = vars(importlib.import_module(module.name)).items()
            patterns |= {f"{module.name}.{name}": one for name, one in found if isinstance(one, re.Pattern)}
    assert len(patterns) > 20
    wrong = [name for name, one in patterns.items() if mistaken(parser.parse(one.pattern, one.flags))]
    assert wrong == []
