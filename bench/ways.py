"""Is DPO better than simply learning the right answers? Ways to train on the same pairs, on the tiny profile.

    python bench/ways.py --keep ways     # fifty minutes on two cores

Each way is one value of `dpo.loss_type`. `beta` means another thing in each loss, so each has its own; all other
parameters are the profile's. All ways of a seed share its problems, SFT adapter, rollouts and pairs. Prints Markdown
tables, those of docs/pipeline.md. What is in the --keep folder is not run again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from arms import Arm, run_experiment
from common import call, change

from stages.run.files import read_jsonl
from stages.run.paths import LAST

WAYS = {  # name: loss_type, loss_weights, beta
    "DPO + NLL": ("[sigmoid, sft]", "[1.0, 1.0]", 0.1),  # the profile's own
    "DPO": ("[sigmoid]", "[1.0]", 0.1),
    "RFT": ("[sft]", "[1.0]", 0.1),  # beta does nothing
    "IPO": ("[ipo]", "[1.0]", 1.0),  # a margin of half a nat a token
    "length-normalised DPO": ("[sigmoid_norm]", "[1.0]", 5.0),  # as Tülu 3 (arXiv 2411.15124)
}


def main() -> None:
    """Run every way on every seed and print the tables."""
    first, *others = WAYS
    arms = [Arm(name, trained_by(*loss)) for name, loss in WAYS.items()]
    run_experiment(__doc__, arms, [(first, other) for other in others])


def trained_by(losses: str, weights: str, beta: float) -> Callable[[Path, int], int]:
    """An arm that trains by those losses."""

    def run(place: Path, seed: int) -> int:
        keys = [f"dpo.loss_type={losses}", f"dpo.loss_weights={weights}", f"dpo.beta={beta}"]
        change(place / "profiles/tiny.yaml", keys)
        call(place, "python", "-m", "stages", "preference")
        call(place, "python", "-m", "stages", "dpo")
        return sum(1 for _ in read_jsonl(place / LAST.pairs))

    return run


if __name__ == "__main__":
    main()
