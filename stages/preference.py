"""Preference: pairs of a better and a worse trajectory of one question.

    data/regime_w_rollouts.jsonl  ->  data/coherence_preferences.jsonl

    correctness   a correct one over an incorrect one
    coherence     among correct ones, the higher reward over the lower

Every candidate pair that was not made is counted with its reason in metrics/preference.json.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core.answers import read_answer
from stages.core.errors import UserError
from stages.core.params import Preference, PreferenceKind
from stages.core.records import atomic_write, jsonl_line, read_jsonl, write_json
from stages.core.stage import stage_run

KINDS = ("correctness", "coherence")
SIGNALS = ("s_end", "s_path", "s_cf", "s_wm")
REASONS = (
    "truncated", "leaking", "empty", "answerless", "not_sound", "suspect", "identical", "margin",
    "repeated", "trajectory_limit", "question_limit", "length_balance",
)  # fmt: skip
FIELDS = {"id": str, "question": str, "trajectories": list}
TRAJECTORY_FIELDS = {"id": str, "text": str, "correct": bool, "reward": (int, float)}
Candidate = tuple[dict[str, Any], dict[str, Any]]


def main(
    rollouts: Path = Path("data/regime_w_rollouts.jsonl"),
    out: Path = Path("data/coherence_preferences.jsonl"),
    metrics: Path = Path("metrics/preference.json"),
) -> None:
    """Make the pairs of `rollouts` (as coherence writes them). Raises UserError when there is not one."""
    with stage_run("preference", sections=("preference",), inputs=[rollouts], outputs=[out, metrics]) as run:
        pairs, summary = make_pairs(read_jsonl(rollouts, FIELDS), run.params.preference)
        if not pairs:
            refused = {
                reason: count for kind in KINDS for reason, count in summary[kind]["refused"].items() if count
            }
            raise UserError(
                f"{rollouts}: not one pair could be made (refused: {refused or 'no candidates'}); "
                "lower preference.*.min_margin, or roll out more questions"
            )
        with atomic_write(out) as file:
            for pair in pairs:
                file.write(jsonl_line(pair))
        write_json(metrics, summary)
        counts = ", ".join(f"{summary[kind]['pairs']:,} {kind}" for kind in KINDS)
        run.say(
            f"{counts} pairs from {summary['questions']:,} questions; "
            f"chosen minus rejected: {summary['length_difference']:+.1f} in length"
        )


def make_pairs(
    questions: Iterator[dict[str, Any]], params: Preference
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pair records in the questions' order, and what goes to metrics/preference.json."""
    pairs: list[tuple[dict[str, Any], bool]] = []  # with whether it is across styles
    refused = {kind: Counter(dict.fromkeys(REASONS, 0)) for kind in KINDS}
    seen = Counter[str]()
    for record in questions:
        seen["questions"] += 1
        rows = record["trajectories"]
        check_trajectories(record["id"], rows)
        dropped = params.drop_suspects and bool(record.get("suspect"))
        seen["dropped_suspects"] += dropped
        right, wrong = [row for row in rows if row["correct"]], [row for row in rows if not row["correct"]]
        seen["all_correct"] += bool(right) and not wrong
        seen["all_wrong"] += not right
        faults = {
            id(row): "suspect" if dropped else chosen_fault(row, record["question"], params.sound_only)
            for row in right
        }
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
                for chosen, rejected in select(candidates[kind], limits, faults, refused[kind]):
                    across = style(chosen) != style(rejected)
                    pairs.append((pair_record(kind, record, chosen, rejected), across))
    if params.length_balance:
        for kind in KINDS:
            pairs = balance_lengths(pairs, kind, refused[kind])
    summary: dict[str, Any] = {
        "questions": seen["questions"],
        "questions_all_correct": seen["all_correct"],
        "questions_all_wrong": seen["all_wrong"],
        "questions_dropped_as_suspect": seen["dropped_suspects"],
        "pairs": len(pairs),
        "length_difference": length_difference([pair for pair, _ in pairs]),
    }
    for kind in KINDS:
        summary[kind] = kind_summary([one for one in pairs if one[0]["kind"] == kind], refused[kind])
    return [pair for pair, _ in pairs], summary


def check_trajectories(question_id: str, rows: list[Any]) -> None:
    """Raises UserError naming question and trajectory when a needed field is missing or of a wrong type."""
    for index, row in enumerate(rows):
        for name, kind in TRAJECTORY_FIELDS.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):  # type: ignore[arg-type]
                raise UserError(
                    f"question '{question_id}': trajectory {index} has no usable '{name}'; "
                    "give the file that `python -m stages coherence` writes"
                )


def chosen_fault(row: dict[str, Any], question: str, sound_only: bool) -> str | None:
    """Why a trajectory may never be chosen, or None."""
    if row.get("finish") == "length":
        return "truncated"
    reading = read_answer(row["text"], question)
    if reading.empty:
        return "empty"
    if reading.leak or reading.end < len(row["text"].rstrip()):
        return "leaking"
    if reading.answer is None:
        return "answerless"
    return "not_sound" if sound_only and row.get("soundness") != "sound" else None


def style(row: dict[str, Any]) -> Any:
    """How the trajectory was asked for: its arm's style, else its arm."""
    return row.get("style", row.get("arm"))


def select(
    candidates: list[Candidate], limits: PreferenceKind, faults: dict[int, str | None], refused: Counter[str]
) -> list[Candidate]:
    """Largest margin first, one style first among equals, within the limits; the rest is counted."""
    usable = []
    for order, (chosen, rejected) in enumerate(candidates):
        margin = chosen["reward"] - rejected["reward"]
        fault = faults[id(chosen)]
        if fault:
            refused[fault] += 1
        elif chosen["text"].strip() == rejected["text"].strip():
            refused["identical"] += 1
        elif margin < limits.min_margin:
            refused["margin"] += 1
        else:
            # rounded, so that margins equal but for the last bit are equals
            usable.append((-round(margin, 9), style(chosen) != style(rejected), order))
    made: list[Candidate] = []
    used: Counter[int] = Counter()
    texts: set[tuple[str, str]] = set()
    for _, _, order in sorted(usable):
        chosen, rejected = candidates[order]
        key = (chosen["text"].strip(), rejected["text"].strip())
        if key in texts:
            refused["repeated"] += 1
        elif len(made) == limits.per_question:
            refused["question_limit"] += 1
        elif max(used[id(chosen)], used[id(rejected)]) >= limits.per_trajectory:
            refused["trajectory_limit"] += 1
        else:
            texts.add(key)
            used.update((id(chosen), id(rejected)))
            made.append((chosen, rejected))
    return made


def pair_record(
    kind: str, record: dict[str, Any], chosen: dict[str, Any], rejected: dict[str, Any]
) -> dict[str, Any]:
    """One line of coherence_preferences.jsonl; its id names both trajectories."""
    pull = rejected["id"].removeprefix(f"{record['id']}/")
    return {
        "id": f"{chosen['id']}>{pull}",
        "kind": kind,
        "question_id": record["id"],
        "prompt": record["question"],
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "chosen_id": chosen["id"],
        "rejected_id": rejected["id"],
        "chosen_reward": chosen["reward"],
        "rejected_reward": rejected["reward"],
        "margin": chosen["reward"] - rejected["reward"],
        "chosen_tokens": chosen.get("tokens"),
        "rejected_tokens": rejected.get("tokens"),
        "chosen_signals": {name: chosen.get(name) for name in SIGNALS},
        "rejected_signals": {name: rejected.get(name) for name in SIGNALS},
        "rejected_finish": rejected.get("finish"),
    }


def longer_by(pair: dict[str, Any]) -> int:
    """Tokens (characters where there are none) that chosen has more than rejected."""
    if pair["chosen_tokens"] is not None and pair["rejected_tokens"] is not None:
        return int(pair["chosen_tokens"] - pair["rejected_tokens"])
    return len(pair["chosen"]) - len(pair["rejected"])


def balance_lengths(
    pairs: list[tuple[dict[str, Any], bool]], kind: str, refused: Counter[str]
) -> list[tuple[dict[str, Any], bool]]:
    """Drop pairs of one kind, the most lopsided first, until chosen and rejected are equally long on average.

    Only drops that bring the sum closer to 0 without crossing it are made, so less than one pair's difference
    is left.
    """
    differences = {index: longer_by(pair) for index, (pair, _) in enumerate(pairs) if pair["kind"] == kind}
    total = sum(differences.values())
    sign = 1 if total > 0 else -1
    lopsided = sorted(
        (index for index in differences if differences[index] * sign > 0),
        key=lambda i: (-differences[i] * sign, i),
    )
    dropped = set()
    for index in lopsided:
        if differences[index] * sign <= total * sign:
            dropped.add(index)
            total -= differences[index]
    refused["length_balance"] += len(dropped)
    return [pair for index, pair in enumerate(pairs) if index not in dropped]


def length_difference(pairs: list[dict[str, Any]]) -> float | None:
    """Mean tokens that chosen has more than rejected; None without pairs."""
    return sum(map(longer_by, pairs)) / len(pairs) if pairs else None


def kind_summary(pairs: list[tuple[dict[str, Any], bool]], refused: Counter[str]) -> dict[str, Any]:
    """Counts of one kind of pairs; shares are None without pairs."""
    size = len(pairs)
    records = [pair for pair, _ in pairs]

    def share(count: int) -> float | None:
        return count / size if size else None

    return {
        "pairs": size,
        "questions": len({pair["question_id"] for pair in records}),
        "mean_margin": sum(pair["margin"] for pair in records) / size if size else None,
        "length_difference": length_difference(records),
        "chosen_not_shorter": share(sum(longer_by(pair) >= 0 for pair in records)),
        "across_styles": share(sum(across for _, across in pairs)),
        "refused": dict(refused),
    }
