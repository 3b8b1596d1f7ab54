"""ask, with the trained policies of the small run: the evaluation's answers, and nothing of Regime W."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipeline.conftest import Project

pytestmark = pytest.mark.pipeline

# Asks through the command line's own door, then looks which modules that took.
CODE = """
import sys
from stages.__main__ import app
app([*sys.argv[1:]], standalone_mode=False)
loaded = [name for name in sys.modules if name.startswith("stages.")]
assert "stages.tools.ask" in loaded and not [name for name in loaded if "regime_w" in name], loaded
"""


@pytest.mark.parametrize("policy", ["base", "sft", "dpo"])
def test_greedy_answer_is_the_evaluations(small_run: Project, policy: str) -> None:
    lines = (small_run.root / f"data/platinum_eval/{policy}.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines[:2]):
        done = small_run.run("python", "-c", CODE, "ask", row["question"], "--policy", policy)
        solution, _, words = done.stdout.rpartition("\nanswer: ")
        assert solution == row["completion"]
        assert row["answer"] is None or words.startswith(f"{row['answer']}\n")


def test_samples_vote(small_run: Project) -> None:
    """Eight solutions are drawn; the one that is shown has the chosen answer. The same again, the same eight."""
    question = "Ann has 3 bags of 4 apples. First Ann gives away 2. How many apples does Ann have now?"
    shown = small_run.stages("ask", question, "--samples", "8").stdout
    assert "8 samples at temperature 0.9, weighted by reach" in shown
    solution, _, answer = shown.rstrip().rpartition("\nanswer: ")
    assert f"\n{answer}: " in solution and f"#### {answer}" in solution
    assert small_run.stages("ask", question, "--samples", "8").stdout == shown


def test_compare_and_grade_repeat_what_the_run_found(small_run: Project) -> None:
    """The graded log is the evaluation's, and the comparison the report's, but for twins, votes and other test sets."""
    sft, dpo = (f"data/platinum_eval/{policy}.jsonl" for policy in ("sft", "dpo"))
    compared = json.loads(small_run.stages("compare", sft, dpo, "--json").stdout)
    reported = json.loads((small_run.root / "metrics/comparison.json").read_text())["sft_to_dpo"]
    for name in ("changed", "both", "coherent", "tests"):
        del reported[name]
    for name, value in reported.items():
        words = value.replace("SFT", "sft").replace("DPO", "dpo") if isinstance(value, str) else value
        assert compared[name] == words, name
    out = small_run.guard / "graded.jsonl"
    graded = json.loads(small_run.stages("grade", dpo, "--out", str(out), "--json").stdout)
    assert out.read_bytes() == (small_run.root / dpo).read_bytes()
    details = json.loads((small_run.root / "metrics/platinum_details/dpo.json").read_text())
    # The bootstrap of evaluate has the run's seed; all else is the same to the last bit.
    others = ("_at_", "_hat_", "agreement", "changed", "both", "kept", "twin", "tests")
    exact = {name for name in details if not any(part in name for part in others)}
    assert {name: graded[name] for name in exact} == {name: details[name] for name in exact}
