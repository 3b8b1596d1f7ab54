"""pairs: which pairs are drawn, and what is marked in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.run.errors import UserError
from stages.run.files import write_jsonl
from stages.tools import pairs
from tests.tools.screen import printed, words

CHOSEN = "Ann has <<3*4=12>>12 apples.\nShe eats two of them.\n#### 10"
REJECTED = "Ann has <<3*4=13>>13 apples.\nShe drops two of them.\n#### 10"


def pair(number: int, kind: str = "correctness", **change: Any) -> dict[str, Any]:
    signals = {"s_end": 0.5, "s_path": 0.25, "s_cf": 0.125, "s_wm": 0.75}
    record = {
        "id": f"q{number}/0>3",
        "kind": kind,
        "question_id": f"q{number}",
        "prompt": "Ann has 3 bags of 4 [apples]. How many?",
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "chosen_id": f"q{number}/0",
        "rejected_id": f"q{number}/3",
        "chosen_reward": 1.25,
        "rejected_reward": 0.5,
        "margin": 0.75,
        "chosen_tokens": 1200,
        "rejected_tokens": 1150,
        "chosen_signals": signals,
        "rejected_signals": {**signals, "s_wm": 0.0},
        "rejected_finish": "length",
    }
    return record | change


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Forty pairs, every fourth of kind coherence."""
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [pair(i, "coherence" if i % 4 == 0 else "correctness") for i in range(40)])
    return path


def drawn(text: str) -> list[int]:
    return [int(name) for name in re.findall(r"^\w+ q(\d+)/0 > q\d+/3", text, re.MULTILINE)]


@pytest.mark.parametrize("width", [60, 120])
def test_a_pair_side_by_side(file: Path, width: int) -> None:
    """What differs is marked, and only that; facts stand below."""
    text = printed(pairs.main, file, sample=1, question="q8", width=width)
    lines = [re.sub(r" {2,}", "  ", line).strip() for line in text.splitlines()]
    assert lines[0] == "coherence q8/0 > q8/3, margin 0.750 (1 of 1, 1 in all)"
    assert "Ann has 3 bags of 4 [apples]. How many?" in lines
    assert words(text).count("[12]") == words(text).count("[13]") == 2
    assert words(text).count("[eats]") == words(text).count("[drops]") == 1
    assert "#### 10  #### 10" in lines
    facts = ("reward  1.250  0.500", "s_cf  0.125  0.125", "tokens  1,200 (+50)  1,150", "finish  cut off")
    assert set(facts) <= set(lines)


def test_sample(file: Path) -> None:
    """As many as asked for, in the file's order, the same for one seed, others for another; of a kind or question."""
    text = printed(pairs.main, file)
    first = drawn(text)
    assert len(first) == 5 and first == sorted(first) and "(1 of 5, 40 in all)" in text
    assert first == drawn(printed(pairs.main, file)) != drawn(printed(pairs.main, file, seed=1))
    assert drawn(printed(pairs.main, file, sample=100)) == list(range(40))
    assert drawn(printed(pairs.main, file, kind="coherence", sample=50)) == list(range(0, 40, 4))
    assert drawn(printed(pairs.main, file, question="q7")) == [7]


def test_files_from_elsewhere(tmp_path: Path) -> None:
    """Optional fields may be absent, and numbers may be text; line ends are not marked."""
    texts = {"prompt": "Why?", "chosen": "a b\nx", "rejected": "a c d\nx\n\nend"}
    odd = {"margin": None, "chosen_signals": {}, "rejected_signals": {"s_wm": "0.5"}, "chosen_tokens": None}
    write_jsonl(tmp_path / "odd.jsonl", [pair(0, **texts, **odd, question_id=7, rejected_reward="0.25")])
    text = printed(pairs.main, tmp_path / "odd.jsonl", question="7")
    assert "margin –" in text and re.search(r"s_wm +– +0\.500", text) and "tokens" not in text
    assert re.search(r"reward +1\.250 +0\.250", text)
    assert re.search(r"a \[b\] +a \[c d\]", text)
    assert re.search(r"^ +\[end\]", text, re.MULTILINE) and text.count("[") == 3


@pytest.mark.parametrize(
    ("record", "options", "said"),
    [
        ({}, {"question": "q5"}, "holds no pairs from question 'q5'; `python -m stages explain` says why"),
        ({}, {"kind": "coherence"}, "holds no pairs of kind coherence"),
        ({"chosen": 3}, {}, "bad.jsonl:1: pair 'q0/0>3': field 'chosen' must be text, found 3"),
        ({"margin": "big"}, {}, ":1: pair 'q0/0>3': field 'margin' must be a number, found \"big\""),
        ({"chosen_signals": {"s_wm": True}}, {}, "'q0/0>3', chosen_signals: field 's_wm' must be a number"),
        ({"rejected_signals": None}, {}, "'q0/0>3', rejected_signals: an object is wanted, found null"),
    ],
)
def test_bad_input(tmp_path: Path, record: dict[str, Any], options: dict[str, Any], said: str) -> None:
    write_jsonl(tmp_path / "bad.jsonl", [pair(0, **record)])
    with pytest.raises(UserError) as error:
        printed(pairs.main, tmp_path / "bad.jsonl", **options)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_id_that_is_there_twice(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "bad.jsonl", [pair(0), pair(1), pair(0)])
    with pytest.raises(
        UserError, match=r"bad\.jsonl: lines 1 and 3 have the same id 'q0/0>3'; each may be there"
    ):
        printed(pairs.main, tmp_path / "bad.jsonl")


def test_one_line_of_a_long_text() -> None:
    """Thousands of lines: quick, and only what differs is marked."""
    lines = [f"Step {i}: {i}+1={i + 1}" for i in range(3000)]
    other = [*lines[:1500], "Step 1500: 1500+1=1502", *lines[1501:], "more"]
    left, right = pairs.differences("\n".join(lines), "\n".join(other))
    assert [text for text, differs in left if differs] == ["1501"]
    assert [text for text, differs in right if differs] == ["1502", "\nmore"]
    everything = pairs.differences("a " * 2000, "b " * 2000)
    assert everything == ([("a " * 2000, True)], [("b " * 2000, True)])


@given(st.text(alphabet="ab 1.+\n", max_size=40), st.text(alphabet="ab 1.+\n", max_size=40))
def test_pieces_add_up_and_the_rest_is_common(a: str, b: str) -> None:
    left, right = pairs.differences(a, b)
    assert "".join(text for text, _ in left) == a and "".join(text for text, _ in right) == b
    common = ["".join(text for text, differs in side if not differs) for side in (left, right)]
    assert common[0] == common[1]
