"""Scores questions: the signals from the scorer that params.yaml names, then verdicts, rewards and suspicion.

    text, tally = score_batch(params, questions)    # lines of data/regime_w_rollouts/, and their counts

On each question it writes s_end s_path s_cf s_wm suspicion suspect suspect_answer; on each trajectory answer correct
fault soundness s_end s_path s_cf s_wm reward.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.regime_w import signals
from stages.regime_w.reward import reward_parts
from stages.regime_w.signals import SIGNALS, GroupAnalysis, GroupScore, Reasoning
from stages.regime_w.suspicion import suspicion
from stages.regime_w.tally import Tally
from stages.run.errors import UserError
from stages.run.files import jsonl_line
from stages.text.answers import Reading, gold_answer, read_answer, same_answer

if TYPE_CHECKING:
    from stages.regime_w.solution import Number
    from stages.run.params import RegimeW

ScoreGroup = Callable[..., Any]
ADDED_TO_QUESTION = (*SIGNALS, "suspicion", "suspect", "suspect_answer")
ADDED_TO_TRAJECTORY = ("answer", "correct", "fault", "soundness", *SIGNALS, "reward")


def score_batch(params: RegimeW, questions: Sequence[dict[str, Any]]) -> tuple[str, Tally]:
    """The scored lines of some questions (stages/regime_w/record.py types them), and the tally of what they hold.

    Raises UserError for a bad question.
    """
    scorer, tally = _scorer(params), Tally()
    return "".join([scorer.score(question, tally) for question in questions]), tally


class QuestionScorer:
    """Scores one question after the other with one set of parameters."""

    def __init__(self, params: RegimeW) -> None:
        self.path = Path(params.scorer)
        self.score_group = load_scorer(self.path)
        self.weights = (params.weights.s_end, params.weights.s_path, params.weights.s_cf)
        self.reward = params.reward
        self.suspect_from = params.suspect_from
        wants_weights = self.score_group and "weights" in inspect.signature(self.score_group).parameters
        self.options = {"weights": self.weights} if wants_weights else {}

    def score(self, record: dict[str, Any], tally: Tally) -> str:
        """One question's line with signals and rewards. Adds what it saw to `tally`.

        Raises UserError naming the question when its gold is no number, or the scorer fails.
        """
        name, question = record["id"], record["question"]
        gold = read_gold_answer(record)
        readings = [read_answer(row["text"], question) for row in record["trajectories"]]
        views = solution_views(record["trajectories"], readings)
        group = signals.analyse_group(question, views)
        score = self.signals(record, views, group)
        means = {signal: score.mean(signal) for signal in SIGNALS}
        gold_reasoning = read_gold(record.get("solution"), group.numbers)

        # Each trajectory: verdict, signals, reward.
        scored = []
        for index, trajectory in enumerate(record["trajectories"]):
            reasoning = group.reasonings[index]
            correct = same_answer(reasoning.answer, gold)
            soundness = None
            if correct:
                soundness = signals.judge(reasoning, gold_reasoning) if gold_reasoning else "unproven"
            s_wm, tokens = score.s_wm[index], trajectory.get("tokens")
            parts = reward_parts(correct, s_wm, means["s_wm"], means["s_end"], tokens, self.reward)
            # What an earlier scoring added is written again, in order.
            row = {key: value for key, value in trajectory.items() if key not in ADDED_TO_TRAJECTORY}
            row |= {
                "answer": reasoning.answer,
                "correct": correct,
                "fault": fault(trajectory, readings[index]),
                "soundness": soundness,
                "s_end": score.s_end[index],
                "s_path": score.s_path[index],
                "s_cf": score.s_cf[index],
                "s_wm": s_wm,
                "reward": parts.total,
            }
            scored.append(row)

        # The question: means, and whether its gold is suspect.
        doubt, other = suspicion(group.reasonings, [row["correct"] for row in scored])
        suspect = other is not None and doubt >= self.suspect_from
        tally.add(name, scored, group, suspect, bool(record.get("planted")))
        kept = {key: value for key, value in record.items() if key not in ADDED_TO_QUESTION}
        added = {**means, "suspicion": doubt, "suspect": suspect, "suspect_answer": other}
        try:
            line = jsonl_line({**kept, "trajectories": scored, **added})
            line.encode()
        except ValueError as error:
            raise UserError(f"question '{name}': cannot be written as JSON ({error})") from None
        return line

    def signals(
        self, record: dict[str, Any], views: list[dict[str, Any]], group: GroupAnalysis
    ) -> GroupScore:
        """The signals alone of one question; `views` as `solution_views` gives them, `group` their analysis."""
        return group.score(self.weights) if self.score_group is None else self._own_score(record, views)

    def _own_score(self, record: dict[str, Any], views: list[dict[str, Any]]) -> GroupScore:
        """The score from the user's own scorer, checked."""
        assert self.score_group is not None
        try:
            score = self.score_group(record["question"], views, **self.options)
        except Exception as error:
            raise UserError(
                f"{self.path}: question '{record['id']}': the scorer raised {type(error).__name__}: {error}"
            ) from error
        return checked_score(score, len(views), self.path, record["id"])


_scorer = cache(QuestionScorer)  # each process loads the scorer once


def load_scorer(path: Path) -> ScoreGroup | None:
    """`score_group` of a scorer file. None for the shipped scorer, whose reading of the texts is used directly.

    Raises UserError when the file is missing, cannot be loaded or has no such function.
    """
    if path.resolve() == Path(signals.__file__).resolve():
        return None
    if not path.is_file():
        raise UserError(
            f"params.yaml: regime_w.scorer: {path} is not a file; name a Python file with score_group"
        )
    try:
        spec = importlib.util.spec_from_file_location("regime_w_scorer", path)
        if spec is None or spec.loader is None:
            raise ImportError("not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: the scorer cannot be loaded ({type(error).__name__}: {error})") from error
    score_group = getattr(module, "score_group", None)
    if not callable(score_group):
        raise UserError(f"{path}: the scorer has no function score_group(question, trajectories)")
    return score_group


def checked_score(score: Any, size: int, scorer: Path, question_id: str) -> GroupScore:
    """A scorer's result (attributes or keys s_end s_path s_cf s_wm) as lists of floats.

    Raises UserError naming the question when a signal is missing, does not have `size` values, or holds anything but
    finite numbers in [0, 1].
    """
    where = f"{scorer}: question '{question_id}'"
    columns = []
    for name in SIGNALS:
        values = score.get(name) if isinstance(score, Mapping) else getattr(score, name, None)
        try:
            column = [float(value) for value in values]  # type: ignore[union-attr]
        except (TypeError, ValueError):
            raise UserError(f"{where}: {name} must be a list of numbers, found {values!r:.60}") from None
        if len(column) != size:
            raise UserError(f"{where}: {name} has {len(column)} values for {size} trajectories")
        for value in column:
            if not 0 <= value <= 1:  # also refuses NaN
                raise UserError(f"{where}: {name} holds {value}, outside [0, 1]")
        columns.append(column)
    return GroupScore(*columns)


def solution_views(
    trajectories: Sequence[Mapping[str, Any]], readings: Sequence[Reading]
) -> list[dict[str, Any]]:
    """The trajectories as a scorer gets them: `text` is the solution alone, `answer` what was read from it."""
    return [
        {**one, "text": one["text"][reading.start : reading.end], "answer": reading.answer}
        for one, reading in zip(trajectories, readings, strict=True)
    ]


def fault(trajectory: Mapping[str, Any], reading: Reading) -> str | None:
    """Why a trajectory may never be chosen in a pair: truncated, empty, leaking or answerless; None if it may."""
    if trajectory.get("finish") == "length":
        return "truncated"
    if reading.empty:
        return "empty"
    if reading.leak or reading.tail:
        return "leaking"
    return "answerless" if reading.answer is None else None


def read_gold_answer(record: Mapping[str, Any]) -> str:
    """A question's gold as a canonical number. Raises UserError naming the question when it is none."""
    gold = gold_answer(str(record.get("gold")))
    if gold is None:
        raise UserError(
            f"question '{record['id']}': its gold {record.get('gold')!r:.60} is no number; correct the file"
        )
    return gold


def read_gold(solution: str | None, numbers: list[Number]) -> Reasoning | None:
    """The gold solution's own reasoning; None when the record has no solution text."""
    if not solution or not solution.strip():
        return None
    places = {number: index for index, number in enumerate(numbers)}
    return signals.read_reasoning(numbers, places, solution, gold_answer(solution))
