"""Chooses the arms to pull for each question: every arm in turn (`Uniform`), or the arms that pay (`Thompson`).

    bandit = Thompson(arms, pulls=8, floor=0.25, seed=17)
    for round_number, questions in enumerate(rounds):
        chosen = {q: bandit.choose(round_number, q) for q in questions}
        bandit.learn([(pull.arm, verdict) ...] for each question)    # after the whole round

A pull *pays* when its group holds the opposite verdict too, so that it can enter a correctness pair. Thompson
sampling (Thompson 1933) keeps a Beta posterior of that chance for each arm. With probability `floor` a pull is made
uniformly instead. Those pulls are marked, because only their means are unbiased.

The choices of a round depend only on the seed, the verdicts of earlier rounds, the round's number and the question's
id. So a killed run that is given its finished rounds again makes the same choices as one that was never killed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000  # posterior draws behind a round's propensities


@dataclass(slots=True, frozen=True)
class Pull:
    """One pull: its arm, the chance with which that arm was taken, and whether it was a uniform one."""

    arm: str
    propensity: float
    uniform: bool


class Uniform:
    """Pulls every arm in turn: with as many pulls as arms, each of them once."""

    def __init__(self, arms: Sequence[str], pulls: int) -> None:
        self.pulls = [Pull(arms[index % len(arms)], 1 / len(arms), True) for index in range(pulls)]

    def choose(self, round_number: int, question_id: str) -> list[Pull]:
        """The same pulls for every question."""
        return self.pulls

    def learn(self, groups: Iterable[Sequence[tuple[str, bool]]]) -> None:
        """Uniform pulls do not depend on verdicts; `groups` is not read."""


def pays(verdicts: Sequence[bool]) -> list[bool]:
    """Which pulls of one question paid: all when it holds both verdicts, else none."""
    return [len(set(verdicts)) == 2] * len(verdicts)


class Thompson:
    """Thompson sampling of the arms that pay. The posterior changes only between rounds.

    A pull's propensity is exact for the mixture it was drawn from: the arms' chances under the posterior are
    estimated once a round from `DRAWS` draws, and pulls are then drawn from those chances.
    """

    def __init__(self, arms: Sequence[str], pulls: int, floor: float, seed: int | str) -> None:
        if not arms or pulls < 1 or not 0 <= floor <= 1:
            raise ValueError(f"bandit: {len(arms)} arms, {pulls} pulls, floor {floor}")
        self.arms = list(arms)
        self.pulls = pulls
        self.floor = floor
        self.seed = seed
        self.paid = dict.fromkeys(arms, 0)
        self.unpaid = dict.fromkeys(arms, 0)
        self._round: int | None = None
        self._chances = np.full(len(self.arms), 1 / len(self.arms))

    def choose(self, round_number: int, question_id: str) -> list[Pull]:
        """The pulls of one question of a round."""
        if round_number != self._round:
            self._round, self._chances = round_number, self._round_chances(round_number)
        rng = self._rng(round_number, question_id)
        size = len(self.arms)
        mixture = self.floor / size + (1 - self.floor) * self._chances
        chosen = []
        for _ in range(self.pulls):
            explored = bool(rng.random() < self.floor)
            index = int(rng.integers(size)) if explored else int(rng.choice(size, p=self._chances))
            chosen.append(Pull(self.arms[index], float(mixture[index]), explored))
        return chosen

    def learn(self, groups: Iterable[Sequence[tuple[str, bool]]]) -> None:
        """Learn from a whole round: for each question its pulls as (arm, correct), in any order of questions."""
        for group in groups:
            for (arm, _), paid in zip(group, pays([correct for _, correct in group]), strict=True):
                if paid:
                    self.paid[arm] += 1
                else:
                    self.unpaid[arm] += 1
        self._round = None

    def _round_chances(self, round_number: int) -> np.ndarray:
        rng = self._rng(round_number, "")
        a = [1 + self.paid[arm] for arm in self.arms]
        b = [1 + self.unpaid[arm] for arm in self.arms]
        best = np.argmax(rng.beta(a, b, size=(DRAWS, len(self.arms))), axis=1)
        return np.bincount(best, minlength=len(self.arms)) / DRAWS

    def _rng(self, round_number: int, question_id: str) -> np.random.Generator:
        name = f"{self.seed}|{round_number}|{question_id}"
        return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
