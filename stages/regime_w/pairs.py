"""Makes preference pairs from the scored trajectories of each question.

    correctness   a correct one over an incorrect one
    coherence     among correct ones, the higher reward over the lower

Every candidate pair that is not made is counted with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.regime_w.signals import SIGNALS
from stages.run.errors import UserError

if TYPE_CHECKING:
    from stages.run.params import Preference, PreferenceKind

KINDS = ("correctness", "coherence")
REASONS = (
    "truncated", "leaking", "empty", "answerless", "not_sound", "suspect", "identical", "margin",
    "repeated", "trajectory_limit", "question_limit", "length_balance",
)  # fmt: skip
NEEDED = ("correct", "fault", "reward")  # of a trajectory, as `coherence` writes it
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Pair:
    """A better and a worse trajectory of one question."""

    kind: str
    question: Row
    chosen: Row
    rejected: Row

    @property
    def margin(self) -> float:
        """How much more reward chosen got."""
        return self.chosen["reward"] - self.rejected["reward"]

    @property
    def texts(self) -> tuple[str, str]:
        """The two texts as they are compared."""
        return self.chosen["text"].strip(), self.rejected["text"].strip()

    @property
    def across_styles(self) -> bool:
        """Whether the two were asked for in different styles (through different arms, when no style is recorded)."""
        styles = [row.get("style", row.get("arm")) for row in (self.chosen, self.rejected)]
        return styles[0] != styles[1]

    @property
    def longer_by(self) -> int:
        """Tokens that chosen has more than rejected, or characters when tokens are not recorded."""
        tokens = self.chosen.get("tokens"), self.rejected.get("tokens")
        if tokens[0] is not None and tokens[1] is not None:
            return int(tokens[0] - tokens[1])
        return len(self.chosen["text"]) - len(self.rejected["text"])

    def record(self) -> Row:
        """The pair's line in data/coherence_preferences/; its id names both trajectories."""
        chosen, rejected = self.chosen, self.rejected
        question_id = self.question["id"]
        # Trajectories of a file from elsewhere may have ids such as 0 and 1, the same ones in every question.
        pulls = [row["id"].removeprefix(f"{question_id}/") for row in (chosen, rejected)]
        return {
            "id": f"{question_id}/{'>'.join(pulls)}",
            "kind": self.kind,
            "question_id": question_id,
            # The bare question; `dpo` puts it into the prompt of the profile.
            "prompt": self.question["question"],
            "chosen": chosen["text"],
            "rejected": rejected["text"],
            "chosen_id": chosen["id"],
            "rejected_id": rejected["id"],
            "chosen_reward": chosen["reward"],
            "rejected_reward": rejected["reward"],
            "margin": self.margin,
            "chosen_tokens": chosen.get("tokens"),
            "rejected_tokens": rejected.get("tokens"),
            "chosen_signals": {name: chosen.get(name) for name in SIGNALS},
            "rejected_signals": {name: rejected.get(name) for name in SIGNALS},
            "rejected_finish": rejected.get("finish"),
        }


def make_pairs(questions: Iterable[Row], params: Preference) -> tuple[list[Row], Row]:
    """The pair records in the order of the questions, and the summary for metrics/preference/.

    Raises UserError when a trajectory lacks what `coherence` writes. `questions` are typed (stages/regime_w/record.py).
    """
    pairs: list[Pair] = []
    refused = {kind: Counter(dict.fromkeys(REASONS, 0)) for kind in KINDS}
    seen = Counter[str]()
    for question in questions:
        rows = question["trajectories"]
        check_trajectories(question["id"], rows)
        right, wrong = [row for row in rows if row["correct"]], [row for row in rows if not row["correct"]]
        suspect = params.drop_suspects and bool(question.get("suspect"))
        seen.update(questions=1, suspect=suspect, all_correct=bool(right) and not wrong, all_wrong=not right)
        faults = {}  # by id(trajectory): why it may not be chosen
        for row in right:
            unsound = params.sound_only and row.get("soundness") != "sound"
            faults[id(row)] = "suspect" if suspect else row["fault"] or ("not_sound" if unsound else None)
        candidates = {
            "correctness": [(a, b) for a in right for b in wrong],
            "coherence": [
                (a, b) if a["reward"] >= b["reward"] else (b, a)
                for index, a in enumerate(right)
                for b in right[index + 1 :]
            ],
        }
        for kind in KINDS:
            limits: PreferenceKind = getattr(params, kind)
            if limits.per_question:
                possible = [Pair(kind, question, *candidate) for candidate in candidates[kind]]
                pairs += select(possible, limits, faults, refused[kind])
    if params.length_balance:
        for kind in KINDS:
            dropped = unbalancing([pair for pair in pairs if pair.kind == kind])
            refused[kind]["length_balance"] += len(dropped)
            pairs = [pair for pair in pairs if pair not in dropped]
    summary: Row = {
        "questions": seen["questions"],
        "questions_all_correct": seen["all_correct"],
        "questions_all_wrong": seen["all_wrong"],
        "questions_dropped_as_suspect": seen["suspect"],
        "pairs": len(pairs),
        "length_difference": mean([pair.longer_by for pair in pairs]),
    }
    for kind in KINDS:
        summary[kind] = kind_summary([pair for pair in pairs if pair.kind == kind], refused[kind])
    return [pair.record() for pair in pairs], summary


def check_trajectories(question_id: str, rows: list[Row]) -> None:
    """Raise UserError naming question and trajectory when one is not scored."""
    for index, row in enumerate(rows):
        for name in NEEDED:
            if name not in row:
                raise UserError(
                    f"question '{question_id}': trajectory {index} has no usable '{name}'; "
                    "give the file that `python -m stages coherence` writes"
                )


def select(
    candidates: list[Pair], limits: PreferenceKind, faults: dict[int, str | None], refused: Counter[str]
) -> list[Pair]:
    """The pairs to make: the largest margin first, pairs of one style first among equals, within the limits.

    Candidates that are left out are counted in `refused` by reason.
    """
    usable = []
    for pair in candidates:
        if fault := faults[id(pair.chosen)]:
            refused[fault] += 1
        elif pair.texts[0] == pair.texts[1]:
            refused["identical"] += 1
        elif pair.margin < limits.min_margin:
            refused["margin"] += 1
        else:
            usable.append(pair)
    # Margins are rounded, so that two which differ in the last bit only count as equal.
    usable.sort(key=lambda pair: (-round(pair.margin, 9), pair.across_styles))
    made: list[Pair] = []
    used: Counter[int] = Counter()
    texts = set()
    for pair in usable:
        sides = id(pair.chosen), id(pair.rejected)
        if pair.texts in texts:
            refused["repeated"] += 1
        elif len(made) == limits.per_question:
            refused["question_limit"] += 1
        elif max(used[side] for side in sides) >= limits.per_trajectory:
            refused["trajectory_limit"] += 1
        else:
            texts.add(pair.texts)
            used.update(sides)
            made.append(pair)
    return made


def unbalancing(pairs: list[Pair]) -> set[Pair]:
    """The pairs to drop, the most unequal first, so that chosen and rejected are equally long on average.

    A pair is dropped only if that brings the sum of differences closer to 0 without crossing it. What remains is less
    than one pair's difference.
    """
    total = sum(pair.longer_by for pair in pairs)
    sign = 1 if total > 0 else -1
    dropped = set()
    for pair in sorted(pairs, key=lambda pair: -pair.longer_by * sign):
        if 0 < pair.longer_by * sign <= total * sign:
            dropped.add(pair)
            total -= pair.longer_by
    return dropped


def mean(values: list[float]) -> float | None:
    """None without values."""
    return sum(values) / len(values) if values else None


def kind_summary(pairs: list[Pair], refused: Counter[str]) -> Row:
    """Counts of one kind of pairs; means and shares are None without pairs."""
    return {
        "pairs": len(pairs),
        "questions": len({pair.question["id"] for pair in pairs}),
        "mean_margin": mean([pair.margin for pair in pairs]),
        "length_difference": mean([pair.longer_by for pair in pairs]),
        "chosen_not_shorter": mean([pair.longer_by >= 0 for pair in pairs]),
        "across_styles": mean([pair.across_styles for pair in pairs]),
        "refused": dict(refused),
    }
