"""Counts what scored questions hold, for metrics/regime_w/ and the plots.

tally.add(...)          # one question
tally.merge(other)      # the tally of another part of the file
tally.summary()
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.regime_w.arms import Sums, Z, add_pulls, add_sums, arm_rows
from stages.regime_w.confidence import mean_logprob
from stages.regime_w.signals import SIGNALS, GroupAnalysis
from stages.run.files import atomic_write

MEASURES = (*SIGNALS, "length", "mean_logprob")
GROUPS = 20  # of questions, for the interval of the overall AUC
T_19 = 2.093024054408263  # Student's t, 19 degrees of freedom, two-sided 95 %


class Tally:
    """Sums over questions. The sums of the parts of a file add up to those of the whole file.

    `ranks[measure][group]` counts the trajectories of a group of questions by (value, correct). Values are rounded to
    three decimals. That is enough for the AUC, and needs little memory however many trajectories there are.
    """

    def __init__(self) -> None:
        self.counts: Sums = Counter()
        self.signals: Sums = Counter()
        self.soundness: Sums = Counter()
        self.bins: Sums = Counter()  # (tenth of s_wm, correct) -> trajectories
        self.ranks: Sums = {measure: {} for measure in MEASURES}
        self.right_over_wrong: Sums = {measure: Counter() for measure in MEASURES}
        self.sound_over_lucky: Sums = {measure: Counter() for measure in MEASURES}
        self.arms: Sums = {}

    def add(
        self, name: str, rows: list[dict[str, Any]], analysis: GroupAnalysis, suspect: bool, planted: bool
    ) -> None:
        """Count one question: its scored trajectories, and whether its gold is suspect or known to be wrong."""
        right = [row for row in rows if row["correct"]]
        wrong = [row for row in rows if not row["correct"]]
        solutions = [reasoning.solution for reasoning in analysis.reasonings]
        counted = {
            "questions": 1,
            "with_correct": bool(right),
            "suspect": suspect,
            "planted": planted,
            "found": suspect and planted,
            "trajectories": len(rows),
            "answered": sum(row["answer"] is not None for row in rows),
            "correct": len(right),
            "equations": sum(len(solution.equations) for solution in solutions),
            "holding": sum(equation.holds for solution in solutions for equation in solution.equations),
            "skipped": sum(solution.skipped for solution in solutions),
        }
        add_sums(self.counts, counted)
        for row in rows:
            for signal in SIGNALS:
                self.signals[signal] += row[signal]
            self.bins[min(9, int(row["s_wm"] * 10)), row["correct"]] += 1
        for row in right:
            self.soundness[row["soundness"]] += 1
        add_pulls(self.arms, rows)
        sound = [row for row in right if row["soundness"] == "sound"]
        lucky = [row for row in right if row["soundness"] == "lucky"]
        group = zlib.crc32(name.encode()) % GROUPS
        for measure in MEASURES:
            better, worse = _measure(right, measure), _measure(wrong, measure)
            ranks = self.ranks[measure].setdefault(group, Counter())
            for value in worse:
                ranks[round(value, 3), False] += 1
            for value in better:
                ranks[round(value, 3), True] += 1
            add_pairs(self.right_over_wrong[measure], better, worse)
            if sound and lucky:
                add_pairs(self.sound_over_lucky[measure], _measure(sound, measure), _measure(lucky, measure))

    def merge(self, other: Tally) -> None:
        """Add the sums of another part of the file."""
        add_sums(vars(self), vars(other))

    def summary(self) -> dict[str, Any]:
        """What goes to metrics/regime_w/."""
        counts = self.counts
        size = max(1, counts["trajectories"])
        suspects = {"questions": counts["suspect"]}
        if counts["planted"]:  # wrong golds were planted, so it is known which suspicions are right
            others = counts["questions"] - counts["planted"]
            suspects |= {
                "planted": counts["planted"],
                "found": counts["found"],
                "found_share": counts["found"] / counts["planted"],
                "false_alarm_share": (counts["suspect"] - counts["found"]) / others if others else 0.0,
            }
        return {
            "questions": counts["questions"],
            "trajectories": counts["trajectories"],
            "answered": counts["answered"],
            "correct": counts["correct"],
            "accuracy": counts["correct"] / size,
            "questions_with_correct": counts["with_correct"] / max(1, counts["questions"]),
            "equations": {
                "read": counts["equations"],
                "hold": counts["holding"],
                "skipped": counts["skipped"],
            },
            "signals": {signal: self.signals[signal] / size for signal in SIGNALS},
            "soundness": {kind: self.soundness[kind] for kind in ("sound", "lucky", "unproven")},
            "suspects": suspects,
            "arms": {row.pop("arm"): row for row in arm_rows(self.arms)},
            "correct_over_wrong": {
                measure: {
                    "overall": overall_auc(self.ranks[measure]),
                    "within": within_auc(self.right_over_wrong[measure]),
                }
                for measure in MEASURES
            },
            "sound_over_lucky": {measure: within_auc(self.sound_over_lucky[measure]) for measure in MEASURES},
        }


def _measure(rows: list[dict[str, Any]], name: str) -> list[float]:
    """The measure of each row that has it. Length is in tokens, or in characters when the file has no tokens."""
    if name == "length":
        return [row.get("tokens") or len(row["text"]) for row in rows]
    if name == "mean_logprob":
        return [mean for row in rows if (mean := mean_logprob(row)) is not None]
    return [row[name] for row in rows]


def add_pairs(sums: Sums, better: Sequence[float], worse: Sequence[float]) -> None:
    """Add one question's pairs of a better and a worse trajectory. A pair ranked right is a win, a tie half a win."""
    pairs = len(better) * len(worse)
    if pairs:
        ordered = sorted(worse)
        wins = sum([bisect_left(ordered, one) + bisect_right(ordered, one) for one in better]) / 2
        squares = {"wins2": wins * wins, "both": wins * pairs, "pairs2": pairs * pairs}
        add_sums(sums, {"questions": 1, "wins": wins, "pairs": pairs, **squares})


def within_auc(sums: Sums) -> dict[str, float | int | None]:
    """Chance that a better trajectory is ranked above a worse one of the same question, with a 95 % interval.

    Questions are what is drawn at random, so the interval is that of a ratio estimator (Cochran 1977, 6.3).
    """
    if not sums["pairs"]:
        return {"auc": None, "low": None, "high": None, "questions": 0}
    auc, n = sums["wins"] / sums["pairs"], sums["questions"]
    low = high = None
    if n > 1:
        square = max(0.0, sums["wins2"] - 2 * auc * sums["both"] + auc * auc * sums["pairs2"])
        half = Z * math.sqrt(square * n / (n - 1)) / sums["pairs"]
        low, high = max(0.0, auc - half), min(1.0, auc + half)
    return {"auc": auc, "low": low, "high": high, "questions": n}


def overall_auc(groups: Mapping[int, Counter[tuple[float, bool]]]) -> dict[str, float | None]:
    """Chance that a right trajectory of any question is ranked above a wrong one of any, with a 95 % interval.

    Trajectories of one question are not independent, so the interval is a delete-a-group jackknife over groups of
    questions (Kott 2001, with Student's t). There is none when a group is missing.
    """
    total = sum(groups.values(), Counter[tuple[float, bool]]())
    auc = auc_of(total)
    without = [auc_of(total - groups[group]) for group in sorted(groups)]  # each group left out once
    parts = [part for part in without if part is not None]
    if auc is None or len(parts) < GROUPS:
        return {"auc": auc, "low": None, "high": None}
    mean = math.fsum(parts) / GROUPS
    variance = (GROUPS - 1) / GROUPS * math.fsum((part - mean) ** 2 for part in parts)
    half = T_19 * math.sqrt(variance)
    return {"auc": auc, "low": max(0.0, auc - half), "high": min(1.0, auc + half)}


def auc_of(counts: Counter[tuple[float, bool]]) -> float | None:
    """The area under the ROC curve, from the number of trajectories by (value, correct). A tie counts half."""
    wrong_below = right_below = 0
    wins = 0.0
    for value in sorted({value for value, _ in counts}):
        wrong, right = counts[value, False], counts[value, True]
        wins += right * (wrong_below + 0.5 * wrong)
        wrong_below += wrong
        right_below += right
    return wins / (right_below * wrong_below) if right_below and wrong_below else None


def write_plots(folder: Path, tally: Tally) -> None:
    """The plots' data: arms.csv, and coherence.csv (accuracy in ten bins of s_wm, named by their middle)."""
    columns = ("arm", "mean_reward", "low", "high", "pulls", "best_share", "regret")
    with atomic_write(folder / "arms.csv") as file:
        file.write(",".join(columns) + "\n")
        for row in arm_rows(tally.arms):
            file.write(",".join("" if row[column] is None else str(row[column]) for column in columns) + "\n")
    with atomic_write(folder / "coherence.csv") as file:
        file.write("s_wm,trajectories,accuracy\n")
        for tenth in range(10):
            right = tally.bins[tenth, True]
            size = right + tally.bins[tenth, False]
            file.write(f"{(2 * tenth + 1) / 20},{size},{right / size if size else ''}\n")
