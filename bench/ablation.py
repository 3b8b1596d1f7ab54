"""Which pairs make DPO better? Seven ways to choose them on the tiny profile, five seeds, paired on Platinum.

    python bench/ablation.py --keep ablation     # an hour and a half on two cores

    kappa 0    correctness pairs, chosen without coherence: the classical formula, by which correct trajectories of a
               question tie, so that it makes no coherence pairs
    margin     correctness pairs, the most coherent correct over the least coherent wrong one: the largest margin
    nearest    correctness pairs whose intermediate values overlap most: a wrong solution that nearly is the right one
    random     correctness pairs, partners drawn by lot
    kappa 1    as margin, plus coherence pairs by each trajectory's own s_wm: Regime W as it is shipped
    placebo    as kappa 1, but s_wm shuffled among the correct trajectories of each question; as many pairs
    sound      as margin, plus a sound solution over a lucky one, both correct

All arms of a seed share its problems, SFT adapter and rollouts. For coherence pairs only beating the placebo counts: it
has as many pairs of the same look, and none of the signal. Prints Markdown tables, those of docs/regime-w.md. What is
in the --keep folder is not run again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from arms import Arm, run_experiment
from common import ROOT, call, change

from stages.regime_w.pairs import Pair, Row, select
from stages.regime_w.reward import reward_parts
from stages.regime_w.solution import read_solution
from stages.run.files import read_jsonl, write_jsonl
from stages.run.params import load_params
from stages.run.paths import LAST

COMPARISONS = (
    ("kappa 1", "placebo"),
    ("kappa 1", "margin"),
    ("margin", "kappa 0"),
    ("nearest", "margin"),
    ("random", "margin"),
    ("sound", "margin"),
)


def main() -> None:
    """Run every arm of every seed and print the tables."""
    run_experiment(__doc__, [Arm(name, trained_on(make)) for name, make in ARMS.items()], COMPARISONS)


def trained_on(make: Callable[[Path, int], None]) -> Callable[[Path, int], int]:
    """An arm that trains on the pairs which `make` writes."""

    def run(place: Path, seed: int) -> int:
        make(place, seed)
        call(place, "python", "-m", "stages", "dpo")
        return sum(1 for _ in read_jsonl(place / LAST.pairs))

    return run


# ---- the kinds of pairs --------------------------------------------------------------------------------


def by_stages(place: Path, kappa: float, coherence: bool, placebo_seed: int | None = None) -> None:
    """Let the stages make the pairs; with a seed, from s_wm shuffled among correct trajectories."""
    count = load_params(ROOT).preference.coherence.per_question if coherence else 0
    keys = [f"regime_w.reward.kappa={kappa}", f"preference.coherence.per_question={count}"]
    change(place / "params.yaml", keys)
    call(place, "python", "-m", "stages", "coherence")
    if placebo_seed is not None:
        shuffle(place, placebo_seed)
    call(place, "python", "-m", "stages", "preference")


def placebo(place: Path, seed: int) -> None:
    """As many pairs of each kind as the real signal makes, from a shuffled one."""
    by_stages(place, 1.0, True)
    wanted = Counter(pair["kind"] for pair in read_jsonl(place / LAST.pairs))
    by_stages(place, 1.0, True, seed)
    same_count(place / LAST.pairs, wanted, seed)


def shuffle(place: Path, seed: int) -> None:
    """Shuffle each question's s_wm among its correct trajectories, and reward them by it."""
    terms = load_params(place).regime_w.reward
    records = list(read_jsonl(place / LAST.scored))
    for record in records:
        right = [row for row in record["trajectories"] if row["correct"]]
        values = [row["s_wm"] for row in right]
        random.Random(f"{seed}/placebo/{record['id']}").shuffle(values)
        for row, value in zip(right, values, strict=True):
            row["s_wm"] = value
            row["reward"] = reward_parts(
                True, value, record["s_wm"], record["s_end"], row["tokens"], terms
            ).total
    write_jsonl(place / LAST.scored, records)


def same_count(path: Path, wanted: Counter[str], seed: int) -> None:
    """Drop random pairs of each kind until there are no more than `wanted` of it."""
    pairs = list(read_jsonl(path))
    order = list(range(len(pairs)))
    random.Random(f"{seed}/same count").shuffle(order)
    for kind, count in wanted.items():
        for surplus in [index for index in order if pairs[index].get("kind") == kind][count:]:
            pairs[surplus] = {}
    write_jsonl(path, filter(None, pairs))


class Nearest(Pair):
    """A pair that counts the more, the more its two sides' intermediate values overlap (as s_path counts it)."""

    @property
    def margin(self) -> float:
        """Above any min_margin."""
        a, b = (
            Counter(equation.value for equation in read_solution(row["text"]).equations)
            for row in (self.chosen, self.rejected)
        )
        return 1 + 2 * (a & b).total() / max(1, a.total() + b.total())


class Drawn(Pair):
    """A pair that counts as the lot falls."""

    @property
    def margin(self) -> float:
        """Above any min_margin."""
        return 1 + random.Random(f"{self.chosen['id']}>{self.rejected['id']}").random()


def partners(kind: type[Pair]) -> Callable[[Path, int], None]:
    """Correctness pairs whose partners are chosen by that kind's margin."""

    def make(place: Path, seed: int) -> None:
        by_stages(place, 1.0, False)
        write_jsonl(place / LAST.pairs, chosen(place, kind, "correctness", lambda a, b: not b["correct"]))

    return make


def sound_over_lucky(place: Path, seed: int) -> None:
    """Correctness pairs by the largest margin, and a sound solution over a lucky one."""
    by_stages(place, 1.0, False)
    correctness = list(read_jsonl(place / LAST.pairs))
    more = chosen(
        place, Drawn, "coherence", lambda a, b: (a["soundness"], b["soundness"]) == ("sound", "lucky")
    )
    write_jsonl(place / LAST.pairs, correctness + more)


def chosen(place: Path, pair: type[Pair], kind: str, wanted: Callable[[Row, Row], bool]) -> list[Row]:
    """The records of the pairs of a correct trajectory over another one, within the limits of their kind."""
    limits = getattr(load_params(ROOT).preference, kind)  # an arm may have turned them off
    records = []
    for question in read_jsonl(place / LAST.scored):
        rows = question["trajectories"]
        candidates = [pair(kind, question, a, b) for a in rows for b in rows if a["correct"] and wanted(a, b)]
        faults = {id(row): row["fault"] for row in rows}
        records += [one.record() for one in select(candidates, limits, faults, Counter())]
    return records


ARMS: dict[str, Callable[[Path, int], None]] = {
    "kappa 0": lambda place, seed: by_stages(place, 0.0, False),
    "margin": lambda place, seed: by_stages(place, 1.0, False),
    "nearest": partners(Nearest),
    "random": partners(Drawn),
    "kappa 1": lambda place, seed: by_stages(place, 1.0, True),
    "placebo": placebo,
    "sound": sound_over_lucky,
}

if __name__ == "__main__":
    main()
