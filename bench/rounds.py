"""What does a second round bring? One round, one round of twice the questions, and two rounds, on the tiny profile.

    python bench/rounds.py --keep rounds     # half an hour on two cores

The second round draws trajectories of other questions from the policy that the first one made, and trains that policy
on. It costs as many completions as a single round of twice the questions, so that one is what it must beat. All arms
of a seed share its problems and SFT adapter. Prints Markdown tables, those of docs/pipeline.md. What is in the --keep
folder is not run again.
"""

from __future__ import annotations

from pathlib import Path

from arms import Arm, run_experiment
from common import call, change

from stages.run.files import read_jsonl
from stages.run.paths import BASE, LAST, SFT_ADAPTER, RoundPaths

FIRST = RoundPaths("round1")
COMPARISONS = (
    ("one round", "SFT"),
    ("two rounds", "one round"),
    ("two rounds", "twice the questions"),
    ("twice the questions", "one round"),
)


def main() -> None:
    """Run every arm of every seed and print the tables."""
    run_experiment(__doc__, [Arm(name, run) for name, run in ARMS.items()], COMPARISONS)


def one_round(place: Path, seed: int) -> int:
    """As the profile has it, from the trajectories that are there."""
    return train(place, LAST, "preference", "dpo")


def twice_the_questions(place: Path, seed: int) -> int:
    """One round that asks all training questions: as many as two rounds ask."""
    change(place / "profiles/tiny.yaml", ["rollout.questions=null"])
    return train(place, LAST)


def two_rounds(place: Path, seed: int) -> int:
    """A round before the last one, which goes on from it."""
    nothing = "rollout: {}, preference: {}, dpo: {}"  # of its own
    first = f"round1: {{start: {SFT_ADAPTER}, {nothing}}}"
    last = f"{LAST.round}: {{start: {FIRST.adapter}, {nothing}}}"
    adapters = {"base": BASE / "manifest.json", "sft": SFT_ADAPTER} | {
        one.round: one.adapter for one in (FIRST, LAST)
    }
    policies = ", ".join(f"{name}: {adapter}" for name, adapter in adapters.items())
    change(place / "params.yaml", [f"rounds={{{first}, {last}}}", f"policies={{{policies}}}"])
    return train(place, FIRST) + train(place, LAST)


def train(place: Path, one: RoundPaths, *stages: str) -> int:
    """Run the stages of a round; returns how many pairs it had."""
    for stage in stages or ("rollout", "coherence", "preference", "dpo"):
        call(place, "python", "-m", "stages", stage, one.round)
    return sum(1 for _ in read_jsonl(place / one.pairs))


ARMS = {"one round": one_round, "twice the questions": twice_the_questions, "two rounds": two_rounds}

if __name__ == "__main__":
    main()
