"""The vote: of a policy's samples of one question, coherent ones count more. Is the answer they elect right more often?

    data/platinum_eval/<policy>.jsonl  ->  metrics/vote/<policy>.json, metrics/vote_details/<policy>.json,
                                           data/votes/<policy>.jsonl

It needs no model. `regime_w.vote` names the signal that counts. The details have the vote by every signal. The votes
have a row for each question, whether the majority and coherence elect the right answer (1/m when m answers tie):

    {"id": "platinum-00003", "majority": 0.5, "coherent": 1.0}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.regime_w.voting import Voter
from stages.run.files import FieldTypes, read_jsonl, write_json, write_jsonl
from stages.run.params import load_params
from stages.run.paths import PLATINUM_EVAL, VOTE_DETAILS, VOTE_METRICS, VOTES
from stages.run.stage import stage_run
from stages.stats.vote import VoteSummary

FIELDS: FieldTypes = {"id": str, "question": str}


def main(policy: str) -> None:
    """Count the votes of one policy: `base`, `sft`, or the name of a round.

    Raises UserError when the scorer cannot be used, or the samples lack what `regime_w.vote` needs.
    """
    rows_file, votes_file = PLATINUM_EVAL / f"{policy}.jsonl", VOTES / f"{policy}.jsonl"
    metrics_file, details_file = VOTE_METRICS / f"{policy}.json", VOTE_DETAILS / f"{policy}.json"
    with stage_run(
        "vote",
        variant=policy,
        sections=("regime_w.scorer", "regime_w.vote", "regime_w.weights"),
        inputs=[rows_file, Path(load_params().regime_w.scorer)],
        outputs=[metrics_file, details_file, votes_file],
    ) as run:
        voter = Voter(run.params.regime_w)
        summary = VoteSummary(voter.rule)
        votes = []
        for row in read_jsonl(rows_file, FIELDS):
            if row.get("samples"):
                summary.add(row, voter.weigh(row["question"], row["samples"], row["id"]))
                votes.append({"id": row["id"], **summary.last()})

        metrics = summary.metrics() if summary.majority else {"questions": 0}
        write_jsonl(votes_file, votes)
        write_json(details_file, metrics)
        write_json(metrics_file, headline(metrics))
        run.finish(words(metrics))


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """The few metrics that `dvc metrics show` prints; all others are in metrics/vote_details/."""
    if not metrics["questions"]:
        return {}
    names = [f"{name}_at_{metrics['samples']}" for name in ("maj", "coherent", "pass")]
    return {**{name: metrics[name] for name in names}, "vote_p": metrics["p"]}


def words(metrics: dict[str, Any]) -> str:
    """What the vote brought, in one line."""
    if not metrics["questions"]:
        return "no samples were drawn (evaluate.samples is 0), so there is nothing to vote on"
    k = metrics["samples"]
    return (
        f"{metrics['questions']:,} questions of {k} samples: majority {metrics[f'maj_at_{k}']:.1%}, "
        f"by {metrics['vote']} {metrics[f'coherent_at_{k}']:.1%}; {metrics['verdict']}"
    )
