"""ask --samples: several solutions are drawn and vote, with a random model or with completions made up here."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.policy.adapter import load_tokenizer
from stages.policy.request import Completion, Request
from stages.run.errors import UserError
from stages.tools import ask, ask_samples
from tests.policy import make_project
from tests.regime_w.worked_example import QUESTION, TEXTS
from tests.tools.screen import printed, words

REPO = Path(__file__).resolve().parents[2]
SLIP = "<<3*4=12>>12 <<12-2=11>>11\n#### 11"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ask") / "project"
    make_project(root)
    shutil.copy(REPO / "stages" / "regime_w" / "signals.py", root / "scorer.py")
    return root


@pytest.fixture
def workplace(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


class Told:
    """An engine that writes what it is told, and keeps the requests."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.requests: list[Request] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        self.requests, tokenizer = list(requests), load_tokenizer()
        for request, text in reversed([*zip(self.requests, self.texts, strict=True)]):
            ids = tokenizer.encode(text, add_special_tokens=False)
            yield Completion(request.id, tuple(ids), "stop" if text else "length", -1.0)


def asked(texts: list[str], monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[str, Told]:
    engine = Told(texts)
    monkeypatch.setattr(ask_samples, "load_engine", lambda adapter, hardware: engine)
    return printed(ask.main, QUESTION, policy="base", samples=len(texts), **options), engine


def test_a_coherent_minority_is_chosen(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slip alike; two are right, for the same reasons. The solution shown is a right one."""
    shown, _ = asked([SLIP, SLIP, TEXTS[2], TEXTS[0], SLIP, TEXTS[1], ""], monkeypatch)
    said = words(shown)
    assert "7 samples at temperature 0.9, weighted by s_cf" in said
    assert "1 11 0.010 2 11 0.010 3 10 " in said and "7 none 0.010 cut" in said
    assert said.index("10: 3 of 7 samples, ") < said.index("11: 3 of 7 samples, ")
    assert shown.endswith(f"\nsample 4\n{TEXTS[0]}\nanswer: 10\n")


def test_what_is_drawn_follows_the_options(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = asked([SLIP] * 3, monkeypatch, temperature=0.3, seed=5, max_new_tokens=7)
    assert {(one.temperature, one.max_new_tokens) for one in engine.requests} == {(0.3, 7)}
    assert len({one.seed for one in engine.requests}) == 3
    _, other = asked([SLIP] * 3, monkeypatch, seed=6)
    assert not {one.seed for one in engine.requests} & {one.seed for one in other.requests}


def test_nothing_to_choose(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, _ = asked(["I cannot say.", ""], monkeypatch)
    assert shown.endswith("no sample has an answer\n")


def test_a_real_engine_draws_them(workplace: Path) -> None:
    shown = printed(ask.main, QUESTION, policy="base", samples=3)
    assert "3 samples at temperature" in words(shown)
    assert shown == printed(ask.main, QUESTION, policy="base", samples=3)


def test_a_scorer_that_is_not_there_is_named_first(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "scorer.py").rename(workplace / "away.py")
    try:
        with pytest.raises(UserError, match=r"regime_w\.scorer: scorer\.py is not a file"):
            asked([SLIP] * 2, monkeypatch)
    finally:
        (workplace / "away.py").rename(workplace / "scorer.py")
