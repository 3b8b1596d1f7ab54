"""Which weights elect the right answer, and does the policy's own confidence add to coherence?

    python bench/vote.py                                          # three minutes on two cores
    python bench/vote.py --groups example_model_solutions.jsonl   # also the real groups of four

Weights are chosen on the validation questions: each policy of the last run draws `--samples` solutions of each, which
are cut into groups of eight. The chosen ones are then tried on Platinum, on the samples of the last run's evaluation
(`dvc repro` first). Prints Markdown tables.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, change, groups_of_four, make_workplace, new_parser, note, print_table
from numpy.typing import NDArray
from scipy.stats import rankdata  # type: ignore[import-untyped]

from stages.regime_w.confidence import POWER
from stages.regime_w.signals import SIGNALS
from stages.regime_w.voting import REACH, SHARE, Voter
from stages.run.files import read_jsonl
from stages.run.params import load_params
from stages.run.paths import CHANGED, PLATINUM, PLATINUM_EVAL, TESTS, VALID
from stages.run.rounds import shown
from stages.stats.one import elected, votes_of
from stages.stats.vote import VoteSummary
from stages.text.answers import gold_answer, read_answer, same_answer

K = 8
POWERS = (1, 4, 16, 32, 64, 128, 1000)
REACHES = (0.01, 0.03, 0.1, 0.3, 1)
RESAMPLES = 400
Weigh = Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class Group:
    """K samples of one question: what each votes for, whether it is right, and what it is worth."""

    votes: list[Any]
    right: NDArray[np.bool_]
    # The signals; `moves`: the share of the question's numbers that move the answer; `p`: the probability to the POWER.
    worth: list[dict[str, float]]


def main() -> None:
    """Choose on validation, try on Platinum, then the real groups."""
    parser = new_parser(__doc__)
    parser.add_argument("--samples", type=int, default=32, help="a validation question; a multiple of 8")
    parser.add_argument("--groups", type=Path, help="example_model_solutions.jsonl of grade-school-math")
    options = parser.parse_args()
    with contextlib.chdir(ROOT):
        voter = Voter(load_params().regime_w)
        valid = {
            name: [group for row in rows for group in cut(voter, row)]
            for name, rows in drawn_on_validation(options.samples)
        }
        started = time.process_time()
        rows = {
            name: list(read_jsonl(PLATINUM_EVAL / f"{name}.jsonl")) for name in load_params().policy_names
        }
        platinum = {
            name: [group for row in rows[name] for group in cut(voter, row)]
            for name in load_params().policy_names
        }
        seconds = time.process_time() - started
    samples = sum(len(row["samples"]) for table in rows.values() for row in table)
    print(f"read and weighed on one core: {samples / seconds:,.0f} samples a second of processor time\n")

    print("Points above the majority, mean of the three policies (each):\n")
    lines = []
    for name, weigh in candidates():
        lines.append([name, *(gains(weigh, groups) for groups in (valid, platinum))])
    print_table(["weight", "validation", "Platinum"], lines)

    print("\nRight over wrong, overall / within a question:\n")
    mixed: Weigh = lambda one: (one["s_wm"] + one["p"]) / 2  # noqa: E731
    measures: dict[str, Weigh] = {
        "s_cf": lambda one: one["s_cf"],
        "s_wm": lambda one: one["s_wm"],
        "probability": lambda one: one["p"],
        "half s_wm, half probability": mixed,
    }
    head = [
        f"{shown(name)}, {where}"
        for where in ("validation", "Platinum")
        for name in load_params().policy_names
    ]
    groups = [*valid.values(), *platinum.values()]
    print_table(
        ["measure", *head],
        [
            [name, *(f"{a:.3f} / {b:.3f}" for a, b in (aucs(one, weigh) for one in groups))]
            for name, weigh in measures.items()
        ],
    )
    print("\nThe mixture minus each alone, with 95 % intervals by question:\n")
    print_table(
        ["against", *head],
        [
            [name, *(against(one, mixed, measures[name]) for one in groups)]
            for name in ("s_wm", "probability")
        ],
    )
    if options.groups:
        real_groups(voter, options.groups)


def candidates() -> Iterator[tuple[str, Weigh]]:
    """The weights that are tried."""

    def mix(signal: str, reach: float, power: float) -> Weigh:
        """(signal + its share + reach * the numbers that move the answer) * probability^power"""
        return lambda one: (one.get(signal, 0) + SHARE + reach * one["moves"]) * one["p"] ** (power / POWER)

    for signal in SIGNALS:
        yield signal, mix(signal, 0, 0)
    yield "numbers that move it", mix("", 1, 0)
    for reach in REACHES:
        yield f"s_cf + {reach} · numbers", mix("s_cf", reach, 0)
    for n in POWERS:
        yield f"probability^{n}", mix("", 0, n)
    for n in POWERS:
        yield f"s_cf · probability^{n}", mix("s_cf", 0, n)
    for reach in REACHES:
        yield f"(s_cf + {reach} · numbers) · probability^{POWER}", mix("s_cf", reach, POWER)


def drawn_on_validation(samples: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Each policy's samples of the validation questions, drawn as the evaluation draws them."""
    with tempfile.TemporaryDirectory(prefix="bench-vote-") as folder:
        place = make_workplace(Path(folder) / "run")
        shutil.copy2("dvc.yaml", place)
        change(place / "profiles" / f"{load_params().profile}.yaml", [f"evaluate.samples={samples}"])
        (place / "checkpoints").symlink_to(ROOT / "checkpoints")
        (place / PLATINUM).parent.mkdir(parents=True)
        shutil.copy2(VALID, place / PLATINUM)
        (place / CHANGED).touch()
        (place / TESTS).touch()
        for name in load_params().policy_names:
            command = [sys.executable, "-m", "stages", "evaluate", name]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"evaluate {name}: {done.stderr.strip()}")
            note(done.stderr.strip().splitlines()[-1])
            yield name, list(read_jsonl(place / PLATINUM_EVAL / f"{name}.jsonl"))


def cut(voter: Voter, row: Mapping[str, Any]) -> Iterator[Group]:
    """The row's samples in groups of K."""
    for start in range(0, len(row["samples"]), K):
        samples = row["samples"][start : start + K]
        weights = voter.weigh(row["question"], samples, row["id"])
        worth = [
            {
                **{signal: weights[signal][i] - SHARE for signal in SIGNALS},
                "moves": (weights["reach"][i] - weights["s_cf"][i]) / REACH,
                "p": max(1e-300, weights["logprob"][i]),
            }
            for i in range(len(samples))
        ]
        yield Group(votes_of(samples), np.array([sample["correct"] for sample in samples]), worth)


def gains(weigh: Weigh, groups: Mapping[str, Sequence[Group]]) -> str:
    """`+1.29 (+0.78 +1.76 +1.32)`"""
    points = []
    for table in groups.values():
        won = [elected(one.votes, [weigh(worth) for worth in one.worth]) for one in table]
        plain = [elected(one.votes, [1] * len(one.votes)) for one in table]
        points.append(100 * float(np.mean(won) - np.mean(plain)))
    return f"{np.mean(points):+.2f} ({' '.join(f'{one:+.2f}' for one in points)})"


def aucs(groups: Sequence[Group], weigh: Weigh) -> tuple[float, float]:
    """Chance that a right sample is above a wrong one: of any question, and of the same one."""
    values, right, counts = arrays(groups, weigh)
    ones = np.ones(len(groups), dtype=np.int64)
    return overall(values, right, ones), within(counts, ones)


def arrays(
    groups: Sequence[Group], weigh: Weigh
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Values and verdicts by group, and of each group how many pairs are ranked right, and how many there are."""
    values = np.array([[weigh(worth) for worth in one.worth] for one in groups])
    right = np.array([one.right for one in groups])
    counts = np.zeros((len(groups), 2))
    for index, (row, verdicts) in enumerate(zip(values, right, strict=True)):
        above = row[verdicts][:, None] - row[~verdicts][None, :]
        counts[index] = (above > 0).sum() + 0.5 * (above == 0).sum(), above.size
    return values, right, counts


def overall(values: NDArray[np.float64], right: NDArray[np.bool_], chosen: NDArray[np.int64]) -> float:
    """The AUC over all samples, where group i counts `chosen[i]` times."""
    rows = np.repeat(np.arange(len(values)), chosen)
    flat, verdicts = values[rows].ravel(), right[rows].ravel()
    good = int(verdicts.sum())
    ranks = float(rankdata(flat)[verdicts].sum())
    return (ranks - good * (good + 1) / 2) / (good * (len(flat) - good))


def within(counts: NDArray[np.float64], chosen: NDArray[np.int64]) -> float:
    """The AUC inside questions, where group i counts `chosen[i]` times."""
    wins, pairs = chosen @ counts
    return float(wins / pairs)


def against(groups: Sequence[Group], weigh: Weigh, other: Weigh) -> str:
    """The difference of two AUCs, overall and within, with bootstrap intervals by group."""
    (values, right, counts), (values2, _, counts2) = arrays(groups, weigh), arrays(groups, other)
    rng = np.random.default_rng(0)
    size = len(groups)
    draws = [np.bincount(rng.integers(0, size, size), minlength=size) for _ in range(RESAMPLES)]
    cells = []
    for difference in (
        lambda chosen: overall(values, right, chosen) - overall(values2, right, chosen),
        lambda chosen: within(counts, chosen) - within(counts2, chosen),
    ):
        low, high = np.percentile([difference(chosen) for chosen in draws], [2.5, 97.5])
        cells.append(f"{difference(np.ones(size, dtype=np.int64)):+.3f} ({low:+.3f} to {high:+.3f})")
    return " / ".join(cells)


def real_groups(voter: Voter, source: Path) -> None:
    """The vote on the real groups of four."""
    summary = VoteSummary(voter.rule)
    for record in groups_of_four(source):
        samples = []
        for one in record["trajectories"]:
            answer = read_answer(one["text"], record["question"]).answer
            correct = same_answer(answer, gold_answer(record["gold"]))
            samples.append({"completion": one["text"], "answer": answer, "correct": correct})
        row = {"id": record["id"], "samples": samples}
        summary.add(row, voter.weigh(record["question"], samples, record["id"]))
    made = summary.metrics()
    limits = f"majority {made['maj_at_4']:.1%}, ceiling {made['pass_at_4']:.1%}"
    print(f"\n{made['questions']:,} real groups of four: {limits}\n")
    rows = [
        [rule, f"{100 * one['accuracy']:.1f}", interval(one, "difference"), f"{one['p']:.2g}"]
        for rule, one in made["by"].items()
    ]
    print_table(
        ["weight", "right", "points above the majority", "p"],
        [*rows, [f"{voter.rule}, shuffled", "", interval(made, "control_difference"), ""]],
    )


def interval(values: Mapping[str, Any], name: str) -> str:
    """`+1.3 (+0.5 to +2.1)`"""
    change, low, high = (100 * values[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{change:+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
