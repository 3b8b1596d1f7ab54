"""Three families of models that differ most go through the stages by real commands; bench/families.py has all eight.

GPT-2 has learned positions, layers of another kind, and tied embeddings that get a row. Gemma 3 has windows, norms and
a head size of its own. Phi-3 has fused layers, a sentencepiece-like tokenizer, a chat template and three end tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stages.run.files import read_jsonl
from tests.families import commands, differing, make_place

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "phi3"])
def test_a_family_runs(name: str, small_project: Project, tmp_path: Path) -> None:
    project = replace(small_project, root=tmp_path / "place")
    make_place(name, project.root)
    for words in commands(tmp_path / "export").values():
        project.stages(*words)
    for row in read_jsonl(project.root / "data/rollouts/dpo.jsonl", {"trajectories": list}):
        assert all(one["logprob"] < 0 for one in row["trajectories"])
    # The engine's own cache and batches keep to the sliding windows, of 32 and 48 tokens.
    assert differing(project.root / "checkpoints/base") == 0
