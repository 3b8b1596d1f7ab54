"""Which project files a stage's result depends on, found by following its imports."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def project_files(entry: Path) -> list[Path]:
    """All project files that `entry` imports, directly or not, itself included; sorted, relative to ROOT.

    Imports inside functions count too, since they run with the stage. A package's `__init__.py` counts
    when it holds code.
    """
    found: set[Path] = set()
    waiting = [entry.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += [file for name in names for file in _files_of(name)]
    return sorted(path.relative_to(ROOT) for path in found if path.stat().st_size)


def _files_of(module: str) -> list[Path]:
    parts = module.split(".")
    if parts[0] != "stages":
        return []
    base = ROOT.joinpath(*parts)
    candidates = [base.with_suffix(".py"), base / "__init__.py"]
    return [path for path in candidates if path.is_file()]
