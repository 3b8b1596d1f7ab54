"""1,319 real groups of four through coherence and preference: what docs/regime-w.md says of them holds.

The groups are OpenAI's GSM8K example solutions, turned into rollouts by the same function that
bench/signals.py uses. The stages run once for all tests.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stages import coherence, preference
from stages.regime_w.voting import Voter
from stages.run.files import read_json, read_jsonl, write_jsonl
from stages.run.params import load_params
from stages.run.paths import LAST_ROUND
from stages.stats.vote import VoteSummary

REPO = Path(__file__).resolve().parents[1]
REAL = REPO.parent / "shared" / "data" / "gsm8k" / "example_model_solutions.jsonl"
SHIPPED = REPO / "stages" / "regime_w" / "signals.py"
pytestmark = pytest.mark.skipif(not REAL.is_file(), reason="the shared GSM8K files are not on this machine")


@dataclass(frozen=True)
class Made:
    """What both stages wrote."""

    records: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    metrics: dict[str, Any]
    summary: dict[str, Any]


def bench(name: str) -> ModuleType:
    """bench/NAME.py as a module; its neighbours are importable while it loads, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "bench")
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("real")
    shutil.copytree(REPO / "tests" / "small", place, dirs_exist_ok=True)
    (place / "scorer.py").symlink_to(REPO / "stages" / "regime_w" / "signals.py")
    with contextlib.chdir(place):
        rollouts, scored, pairs = Path("rollouts.jsonl"), Path("scored.jsonl"), Path("pairs.jsonl")
        write_jsonl(rollouts, bench("common").groups_of_four(REAL))
        coherence.main(LAST_ROUND, rollouts, scored, Path("regime_w.json"), Path("plots"), 1)
        preference.main(LAST_ROUND, scored, pairs, Path("preference.json"))
        return Made(
            list(read_jsonl(scored)),
            list(read_jsonl(pairs)),
            read_json(Path("regime_w.json")),
            read_json(Path("preference.json")),
        )


def test_equations_read_and_skipped(made: Made) -> None:
    """A change of these figures may be an improvement: look at what changed, then say it in the docs."""
    equations = made.metrics["equations"]
    assert (equations["read"], equations["skipped"]) == (16_945, 359)
    assert f"{equations['read']:,} equations read, {equations['skipped']} skipped" in (
        REPO / "docs" / "regime-w.md"
    ).read_text(encoding="utf-8")


def test_pairs(made: Made) -> None:
    """Both kinds exist, and coherence pairs do not simply prefer short or long texts."""
    kinds = Counter(pair["kind"] for pair in made.pairs)
    assert kinds == {kind: made.summary[kind]["pairs"] for kind in ("correctness", "coherence")}
    assert kinds["correctness"] > 1_900
    assert kinds["coherence"] > 100
    lengths = [
        len(pair["chosen"]) - len(pair["rejected"]) for pair in made.pairs if pair["kind"] == "coherence"
    ]
    not_shorter = sum(length >= 0 for length in lengths) / len(lengths)
    assert made.summary["coherence"]["chosen_not_shorter"] == not_shorter
    assert 0.4 < not_shorter < 0.6


@pytest.mark.parametrize(
    ("signal", "overall", "within"),
    [
        ("s_end", 0.878, 0.763),
        ("s_path", 0.844, 0.754),
        ("s_cf", 0.864, 0.747),
        ("s_wm", 0.886, 0.777),
    ],
)
def test_right_over_wrong(made: Made, signal: str, overall: float, within: float) -> None:
    """Known figures, from annotated equations only; reading prose too moves the third digit."""
    ranks = bench("signals").ranks(made.metrics, "metrics")
    asked = ranks["right over wrong, overall"], ranks["right over wrong, within a question"]
    assert math.isclose(asked[0][signal].auc, overall, abs_tol=0.01)
    assert math.isclose(asked[1][signal].auc, within, abs_tol=0.01)
    interval = made.metrics["correct_over_wrong"][signal]["overall"]
    assert interval["low"] < overall < interval["high"] and interval["high"] - interval["low"] < 0.04
    for one in asked:
        assert "does not beat" not in bench("signals").against(one[signal], one["length"].strength)


def test_sound_over_lucky(made: Made) -> None:
    """s_cf, and s_wm through it, tell sound from lucky better than length; s_end and s_path do not."""
    signals = bench("signals")
    asked = signals.ranks(made.metrics, "metrics")["sound over lucky"]
    bar = asked["length"].strength
    assert signals.against(asked["s_cf"], bar) == signals.against(asked["s_wm"], bar) == "beats length"
    assert signals.against(asked["s_end"], bar).startswith("does not beat length")
    assert signals.against(asked["s_path"], bar).startswith("does not beat length")
    assert asked["s_end"].auc == 0.5  # correct ones of a question share their answer


def test_votes(made: Made) -> None:
    """Reach elects better than the majority, by as much as the docs say; its weights shuffled, worse."""
    voter = Voter(
        load_params(REPO / "tests" / "small").regime_w.model_copy(update={"scorer": str(SHIPPED)}), "reach"
    )
    summary = VoteSummary("reach")
    for record in made.records:
        samples = [
            {"completion": row["text"], "answer": row["answer"], "correct": row["correct"]}
            for row in record["trajectories"]
        ]
        row = {"id": record["id"], "samples": samples}
        summary.add(row, voter.weigh(record["question"], samples, record["id"]))
    votes = summary.metrics()
    assert votes["difference_low"] > 0.015 and votes["p"] < 1e-6
    assert votes["control_difference_high"] < 0
    docs = (REPO / "docs" / "regime-w.md").read_text(encoding="utf-8")
    change, low, high = (100 * votes[f"difference{end}"] for end in ("", "_low", "_high"))
    assert f"| **{change:+.1f}** ({low:+.1f} to {high:+.1f}) | {votes['p']:.0e}" in docs
    assert f"(majority {100 * votes['maj_at_4']:.1f}, ceiling {100 * votes['pass_at_4']:.1f}; " in docs
    for rule in ("s_path", "s_cf", "s_wm"):
        one = votes["by"][rule]
        change, low, high = (100 * one[f"difference{end}"] for end in ("", "_low", "_high"))
        assert f"| {rule} | {change:+.1f} ({low:+.1f} to {high:+.1f}) | {one['p']:.2f} |" in docs
