"""Preference: pairs of a better and a worse trajectory of one question.

    data/regime_w_rollouts/<round>.jsonl  ->  data/coherence_preferences/<round>.jsonl, metrics/preference/<round>.json

How pairs are chosen is in stages/regime_w/pairs.py.
"""

from __future__ import annotations

from pathlib import Path

from stages.regime_w.pairs import KINDS, make_pairs
from stages.regime_w.record import read_questions
from stages.run.errors import UserError
from stages.run.files import write_json, write_jsonl
from stages.run.paths import LAST_ROUND, RoundPaths
from stages.run.stage import stage_run


def main(
    round_name: str = LAST_ROUND,
    rollouts: Path | None = None,
    out: Path | None = None,
    metrics: Path | None = None,
) -> None:
    """Make the pairs of `rollouts` (as coherence writes them; those of the round unless given).

    Raises UserError when not one can be made.
    """
    own = RoundPaths(round_name)
    rollouts, out, metrics = rollouts or own.scored, out or own.pairs, metrics or own.preference
    with stage_run(
        "preference",
        variant=round_name,
        sections=("preference", "rounds.${key}.preference"),
        inputs=[rollouts],
        outputs=[out, metrics],
    ) as run:
        pairs, summary = make_pairs(read_questions(rollouts, scored=True), run.params.preference)
        if not pairs:
            refused = {
                reason: count for kind in KINDS for reason, count in summary[kind]["refused"].items() if count
            }
            drawn = [one for row in read_questions(rollouts, scored=True) for one in row["trajectories"]]
            right = sum(one["correct"] for one in drawn)
            raise UserError(
                f"{rollouts}: not one pair could be made of {len(drawn):,} trajectories, {right:,} of them right "
                f"(refused: {refused or 'no candidates'}); roll out more questions, or some of which the policy gets "
                "a part right, or lower preference.*.min_margin"
            )
        write_jsonl(out, pairs)
        write_json(metrics, summary)
        counts = ", ".join(f"{summary[kind]['pairs']:,} {kind}" for kind in KINDS)
        run.finish(
            f"{counts} pairs from {summary['questions']:,} questions; "
            f"chosen minus rejected: {summary['length_difference']:+.1f} in length"
        )
