"""ask: one plain model call that shows the solution as it comes. tests/pipeline/test_ask.py asks a trained model."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from stages.run.errors import UserError
from stages.text.answers import read_answer
from stages.tools import ask
from tests.policy import greedy, make_project

QUESTION = "Ann has 3 bags of 4 apples. How many?"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' parameters, and a random model with several end tokens and settings that evaluation ignores."""
    root = tmp_path_factory.mktemp("ask") / "project"
    make_project(root)
    return root


@pytest.fixture
def workplace(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def asked(question: str, **options: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        ask.main(question, **{"policy": "base", **options})
    return out.getvalue()


def test_greedy_is_the_evaluations(workplace: Path) -> None:
    """Every end token of the generation config ends it; its penalties and sampling settings do not count."""
    questions = [f"Ann has {i} bags. How many?" for i in range(12)]
    wanted = greedy(None, questions)
    assert {finish for *_, finish in wanted} == {"stop", "length"}
    for question, (text, _, finish) in zip(questions, wanted, strict=True):
        shown = asked(question)
        assert shown.startswith(f"{text}\nanswer: ")
        assert ("(cut at" in shown) == (finish == "length")


def test_it_comes_token_by_token(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is on the screen grows with nearly each token, and ends as the whole text decoded at once."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(workplace / "checkpoints" / "base")
    ids = tokenizer.encode("Ann's 3 bags: ½ each,  说 😀\n#### 12")
    stream = ask.Stream(tokenizer, "<think>\n", {2})
    stream.put(torch.tensor([[1, 5, 6]]))
    pieces = [capsys.readouterr().out]
    assert pieces == ["<think>\n"]
    for number in [*ids, 2]:
        stream.put(torch.tensor([number]))
        pieces.append(capsys.readouterr().out)
    stream.end()
    assert "".join(pieces) == stream.text == "<think>\n" + tokenizer.decode(ids)
    assert "😀" in stream.text and "\ufffd" not in stream.text
    assert sum(map(bool, pieces)) > 15


def test_drawn_answers_follow_the_seed(workplace: Path) -> None:
    one, again, other = (asked(QUESTION, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert one != asked(QUESTION)


def test_length_by_option(workplace: Path) -> None:
    assert "(cut at 2 tokens" in asked(QUESTION, max_new_tokens=2)


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        ("3*4=12\n#### 12", ["answer: 12"]),
        ("That makes 12 apples.", ["answer: none marked; the last number is 12"]),
        ("I cannot say.", ["answer: none"]),
        (
            "#### 12\nQuestion: and 5?",
            ["answer: 12", "(it holds a piece of the prompt or of another problem)"],
        ),
    ],
)
def test_what_is_said_of_the_answer(reading: str, words: list[str]) -> None:
    assert list(ask._words(read_answer(reading, QUESTION))) == words


def test_standard_input(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` is the standard input. Bytes that are not UTF-8 are one line, there and on the command line."""

    def given(words: bytes) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(words)))
        return asked("-")

    assert given(f"\ufeff{QUESTION}\n".encode()) == asked(QUESTION)
    for call in (lambda: given(b"Ann's caf\xe9"), lambda: asked("Ann's caf\udce9")):
        with pytest.raises(
            UserError, match=r"^ask: the question is not text in UTF-8 \('utf-8' codec can't .*\)$"
        ):
            call()


def test_mistakes(workplace: Path) -> None:
    """One line that says what to do, before anything slow."""
    for question, options, words in (
        (QUESTION, {"policy": "sft"}, r"^checkpoints/sft_lora: is missing; run `dvc repro` .* or `dvc pull`"),
        (" ", {}, "the question is empty"),
    ):
        with pytest.raises(UserError, match=words):
            asked(question, **options)
