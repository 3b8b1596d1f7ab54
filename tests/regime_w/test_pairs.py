"""Both kinds of pairs: never a faulty chosen text or an identical pair, and every refusal counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.regime_w.pairs import REASONS, make_pairs
from stages.run.params import Preference, PreferenceKind


def params(
    correctness: tuple[int, int, float] = (4, 2, 0.01),
    coherent: tuple[int, int, float] = (1, 1, 0.01),
    **on: bool,
) -> Preference:
    kinds = [
        PreferenceKind(per_question=n, per_trajectory=m, min_margin=d) for n, m, d in (correctness, coherent)
    ]
    off = dict.fromkeys(("sound_only", "drop_suspects", "length_balance"), False)
    return Preference(correctness=kinds[0], coherence=kinds[1], **off | on)


def row(index: int, correct: bool, reward: float, text: str = "", **more: Any) -> dict[str, Any]:
    text = text or f"text {index}\n#### {10 if correct else index}"
    base = {
        "id": f"q/{index}",
        "arm": f"arm{index}",
        "style": "plain",
        "text": text,
        "tokens": 10,
        "finish": "stop",
    }
    signals = {"fault": None, "soundness": "sound", "s_end": 0.5, "s_path": 0.5, "s_cf": 0.5, "s_wm": 0.5}
    return {**base, "correct": correct, "reward": reward, **signals, **more}


def question(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"id": "q", "question": "How many?", "gold": "10", "trajectories": list(rows)}


def pairs_of(
    *rows: dict[str, Any], limits: Preference | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return make_pairs(iter([question(*rows)]), limits or params())


def ids(pairs: list[dict[str, Any]], kind: str = "") -> list[str]:
    return [pair["id"] for pair in pairs if kind in ("", pair["kind"])]


def test_both_kinds_largest_margin_first() -> None:
    pairs, summary = pairs_of(row(0, True, 1.2), row(1, True, 1.5), row(2, False, 0.3), row(3, False, 0.1))
    assert ids(pairs, "correctness") == ["q/1>3", "q/1>2", "q/0>3", "q/0>2"]
    assert ids(pairs, "coherence") == ["q/1>0"]
    assert summary["coherence"]["mean_margin"] == pytest.approx(0.3)
    assert summary["correctness"]["refused"] == dict.fromkeys(REASONS, 0)


def test_pair_record_can_be_traced_back() -> None:
    pairs, _ = pairs_of(row(0, True, 1.2, s_cf=0.9), row(1, False, 0.2, finish="length", tokens=40))
    assert pairs == [
        {
            "id": "q/0>1", "kind": "correctness", "question_id": "q", "prompt": "How many?",
            "chosen": "text 0\n#### 10", "rejected": "text 1\n#### 1", "chosen_id": "q/0", "rejected_id": "q/1",
            "chosen_reward": 1.2, "rejected_reward": 0.2, "margin": 1.0, "chosen_tokens": 10, "rejected_tokens": 40,
            "chosen_signals": {"s_end": 0.5, "s_path": 0.5, "s_cf": 0.9, "s_wm": 0.5},
            "rejected_signals": {"s_end": 0.5, "s_path": 0.5, "s_cf": 0.5, "s_wm": 0.5}, "rejected_finish": "length",
        }
    ]  # fmt: skip
    assert list(pairs[0])[-1] == "rejected_finish"


def test_limits_per_question_and_trajectory() -> None:
    rows = [row(i, True, 2 - i / 10) for i in range(3)] + [row(i, False, 0) for i in range(3, 6)]
    pairs, summary = pairs_of(*rows, limits=params(correctness=(4, 2, 0.01), coherent=(2, 1, 0.01)))
    assert ids(pairs, "correctness") == ["q/0>3", "q/0>4", "q/1>3", "q/1>4"]
    assert ids(pairs, "coherence") == ["q/0>2"]
    assert summary["correctness"]["refused"]["trajectory_limit"] == 1
    assert summary["correctness"]["refused"]["question_limit"] == 4
    assert summary["coherence"]["refused"]["trajectory_limit"] == 2


def test_one_style_first_among_equals() -> None:
    rows = [row(0, True, 1, style="a"), row(1, False, 0, style="b"), row(2, False, 0, style="a")]
    pairs, summary = pairs_of(*rows, limits=params(correctness=(1, 1, 0.01)))
    assert ids(pairs) == ["q/0>2"]
    assert summary["correctness"]["across_styles"] == 0


@pytest.mark.parametrize("fault", ["truncated", "leaking", "empty", "answerless"])
def test_a_trajectory_with_a_fault_is_never_chosen(fault: str) -> None:
    """It may be rejected."""
    rows = [row(0, True, 1.5, fault=fault), row(1, True, 1.0), row(2, False, 0, fault=fault)]
    pairs, summary = pairs_of(*rows)
    assert ids(pairs) == ["q/1>2"]
    assert summary["correctness"]["refused"][fault] == 1
    assert summary["coherence"]["refused"][fault] == 1


def test_identical_texts_never_pair_and_no_pair_is_repeated() -> None:
    twins = [row(0, True, 1.5, "a\n#### 10"), row(1, True, 1.2, "a\n#### 10 "), row(2, False, 0)]
    pairs, summary = pairs_of(*twins)
    assert ids(pairs) == ["q/0>2"]
    assert summary["coherence"]["refused"]["identical"] == 1
    assert summary["correctness"]["refused"]["repeated"] == 1


def test_small_margins_are_refused() -> None:
    pairs, summary = pairs_of(row(0, True, 1.005), row(1, True, 1.0))
    assert pairs == []
    assert summary["coherence"]["refused"]["margin"] == 1
    assert summary["questions_all_correct"] == 1


def test_suspect_questions_can_be_left_out() -> None:
    """Only when asked for, and every candidate is counted."""
    record = {**question(row(0, True, 1.5), row(1, True, 1.2), row(2, False, 0.1)), "suspect": True}
    assert len(make_pairs(iter([record]), params())[0]) == 3
    pairs, summary = make_pairs(iter([record]), params(drop_suspects=True))
    assert pairs == [] and summary["questions_dropped_as_suspect"] == 1
    assert [summary[kind]["refused"]["suspect"] for kind in ("correctness", "coherence")] == [2, 1]


def test_sound_only() -> None:
    rows = [row(0, True, 1.5, soundness="lucky"), row(1, True, 1.2), row(2, False, 0)]
    pairs, summary = pairs_of(*rows, limits=params(sound_only=True))
    assert ids(pairs) == ["q/1>2"]
    assert summary["correctness"]["refused"]["not_sound"] == 1


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=30))
def test_length_balance(lengths: list[tuple[int, int]]) -> None:
    """What is left is less than any pair that could still be dropped; pairs are never made."""
    questions = [
        {**question(row(0, True, 1, tokens=chosen), row(1, False, 0, tokens=rejected)), "id": f"q{number}"}
        for number, (chosen, rejected) in enumerate(lengths)
    ]
    plain, _ = make_pairs(iter(questions), params())
    balanced, after = make_pairs(iter(questions), params(length_balance=True))
    assert len(plain) == len(balanced) + after["correctness"]["refused"]["length_balance"]
    left = sum(pair["chosen_tokens"] - pair["rejected_tokens"] for pair in balanced)
    total = sum(chosen - rejected for chosen, rejected in lengths)
    assert left * total >= 0
    assert abs(left) <= abs(total)
    differences = [pair["chosen_tokens"] - pair["rejected_tokens"] for pair in balanced]
    assert left == 0 or abs(left) < min(abs(one) for one in differences if one * left > 0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.integers(0, 3)), max_size=8))
def test_no_pair_breaks_a_rule(rows: list[tuple[bool, int, int]]) -> None:
    """Whatever the group: chosen is correct, rewards differ enough, texts differ, limits hold."""
    made = [
        row(i, right, reward / 8, f"t{text}\n#### {10 if right else 9}")
        for i, (right, reward, text) in enumerate(rows)
    ]
    pairs, _ = pairs_of(*made)
    right = {one["id"] for one in made if one["correct"]}
    used: dict[tuple[str, str], int] = {}
    for pair in pairs:
        assert pair["chosen_id"] in right
        assert (pair["rejected_id"] in right) == (pair["kind"] == "coherence")
        assert pair["margin"] >= 0.01
        assert pair["chosen"] != pair["rejected"]
        for one in (pair["chosen_id"], pair["rejected_id"]):
            used[pair["kind"], one] = used.get((pair["kind"], one), 0) + 1
    assert all(count <= (2 if kind == "correctness" else 1) for (kind, _), count in used.items())
    assert len(ids(pairs, "correctness")) <= 4
    assert len(ids(pairs, "coherence")) <= 1
    assert len(set(ids(pairs))) == len(pairs)
