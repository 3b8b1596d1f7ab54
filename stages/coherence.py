"""Coherence: score how far the trajectories of each question agree, and reward each of them.

    data/rollouts.jsonl  ->  data/regime_w_rollouts.jsonl: on each question s_end s_path s_cf s_wm suspicion
    suspect suspect_answer, on each trajectory answer correct soundness s_end s_path s_cf s_wm reward

Questions are read, scored and written one batch after another, on all cores, so memory does not grow with
the file; the batches, and with them every sum, are the same however many cores there are.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import math
import os
import signal
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from stages.core.answers import gold_answer, read_answer, same_answer
from stages.core.errors import UserError
from stages.core.params import RegimeW, load_params
from stages.core.records import Fields, atomic_write, jsonl_line, read_jsonl, write_json
from stages.core.stage import stage_run
from stages.regime_w import signals
from stages.regime_w.arms import ArmTable
from stages.regime_w.reward import RewardParams, reward
from stages.regime_w.suspicion import suspicion

BATCH = 64  # questions
SMALL = 4_000_000  # bytes of rollouts below which starting processes costs more than it saves
SIGNALS = ("s_end", "s_path", "s_cf", "s_wm")
ADDED = (*SIGNALS, "suspicion", "suspect", "suspect_answer")  # to a question
SCORED = ("answer", "correct", "soundness", *SIGNALS, "reward")
FIELDS: Fields = {"id": str, "question": str, "gold": (str, int, float), "trajectories": list}
Scorer = Callable[[str, list[dict[str, Any]]], Any]


def main(
    rollouts: Path = Path("data/rollouts.jsonl"),
    out: Path = Path("data/regime_w_rollouts.jsonl"),
    metrics: Path = Path("metrics/regime_w.json"),
    plots: Path = Path("metrics/plots/regime_w"),
    processes: int | None = None,
) -> None:
    """Score `rollouts` into `out`; `processes` None uses all cores, or one when the file is small."""
    scorer = Path(load_params().regime_w.scorer)
    if not scorer.is_file():
        raise UserError(
            f"params.yaml: regime_w.scorer: {scorer} is not a file; name a Python file with score_group"
        )
    with stage_run(
        "coherence", sections=("regime_w",), inputs=[rollouts, scorer], outputs=[out, metrics, plots]
    ) as run:
        total = Tally()
        cores = processes or len(os.sched_getaffinity(0))
        if processes is None and rollouts.stat().st_size < SMALL:
            cores = 1
        with atomic_write(out) as file:
            for text, tally in score_all(rollouts, run.params.regime_w, cores):
                file.write(text)
                total.merge(tally)
        if not total.questions:
            raise UserError(f"{rollouts}: holds no questions; run `dvc repro rollout`")
        summary = total.summary()
        write_json(metrics, summary)
        write_tables(plots, total)
        run.say(
            f"{total.questions:,} questions, {total.trajectories:,} trajectories, "
            f"{summary['accuracy']:.1%} correct, mean s_wm {summary['signals']['s_wm']:.3f}; "
            f"{total.equations:,} equations read, {total.skipped:,} skipped"
        )


def score_all(rollouts: Path, params: RegimeW, cores: int) -> Iterator[tuple[str, Tally]]:
    """Batches of scored lines with their tallies, in the file's order; a bounded number wait at any time."""
    batches = _batches(read_jsonl(rollouts, FIELDS))
    if cores == 1:
        work = _Batch(params)
        for batch in batches:
            yield work(batch)
        return
    load_scorer(Path(params.scorer))  # a scorer that cannot be loaded is said here, not by every process
    waiting: deque[Future[tuple[str, Tally]]] = deque()
    with ProcessPoolExecutor(cores, initializer=_end_with_parent) as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(_run_batch, params, batch))
                if len(waiting) > 3 * cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batches(records: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(records, BATCH)):
        yield batch


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _run_batch(params: RegimeW, batch: list[dict[str, Any]]) -> tuple[str, Tally]:
    return _prepared(params)(batch)


@cache
def _prepared(params: RegimeW) -> _Batch:
    """A worker process loads its scorer once."""
    return _Batch(params)


# ---- scoring -----------------------------------------------------------------------------------------


def load_scorer(path: Path) -> Scorer | None:
    """`score_group` of a scorer file; None for the shipped one, whose reading is then shared.

    Raises UserError when the file cannot be loaded or has no such function.
    """
    if path.resolve() == Path(signals.__file__).resolve():
        return None
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


def checked_score(score: Any, size: int, scorer: Path, question_id: str) -> signals.GroupScore:
    """A scorer's result (attributes or keys s_end s_path s_cf s_wm) as lists of floats.

    Raises UserError naming the question when one is missing, has another length than the group, or holds
    anything but finite numbers in [0, 1].
    """
    columns = []
    for name in SIGNALS:
        values = score.get(name) if isinstance(score, Mapping) else getattr(score, name, None)
        try:
            column = [float(value) for value in values]  # type: ignore[union-attr]
        except (TypeError, ValueError):
            raise UserError(
                f"{scorer}: question '{question_id}': {name} must be a list of numbers, found {values!r:.60}"
            ) from None
        if len(column) != size:
            raise UserError(
                f"{scorer}: question '{question_id}': {name} has {len(column)} values for {size} trajectories"
            )
        for value in column:
            if not 0 <= value <= 1:  # also refuses NaN
                raise UserError(f"{scorer}: question '{question_id}': {name} holds {value}, outside [0, 1]")
        columns.append(column)
    return signals.GroupScore(*columns)


class _Batch:
    """Scores batches of questions with one set of parameters."""

    def __init__(self, params: RegimeW) -> None:
        self.path = Path(params.scorer)
        self.scorer = load_scorer(self.path)
        self.weights = (params.weights.s_end, params.weights.s_path, params.weights.s_cf)
        self.reward = RewardParams(**params.reward.model_dump())
        self.suspect_from = params.suspect_from
        takes_weights = self.scorer is not None and "weights" in inspect.signature(self.scorer).parameters
        self.options = {"weights": self.weights} if takes_weights else {}

    def __call__(self, batch: list[dict[str, Any]]) -> tuple[str, Tally]:
        tally = Tally()
        lines = [self.score(record, tally) for record in batch]
        return "".join(lines), tally

    def score(self, record: dict[str, Any], tally: Tally) -> str:
        """One question's line with signals and rewards; what was seen is added to `tally`."""
        name, question = record["id"], record["question"]
        gold = gold_answer(str(record["gold"]))
        if gold is None:
            raise UserError(
                f"question '{name}': its gold {record['gold']!r:.60} is no number; correct the file"
            )
        trajectories = record["trajectories"]
        views = read_views(name, question, trajectories)
        analysis = signals.analyse_group(question, views)
        score = (
            analysis.score(self.weights) if self.scorer is None else self.foreign_score(name, question, views)
        )
        means = {key: score.mean(key) for key in SIGNALS}
        golds = gold_trace(record.get("solution"), analysis.numbers)
        scored = []
        for index, (trajectory, trace) in enumerate(zip(trajectories, analysis.traces, strict=True)):
            correct = same_answer(trace.answer, gold)
            sound = (signals.judge(trace, golds) if golds else "unproven") if correct else None
            s_wm = score.s_wm[index]
            tokens = trajectory.get("tokens")
            value = reward(correct, s_wm, means["s_wm"], means["s_end"], tokens, self.reward)
            row = {"id": f"{name}/{index}", **trajectory}
            for key in SCORED:
                row.pop(key, None)
            row |= {"answer": trace.answer, "correct": correct, "soundness": sound}
            row |= {"s_end": score.s_end[index], "s_path": score.s_path[index], "s_cf": score.s_cf[index]}
            row |= {"s_wm": s_wm, "reward": value}
            scored.append(row)
        verdicts = [row["correct"] for row in scored]
        doubt, other = suspicion(analysis.traces, verdicts)
        tally.add(name, scored, analysis)
        suspect = other is not None and doubt >= self.suspect_from
        tally.suspects.add(suspect, bool(record.get("planted")))
        for key in ADDED:
            record.pop(key, None)
        added = {**means, "suspicion": doubt, "suspect": suspect, "suspect_answer": other}
        try:
            line = jsonl_line({**record, "trajectories": scored, **added})
            line.encode()
        except ValueError as error:
            raise UserError(f"question '{name}': cannot be written as JSON ({error})") from None
        return line

    def foreign_score(self, name: str, question: str, views: list[dict[str, Any]]) -> signals.GroupScore:
        """The replaced scorer's verdict, checked."""
        assert self.scorer is not None
        try:
            score = self.scorer(question, views, **self.options)
        except Exception as error:
            raise UserError(
                f"{self.path}: question '{name}': the scorer raised {type(error).__name__}: {error}"
            ) from error
        return checked_score(score, len(views), self.path, name)


def read_views(name: str, question: str, trajectories: list[Any]) -> list[dict[str, Any]]:
    """Trajectories as a scorer gets them: `text` cut to the solution, `answer` as read from it.

    Raises UserError naming question and trajectory when one has no text.
    """
    views = []
    for index, trajectory in enumerate(trajectories):
        text = trajectory.get("text") if isinstance(trajectory, dict) else None
        if not isinstance(text, str):
            raise UserError(f"question '{name}': trajectory {index} needs a field 'text' of type str")
        reading = read_answer(text, question)
        views.append({**trajectory, "text": text[reading.start : reading.end], "answer": reading.answer})
    return views


def gold_trace(solution: Any, numbers: list[signals.Number]) -> signals.Trace | None:
    """The gold solution's own counterfactuals; None when there is no solution text."""
    if not isinstance(solution, str) or not solution.strip():
        return None
    places = {number: index for index, number in enumerate(numbers)}
    return signals.trace_solution(numbers, places, solution, gold_answer(solution))


# ---- what is counted ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Within:
    """Pairs of a better and a worse trajectory of one question that a measure ranks right; sums."""

    questions: int = 0
    wins: float = 0.0
    pairs: int = 0
    wins2: float = 0.0
    both: float = 0.0
    pairs2: int = 0

    def add(self, better: Sequence[float], worse: Sequence[float]) -> None:
        """One question; a tie is half a win."""
        pairs = len(better) * len(worse)
        if pairs:
            wins = sum((b > w) + 0.5 * (b == w) for b in better for w in worse)
            self.questions += 1
            self.wins, self.pairs = self.wins + wins, self.pairs + pairs
            self.wins2, self.both, self.pairs2 = (
                self.wins2 + wins * wins,
                self.both + wins * pairs,
                self.pairs2 + pairs * pairs,
            )

    def summary(self) -> dict[str, float | int | None]:
        """Share ranked right, with a 95 % interval by question (ratio estimator, Cochran 1977, 6.3)."""
        if not self.pairs:
            return {"auc": None, "low": None, "high": None, "questions": 0}
        auc, n = self.wins / self.pairs, self.questions
        low = high = None
        if n > 1:
            square = max(0.0, self.wins2 - 2 * auc * self.both + auc * auc * self.pairs2)
            half = 1.959963984540054 * math.sqrt(square * n / (n - 1)) / self.pairs
            low, high = max(0.0, auc - half), min(1.0, auc + half)
        return {"auc": auc, "low": low, "high": high, "questions": n}


@dataclass(slots=True)
class Suspects:
    """How many gold labels are suspect; where wrong ones were planted, how many of these are among them."""

    suspect: int = 0
    planted: int = 0
    found: int = 0
    questions: int = 0

    def add(self, suspect: bool, planted: bool) -> None:
        """One question."""
        self.questions += 1
        self.suspect += suspect
        self.planted += planted
        self.found += suspect and planted

    def summary(self) -> dict[str, int | float]:
        """`questions` that are suspect; with planted labels also the share found and the false-alarm rate."""
        rows: dict[str, int | float] = {"questions": self.suspect}
        if self.planted:
            others = self.questions - self.planted
            rows |= {"planted": self.planted, "found": self.found, "found_share": self.found / self.planted}
            rows["false_alarm_share"] = (self.suspect - self.found) / others if others else 0.0
        return rows


MEASURES = (*SIGNALS, "length", "mean_logprob")
GROUPS = 20  # of questions, for the interval of the overall AUC
T_19 = 2.093024054408263  # Student's t, 19 degrees of freedom, two-sided 95 %


@dataclass(slots=True)
class Tally:
    """Sums over questions; those of parts of a file add up to the whole file's.

    `ranks` counts, per measure and group of questions, wrong and right trajectories at each value rounded to
    three decimals: enough for the AUC and its interval, and bounded however many trajectories there are.
    """

    questions: int = 0
    trajectories: int = 0
    answered: int = 0
    correct: int = 0
    with_correct: int = 0
    equations: int = 0
    holding: int = 0
    skipped: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * len(SIGNALS))
    soundness: dict[str, int] = field(default_factory=lambda: {"sound": 0, "lucky": 0, "unproven": 0})
    bins: list[list[int]] = field(default_factory=lambda: [[0, 0] for _ in range(10)])
    ranks: dict[str, dict[int, dict[float, list[int]]]] = field(
        default_factory=lambda: {name: {} for name in MEASURES}
    )
    right_over_wrong: dict[str, Within] = field(default_factory=lambda: {name: Within() for name in MEASURES})
    sound_over_lucky: dict[str, Within] = field(default_factory=lambda: {name: Within() for name in MEASURES})
    arms: ArmTable = field(default_factory=ArmTable)
    suspects: Suspects = field(default_factory=Suspects)

    def add(self, name: str, rows: list[dict[str, Any]], analysis: signals.GroupAnalysis) -> None:
        """Take in one question's scored trajectories."""
        self.questions += 1
        group = zlib.crc32(name.encode()) % GROUPS
        self.trajectories += len(rows)
        for trace in analysis.traces:
            self.equations += len(trace.solution.equations)
            self.holding += sum(equation.holds for equation in trace.solution.equations)
            self.skipped += trace.solution.skipped
        right = [row for row in rows if row["correct"]]
        self.correct += len(right)
        self.with_correct += bool(right)
        pulls = []
        for row in rows:
            self.answered += row["answer"] is not None
            self.bins[min(9, int(row["s_wm"] * 10))][0] += 1
            self.bins[min(9, int(row["s_wm"] * 10))][1] += row["correct"]
            for index, signal_name in enumerate(SIGNALS):
                self.sums[index] += row[signal_name]
            if row["correct"]:
                self.soundness[row["soundness"]] += 1
            # A file with propensities says which pulls were uniform; any other holds uniform pulls only.
            pulls.append(
                (
                    str(row.get("arm", "")),
                    row["reward"],
                    row["correct"],
                    row.get("uniform", "propensity" not in row),
                )
            )
        self.arms.add(pulls)
        wrong = [row for row in rows if not row["correct"]]
        sound = [row for row in right if row["soundness"] == "sound"]
        lucky = [row for row in right if row["soundness"] == "lucky"]
        for measure in MEASURES:
            better, worse = _measure(right, measure), _measure(wrong, measure)
            counts = self.ranks[measure].setdefault(group, {})
            for verdict, values in ((0, worse), (1, better)):
                for value in values:
                    counts.setdefault(round(value, 3), [0, 0])[verdict] += 1
            if better and worse:
                self.right_over_wrong[measure].add(better, worse)
            if sound and lucky:
                self.sound_over_lucky[measure].add(_measure(sound, measure), _measure(lucky, measure))

    def merge(self, other: Tally) -> None:
        """Add another part of the file."""
        for name in (
            "questions",
            "trajectories",
            "answered",
            "correct",
            "with_correct",
            "equations",
            "holding",
            "skipped",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        for key, count in other.soundness.items():
            self.soundness[key] += count
        for mine, theirs in zip(self.bins, other.bins, strict=True):
            mine[0], mine[1] = mine[0] + theirs[0], mine[1] + theirs[1]
        for name, groups in other.ranks.items():
            for group, counts in groups.items():
                _add_ranks(self.ranks[name].setdefault(group, {}), counts)
        for slot in Suspects.__slots__:
            setattr(self.suspects, slot, getattr(self.suspects, slot) + getattr(other.suspects, slot))
        for tables, others in (
            (self.right_over_wrong, other.right_over_wrong),
            (self.sound_over_lucky, other.sound_over_lucky),
        ):
            for name, part in others.items():
                for slot in Within.__slots__:
                    setattr(tables[name], slot, getattr(tables[name], slot) + getattr(part, slot))
        self.arms.merge(other.arms)

    def summary(self) -> dict[str, Any]:
        """What goes to metrics/regime_w.json."""
        size = max(1, self.trajectories)
        return {
            "questions": self.questions,
            "trajectories": self.trajectories,
            "answered": self.answered,
            "correct": self.correct,
            "accuracy": self.correct / size,
            "questions_with_correct": self.with_correct / max(1, self.questions),
            "equations": {"read": self.equations, "hold": self.holding, "skipped": self.skipped},
            "signals": {name: total / size for name, total in zip(SIGNALS, self.sums, strict=True)},
            "soundness": self.soundness,
            "suspects": self.suspects.summary(),
            "arms": {row.pop("arm"): row for row in self.arms.rows()},
            "correct_over_wrong": {
                name: {
                    "overall": overall_auc(self.ranks[name]),
                    "within": self.right_over_wrong[name].summary(),
                }
                for name in MEASURES
            },
            "sound_over_lucky": {name: self.sound_over_lucky[name].summary() for name in MEASURES},
        }


def _measure(rows: list[dict[str, Any]], name: str) -> list[float]:
    """The measure of each row that has it. Length is in tokens, or characters in files without tokens."""
    if name == "length":
        return [row.get("tokens") or len(row["text"]) for row in rows]
    if name == "mean_logprob":
        return [
            row["logprob"] / row["tokens"]
            for row in rows
            if row.get("logprob") is not None and row.get("tokens")
        ]
    return [row[name] for row in rows]


def _add_ranks(mine: dict[float, list[int]], theirs: Mapping[float, Sequence[int]], sign: int = 1) -> None:
    for value, (wrong, right) in theirs.items():
        row = mine.setdefault(value, [0, 0])
        row[0], row[1] = row[0] + sign * wrong, row[1] + sign * right


def overall_auc(groups: Mapping[int, Mapping[float, Sequence[int]]]) -> dict[str, float | None]:
    """Chance that a right trajectory of any question is above a wrong one of any, with a 95 % interval.

    Trajectories of one question are not independent, so the interval is a delete-a-group jackknife over groups
    of questions (Kott 2001, with Student's t).
    """
    total: dict[float, list[int]] = {}
    for counts in groups.values():
        _add_ranks(total, counts)
    auc = auc_of(total)
    parts = []
    for _, counts in sorted(groups.items()):
        _add_ranks(total, counts, -1)
        parts.append(auc_of(total))
        _add_ranks(total, counts)
    kept = [part for part in parts if part is not None]
    if auc is None or len(kept) < GROUPS:
        return {"auc": auc, "low": None, "high": None}
    mean = math.fsum(kept) / GROUPS
    variance = (GROUPS - 1) / GROUPS * math.fsum((part - mean) ** 2 for part in kept)
    half = T_19 * math.sqrt(variance)
    return {"auc": auc, "low": max(0.0, auc - half), "high": min(1.0, auc + half)}


def auc_of(ranks: Mapping[float, Sequence[int]]) -> float | None:
    """The area under the ROC curve from counts of wrong and right at each value; a tie counts half."""
    below, wins = 0, 0.0
    right_total = wrong_total = 0
    for _, (wrong, right) in sorted(ranks.items()):
        wins += right * (below + 0.5 * wrong)
        below += wrong
        right_total, wrong_total = right_total + right, wrong_total + wrong
    return wins / (right_total * wrong_total) if right_total and wrong_total else None


def write_tables(folder: Path, tally: Tally) -> None:
    """The plots' data: arms.csv, and coherence.csv (accuracy in ten bins of s_wm, named by their middle)."""
    columns = ("arm", "mean_reward", "low", "high", "pulls", "best_share", "regret")
    with atomic_write(folder / "arms.csv") as file:
        file.write(",".join(columns) + "\n")
        for row in tally.arms.rows():
            file.write(",".join("" if row[column] is None else str(row[column]) for column in columns) + "\n")
    with atomic_write(folder / "coherence.csv") as file:
        file.write("s_wm,trajectories,accuracy\n")
        for index, (size, right) in enumerate(tally.bins):
            file.write(f"{(2 * index + 1) / 20},{size},{right / size if size else ''}\n")
