"""Picks one answer out of several samples: each votes for its own answer, and coherent ones count more.

    Voter(params.regime_w).weigh(question, samples)["s_cf"]    ->  [0.57, 0.57, 0.45, 0.01]

A rule gives each sample a weight:

- s_end, s_path, s_cf, s_wm: a signal of the scorer. s_end is plain majority.
- reach: s_cf, and a little for each number of the question with which the sample's answer moves.
- logprob: how sure the policy was of the sample. both: s_cf times that. all: reach times that.

No gold is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.regime_w.confidence import probability
from stages.regime_w.scorer import QuestionScorer, solution_views
from stages.regime_w.signals import SIGNALS, analyse_group
from stages.run.errors import UserError
from stages.text.answers import read_answer

if TYPE_CHECKING:
    from stages.run.params import RegimeW

# Every sample has this share of a vote, so that without any signal the majority wins.
SHARE = 0.01
# What the numbers count that move the answer. It decides where s_cf says nothing; chosen on validation (bench/vote.py).
REACH = 0.3


class Voter:
    """Weighs samples by every rule; `rule`, or else `regime_w.vote`, is the one that counts.

    Raises UserError when the scorer that `params` name cannot be used.
    """

    def __init__(self, params: RegimeW, rule: str | None = None) -> None:
        self.rule = rule or params.vote
        self.scorer = QuestionScorer(params)

    def weigh(
        self, question: str, samples: Sequence[Mapping[str, Any]], name: str | int = ""
    ) -> dict[str, list[float]]:
        """The weights of a question's samples by each rule, in their order.

        A sample has `completion`, and may have `logprob` and `tokens`; when one has not, `logprob`, `both` and `all`
        are left out. `name` is the question's id, for messages. Raises UserError when the rule that counts is left out.
        """
        texts = [
            {**{key: value for key, value in one.items() if key != "correct"}, "text": one["completion"]}
            for one in samples
        ]
        views = solution_views(texts, [read_answer(one["text"], question) for one in texts])
        group = analyse_group(question, views)
        score = self.scorer.signals({"id": name, "question": question}, views, group)
        weights = {signal: [value + SHARE for value in getattr(score, signal)] for signal in SIGNALS}
        numbers = max(1, len(group.numbers))
        reached = [REACH * reasoning.moves / numbers for reasoning in group.reasonings]
        weights["reach"] = [a + b for a, b in zip(weights["s_cf"], reached, strict=True)]
        likely = [probability(one) for one in samples]
        if None not in likely:
            weights["logprob"] = [one or 0.0 for one in likely]
            for rule, other in (("both", "s_cf"), ("all", "reach")):
                weights[rule] = [a * b for a, b in zip(weights[other], weights["logprob"], strict=True)]
        if self.rule not in weights:
            raise UserError(
                f"question '{name}': a sample has no 'logprob' or no 'tokens', which the vote by "
                f"'{self.rule}' needs; vote by one of {', '.join(weights)}"
            )
        return weights
