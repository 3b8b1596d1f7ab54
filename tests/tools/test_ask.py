"""ask: one plain model call that shows the solution as it comes. tests/pipeline/test_ask.py asks a trained model."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from stages.run.errors import UserError
from stages.run.params import load_params
from stages.text.answers import read_answer
from stages.tools import ask
from tests.tools.random_run import SMALL, greedy, make_project

REPO = Path(__file__).resolve().parents[2]
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


def asked(question: str | None, **options: Any) -> str:
    out = io.StringIO()
    ask.main(question, **{"policy": "base", **options}, out=out)
    return out.getvalue()


def test_greedy_is_the_evaluations(workplace: Path) -> None:
    """Every end token of the generation config ends it; its penalties and sampling settings do not count."""
    questions = [f"Ann has {i} bags. How many?" for i in range(12)]
    wanted = greedy(None, questions)
    assert {finish for *_, finish in wanted} == {"stop", "length"}
    screen = io.StringIO()
    answer = ask._answerer(load_params(), "base", 0.0, 0, 64, screen)
    for question, (text, _, finish) in zip(questions, wanted, strict=True):
        before = len(screen.getvalue())
        reading, ended = answer(question)
        assert screen.getvalue()[before:] == text
        assert reading == read_answer(text, question)
        assert ended == (finish == "stop")


def test_it_comes_token_by_token(workplace: Path) -> None:
    """What is on the screen grows with nearly each token, and ends as the whole text decoded at once."""

    class Screen(io.StringIO):
        pieces = 0

        def write(self, text: str) -> int:
            self.pieces += 1
            return super().write(text)

    tokenizer = PreTrainedTokenizerFast.from_pretrained(workplace / "checkpoints" / "base")
    ids = tokenizer.encode("Ann's 3 bags: ½ each,  说 😀\n#### 12")
    screen = Screen()
    stream = ask.Stream(tokenizer, "<think>\n", {2}, screen)
    stream.put(torch.tensor([[1, 5, 6]]))
    assert screen.getvalue() == "<think>\n"
    for number in [*ids, 2]:
        stream.put(torch.tensor([number]))
        assert "\ufffd" not in screen.getvalue()
    stream.end()
    assert screen.getvalue() == stream.text == "<think>\n" + tokenizer.decode(ids)
    assert "😀" in stream.text
    assert 15 < screen.pieces <= len(ids) + 1


def test_drawn_answers_follow_the_seed(workplace: Path) -> None:
    one, again, other = (asked(QUESTION, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    assert one != asked(QUESTION)


def test_length_by_option(workplace: Path) -> None:
    assert "(cut at 2 tokens" in asked(QUESTION, max_new_tokens=2)


def test_question_from_standard_input(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    assert asked("-") == asked(QUESTION)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("typed", [f"{QUESTION}\n{QUESTION}\n\nnever\n", f"{QUESTION}\n{QUESTION}\n"])
def test_questions_typed_in_a_terminal(workplace: Path, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    """Until an empty line, or the end of the input; every question stands for itself."""
    monkeypatch.setattr("sys.stdin", Terminal(typed))
    assert asked(None, temperature=1.0) == 2 * asked(QUESTION, temperature=1.0)


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
    assert list(ask._words(read_answer(reading, QUESTION), True, 9)) == words


def test_mistakes(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to do, before anything slow."""
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for question, options, words in (
        (QUESTION, {"policy": "sft"}, r"^checkpoints/sft_lora: is missing; run `dvc repro` .* or `dvc pull`"),
        (QUESTION, {"policy": "best"}, "no policy 'best'; choose one of base, sft, dpo"),
        (QUESTION, {"temperature": -1.0}, "--temperature -1.0: must be from 0"),
        (QUESTION, {"max_new_tokens": 0}, "--max-new-tokens 0: must be 1 or more"),
        (None, {}, "no question; write it behind the command"),
        ("-", {}, "the question is empty"),
        (" ", {}, "the question is empty"),
    ):
        with pytest.raises(UserError, match=words):
            asked(question, **options)


def test_missing_checkpoint_is_said_without_loading_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from stages.tools import ask\n"
        "try: ask.main('How many?')\n"
        "except Exception as error: print(error)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    for name in ("params.yaml", "profiles/small.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((SMALL / name).read_text())
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPO)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("checkpoints/base: is missing; run `dvc repro`")
