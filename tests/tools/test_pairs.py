"""pairs: which pairs are drawn, and what is marked in them."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from stages.core.errors import UserError
from stages.core.records import write_jsonl
from stages.tools import pairs

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
    rows = [pair(i, "coherence" if i % 4 == 0 else "correctness") for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, rows)
    return path


def output(path: Path, width: int = 80, colour: bool = False, **options: Any) -> str:
    stream = io.StringIO()
    system = "standard" if colour else None
    console = Console(file=stream, width=width, highlight=False, force_terminal=colour, color_system=system)
    pairs.main(path, console=console, **options)
    text = stream.getvalue()
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in text.splitlines()) <= width
    return text


def drawn(text: str) -> list[str]:
    return re.findall(r"^\w+ (q\d+)/0 > q\d+/3", text, re.MULTILINE)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_pair_side_by_side(file: Path, width: int) -> None:
    """What differs is marked, and only that; facts stand below."""
    text = output(file, width, sample=1, question="q8")
    lines = [re.sub(r" {2,}", "  ", line).strip() for line in text.splitlines()]
    assert lines[0] == "coherence q8/0 > q8/3, margin 0.750 (1 of 1, 1 in all)"
    assert "Ann has 3 bags of 4 [apples]. How many?" in lines
    words = " ".join(text.split())
    assert words.count("[12]") == words.count("[13]") == 2
    assert words.count("[eats]") == words.count("[drops]") == 1
    assert "#### 10  #### 10" in lines
    for line in (
        "reward  1.250  0.500",
        "s_cf  0.125  0.125",
        "s_wm  0.750  0.000",
        "tokens  1,200 (+50)  1,150",
        "finish  cut off",
    ):
        assert line in lines


def test_colours_instead_of_marks(file: Path) -> None:
    text = output(file, colour=True, sample=1)
    assert "[12]" not in text and "[eats]" not in text
    assert re.search(r"\x1b\[1;7;32meats\x1b\[0m", text) and re.search(r"\x1b\[1;7;31mdrops\x1b\[0m", text)


def test_sample(file: Path) -> None:
    """As many as asked for, in the file's order, the same for one seed, others for another."""
    first = drawn(output(file))
    assert len(first) == 5 and first == drawn(output(file))
    assert [int(name[1:]) for name in first] == sorted(int(name[1:]) for name in first)
    assert first != drawn(output(file, seed=1))
    assert len(drawn(output(file, sample=100))) == 40
    assert "(1 of 5, 40 in all)" in output(file)


def test_every_pair_has_the_same_chance() -> None:
    """3 of 10, over 2,000 seeds: each is drawn about 600 times (five standard deviations allowed)."""
    counts: Counter[int] = Counter()
    for seed in range(2000):
        kept, total = pairs.draw(iter([{"n": n} for n in range(10)]), 3, seed)
        assert total == 10
        counts.update(row["n"] for row in kept)
    assert all(abs(counts[n] - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for n in range(10))


def test_only_what_is_shown_is_kept() -> None:
    """Twenty thousand pairs pass through; at no time are more than the sample alive."""
    alive = [0, 0]

    class Row(dict[str, Any]):
        def __init__(self) -> None:
            alive[0] += 1
            alive[1] = max(alive)

        def __del__(self) -> None:
            alive[0] -= 1

    kept, total = pairs.draw((Row() for _ in range(20_000)), 4, 0)
    assert total == 20_000 and len(kept) == 4 and alive[1] <= 6


def test_kind_and_question(file: Path) -> None:
    assert set(drawn(output(file, kind="coherence", sample=50))) == {f"q{i}" for i in range(0, 40, 4)}
    assert drawn(output(file, question="q7")) == ["q7"]


def test_files_from_elsewhere(tmp_path: Path) -> None:
    """Two texts are enough; length is in characters where there are no tokens."""
    path = tmp_path / "bare.jsonl"
    write_jsonl(path, [{"chosen": "a b", "rejected": "a c d"}])
    text = output(path)
    assert "pair chosen > rejected (1 of 1, 1 in all)" in text
    assert re.search(r"a \[b\] +a \[c d\]", text)
    assert re.search(r"length +3 characters +5 characters", text) and "reward" not in text


@pytest.mark.parametrize(
    ("record", "options", "words"),
    [
        ({}, {"kind": "luck"}, "--kind: 'luck' is unknown; choose one of coherence, correctness"),
        ({}, {"question": "q5"}, "holds no pairs from question 'q5'; `python -m stages explain` says why"),
        ({}, {"kind": "coherence"}, "holds no pairs of kind coherence"),
        ({"chosen": 3}, {}, ":1: field 'chosen' must be str"),
        ({"margin": "big"}, {}, "pair 'q0/0>3': field 'margin' must be a number, found 'big'"),
        ({"chosen_signals": [1]}, {}, "field 'chosen_signals' must be an object"),
        ({"rejected_signals": {"s_wm": "x"}}, {}, "field 's_wm' must be a number"),
    ],
)
def test_bad_input(tmp_path: Path, record: dict[str, Any], options: dict[str, Any], words: str) -> None:
    path = tmp_path / "bad.jsonl"
    write_jsonl(path, [pair(0, **record)])
    with pytest.raises(UserError) as error:
        output(path, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_missing_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        output(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"holds no pairs$"):
        output(tmp_path / "empty.jsonl")


def test_whole_phrases_and_white_space() -> None:
    """A space between two marked words is marked with them; one that alone differs is marked too."""
    assert pairs.differences("so he has ten now", "so she had ten now") == (
        [("so ", False), ("he has", True), (" ten now", False)],
        [("so ", False), ("she had", True), (" ten now", False)],
    )
    assert pairs.differences("a b", "a  b")[1] == [("a", False), ("  ", True), ("b", False)]
    assert pairs.differences("same", "same") == ([("same", False)], [("same", False)])


def test_long_texts_by_lines() -> None:
    """Thousands of lines: only the words of the line that differs are marked."""
    lines = [f"Step {i}: {i}+1={i + 1}" for i in range(3000)]
    other = [*lines[:1500], "Step 1500: 1500+1=1502", *lines[1501:], "more"]
    left, right = pairs.differences("\n".join(lines), "\n".join(other))
    assert next(text for text, differs in left if differs) == "1501"
    assert next(text for text, differs in right if differs) == "1502"
    assert sum(len(text) for text, differs in right if differs) < 60


@given(st.text(alphabet="ab 1.+\n", max_size=40), st.text(alphabet="ab 1.+\n", max_size=40))
def test_pieces_add_up_and_the_rest_is_common(a: str, b: str) -> None:
    left, right = pairs.differences(a, b)
    assert "".join(text for text, _ in left) == a and "".join(text for text, _ in right) == b
    common = [
        "".join("".join(text for text, differs in side if not differs).split()) for side in (left, right)
    ]
    assert common[0] == common[1]
