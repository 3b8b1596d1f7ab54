"""trace and export on the small run: a pair and an answer back to the base, and a folder that lives without us."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

# In a folder of its own, with nothing of this project to import: several questions put to the exported model.
ASK = """
import json, re, sys, torch, transformers
source, folder, questions = open("README.md").read(), ".", json.load(open(sys.argv[1]))
code = re.search(r"^```python\\n(.*?)^```", source, re.MULTILINE | re.DOTALL)[1]
load, rest = code.split("text = ")
exec(load)
for question in questions:
    exec("text = " + rest)
assert not [name for name in sys.modules if name.split(".")[0] in ("stages", "peft")]
"""


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_pair_and_an_answer_are_traced_to_the_base(small_run: Project) -> None:
    pair = rows_of(small_run.root / "data/coherence_preferences/dpo.jsonl")[-1]
    found = json.loads(small_run.stages("trace", pair["id"], "--json").stdout)
    assert not found["broken"]
    assert any("was trained on this pair" in note for note in found["notes"])
    assert {step["source"] for step in found["steps"]} == {"manifest"}
    links = [*found["links"], *(link for step in found["steps"] for link in step["links"])]
    assert {link["state"] for link in links} == {"as recorded"}
    # The arm is one of the profile's, and both seeds follow from the run's.
    chosen = found["pair"]["chosen"]
    assert f"    {chosen['arm']}: " in (small_run.root / "profiles/tiny.yaml").read_text(encoding="utf-8")
    assert chosen["temperature"] and chosen["logprob"] < 0
    assert sum("seed" in link["path"] for link in found["links"]) == 2
    answer = rows_of(small_run.root / "data/platinum_eval/dpo.jsonl")[0]
    shown = small_run.stages("trace", answer["id"]).stdout
    assert "Every link that could be checked holds." in shown
    assert all(f"evaluate@{policy}" in shown for policy in ("base", "sft", "dpo"))


def test_an_exported_policy_answers_alike_in_plain_transformers(small_run: Project, tmp_path: Path) -> None:
    folder = tmp_path / "looper-dpo"
    shown = small_run.stages("export", "--policy", "dpo", str(folder)).stdout
    facts = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    assert (facts["unmerged"]["questions"], facts["unmerged"]["changed_answers"]) == (50, 0), shown
    assert facts["unmerged"]["largest_logit_difference"] < 1e-3
    rows = rows_of(small_run.root / "data/platinum_eval/dpo.jsonl")[:5]
    (tmp_path / "questions.json").write_text(json.dumps([row["question"] for row in rows]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", ASK, "../questions.json"], cwd=folder, env=small_run.environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    assert done.stdout == "".join(row["completion"] + "\n" for row in rows)
