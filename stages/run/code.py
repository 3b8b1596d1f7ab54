"""The code that a stage computes with: the dependencies under stages/ that dvc.yaml gives it.

    code_files("coherence")  ->  [stages/coherence.py, stages/regime_w/arms.py, ..., stages/text/answers.py]

DVC reruns a stage when one of these files changes, and a stage throws away half-done work for the same reason:
both read the one list in dvc.yaml.
"""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML

from stages.run.paths import PIPELINE, ROOT


def code_files(stage: str) -> list[Path]:
    """The files that dvc.yaml lists for `stage`, those of folders included, relative to the project, in order."""
    pipeline = YAML(typ="safe", pure=True).load((ROOT / PIPELINE).read_text(encoding="utf-8"))
    entry = pipeline["stages"][stage]
    entry = entry.get("do", entry)  # of a `foreach` stage
    found: set[Path] = set()
    for path in (ROOT / path for path in entry["deps"] if path.startswith("stages/")):
        files = path.rglob("*") if path.is_dir() else [path]
        found.update(file.relative_to(ROOT) for file in files if file.is_file() and file.suffix != ".pyc")
    return sorted(found)
