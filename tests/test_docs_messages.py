"""Every message that the docs quote as an error exists: in stages/, or in DVC.

The first cell of a row holds the quotations, in backquotes; … stands for what differs.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = (REPO / "docs" / "when-something-goes-wrong.md", REPO / "docs" / "base-model.md")
DOTS = "…"


def quotations() -> list[tuple[str, bool]]:
    """(quoted message, whether DVC says it)."""
    found, heading = [], ""
    for line in [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]:
        if line.startswith("#"):
            heading = line
        elif line.startswith("| `"):
            found += [(quote, "DVC" in heading) for quote in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    return found


@cache
def texts(package: str) -> tuple[str, ...]:
    """All strings in a package's code, without docstrings; what an f-string fills in is …"""
    spec = importlib.util.find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    found = []
    for file in Path(spec.submodule_search_locations[0]).rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        wanted = [node for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp)]
        found += [template(node) for node in wanted if id(node) not in docstrings]
    return tuple(found)


def template(node: ast.expr) -> str:
    """The text of an expression as far as it is written down."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return DOTS


@pytest.mark.parametrize(("quotation", "of_dvc"), quotations())
def test_a_quoted_message_is_what_the_code_says(quotation: str, of_dvc: bool) -> None:
    wanted = re.compile(".*".join(map(re.escape, quotation.split(DOTS))))
    assert any(wanted.search(text) for text in texts("dvc" if of_dvc else "stages"))


def test_the_quotations_are_found() -> None:
    assert len(quotations()) > 50
