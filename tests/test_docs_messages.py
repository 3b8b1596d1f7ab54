"""docs/when-something-goes-wrong.md quotes what the code says, and leaves out no mistake a user can meet.

A row of a table whose first cell is in backquotes is such a quotation; … stands for what differs. Other pages may
hold rows of their own (those of a tool beside its description).
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "when-something-goes-wrong.md"
DOTS = "…"


def quoted(page: Path) -> dict[str, str]:
    """Quoted message -> the heading it stands under."""
    found, heading = {}, ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif match := re.match(r"\| (`+) ?(.+?) ?\1 \| ", line):
            found[match[2]] = heading
    return found


@cache
def texts(folder: Path) -> tuple[tuple[str, str, bool], ...]:
    """(file and line, text, whether it is a UserError's) of all strings in the code; {…} of an f-string is `…`."""
    found = []
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.relative_to(folder)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError" and node.args:
                found.append((where, template(node.args[0]), True))
            elif isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
                found.append((where, template(node), False))
    return tuple(found)


def template(node: ast.expr) -> str:
    """The text of an expression as far as it is written down."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else DOTS for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return DOTS


def pattern(message: str) -> re.Pattern[str]:
    """What a quotation matches: … is any text."""
    return re.compile(".*".join(map(re.escape, message.split(DOTS))), re.DOTALL)


def shell_text() -> str:
    """The text of scripts/host.sh with each $variable as …"""
    text = (REPO / "scripts" / "host.sh").read_text(encoding="utf-8")
    return re.sub(r"\$(\([^()]*\)|\{[^}]*\}|\w+)", DOTS, text)


@pytest.mark.parametrize("message", quoted(PAGE))
def test_a_quoted_message_is_what_the_code_says(message: str) -> None:
    heading, wanted = quoted(PAGE)[message], pattern(message)
    if "scripts/host.sh" in heading:
        line = ".*".join(map(re.escape, message.split(DOTS)))
        assert re.search(line, shell_text()), "scripts/host.sh does not say this"
    elif "DVC" in heading:
        spec = importlib.util.find_spec("dvc")
        assert spec and spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0])
        assert any(message.replace(DOTS, "").strip(" '") in text for _, text, _ in texts(folder))
    else:
        assert any(wanted.fullmatch(text) or (DOTS not in message and message in text)
                   for _, text, _ in texts(REPO / "stages")), "no such message in stages/"  # fmt: skip


def test_every_mistake_a_user_can_make_is_explained() -> None:
    rows = [pattern(message) for page in sorted((REPO / "docs").glob("*.md")) for message in quoted(page)]
    missing = [
        f"stages/{where}: | `{text}` | what it means, what to do |"
        for where, text, mistake in texts(REPO / "stages")
        if mistake
        and len(re.findall(r"\w{2,}", text)) > 2  # else it only passes on what another one says
        and not any(row.fullmatch(text) for row in rows)
    ]
    assert not missing, (
        "add a row to docs/when-something-goes-wrong.md (or the tool's own page):\n" + "\n".join(missing)
    )
