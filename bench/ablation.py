"""Does coherence help? DPO on the tiny profile from four kinds of pairs, several seeds, paired on held-out problems.

    python bench/ablation.py --seeds 17 1 2 --keep ablation     # about 12 minutes a seed on two cores

    correctness   correctness pairs alone, chosen without coherence (kappa 0)
    kappa 0       plus coherence pairs by the classical formula, in which correct trajectories of a question tie
    kappa 1       plus coherence pairs by each trajectory's own s_wm
    placebo       as kappa 1, but s_wm shuffled among the correct trajectories of each question; as many pairs

All arms of a seed share its problems, base model, SFT adapter and rollouts. Only beating the placebo counts: it
has as many pairs of the same look, and none of the signal. Prints Markdown tables, those of docs/regime-w.md.
What is in the --keep folder is not run again.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, call, change, copy_project, new_parser, note, print_table
from scipy.stats import t as student

from stages.regime_w.reward import reward_parts
from stages.regime_w.signals import analyse_group, judge, score_group
from stages.run.files import read_json, read_jsonl, sha256_file, write_json, write_jsonl
from stages.run.params import load_params
from stages.run.paths import LAST, PLATINUM, PLATINUM_EVAL
from stages.stats.one import bootstrap_interval, majority

ARMS = ("correctness", "kappa 0", "kappa 1", "placebo")
MEASURES = ("greedy", "mean@8", "maj@8", "pass@8", "sound among correct", "s_wm")
Measures = dict[str, list[float]]  # one value a question, in the order of the held-out file
Arms = dict[str, dict[str, Any]]  # of one seed: the pairs and the measures of each arm


def main() -> None:
    """Run every arm of every seed and print the tables."""
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 1, 2])
    parser.add_argument(
        "--keep", type=Path, help="keep the runs in this folder, and go on with what is there"
    )
    parser.add_argument(
        "--set", dest="changes", nargs="*", default=[], metavar="KEY=VALUE", help="of the profile"
    )
    options = parser.parse_args()
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="ablation-"))).resolve()
    results = {seed: run_seed(seed, folder / f"seed-{seed}", options.changes) for seed in options.seeds}
    rows = [
        [str(seed), arm, "{correctness} + {coherence}".format(**row["pairs"]), *levels(row["measures"])]
        for seed, arms in results.items()
        for arm, row in arms.items()
    ]
    print_table(["seed", "arm", "pairs (correctness + coherence)", *MEASURES], rows)
    for other in ("correctness", "placebo"):
        print(f"\nkappa 1 minus {other}, in points (s_wm in hundredths), with 95 % intervals\n")
        print_table(["seed", *MEASURES], difference_rows(results, other))
    if not options.keep:
        shutil.rmtree(folder)


def run_seed(seed: int, place: Path, changes: list[str]) -> Arms:
    """All arms of one seed: pairs of each kind, and the measures of every held-out question."""
    done = place / "ablation"
    if not done.is_dir():
        copy_project(place)
        change(place / "params.yaml", [f"seed={seed}"])
        change(place / "profiles/tiny.yaml", [f"model.seed={seed}", *changes])
        call(place, "dvc", "repro", "-q", "rollout")
        done.mkdir()
    results: Arms = {}
    for arm in ARMS:
        target = done / f"{arm.replace(' ', '-')}.json"
        if not target.is_file():
            make_pairs(place, arm, seed, results)
            digest = sha256_file(place / LAST.pairs)
            twin = next((row for row in results.values() if row["sha256"] == digest), None)
            if twin is None:
                call(place, "python", "-m", "stages", "dpo")
                call(place, "python", "-m", "stages", "evaluate", "dpo")
            kinds = Counter(pair["kind"] for pair in read_jsonl(place / LAST.pairs))
            pairs = {kind: kinds[kind] for kind in ("correctness", "coherence")}
            measures = twin["measures"] if twin else measure(place)
            write_json(target, {"sha256": digest, "pairs": pairs, "measures": measures})
        results[arm] = read_json(target)
        shown = zip(MEASURES, levels(results[arm]["measures"]), strict=True)
        note(f"seed {seed}, {arm}: {results[arm]['pairs']}, {', '.join(map(' '.join, shown))}")
    return results


# ---- the four kinds of pairs -------------------------------------------------------------------------


def make_pairs(place: Path, arm: str, seed: int, results: Arms) -> None:
    """Write the arm's preference pairs in `place`."""
    kappa = 0.0 if arm in ("correctness", "kappa 0") else 1.0
    per_question = 0 if arm == "correctness" else load_params(ROOT).preference.coherence.per_question
    keys = [f"regime_w.reward.kappa={kappa}", f"preference.coherence.per_question={per_question}"]
    change(place / "params.yaml", keys)
    call(place, "python", "-m", "stages", "coherence")
    if arm == "placebo":
        shuffle(place, seed)
    call(place, "python", "-m", "stages", "preference")
    if arm == "placebo":
        same_count(place / LAST.pairs, results["kappa 1"]["pairs"], seed)


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


def same_count(path: Path, wanted: dict[str, int], seed: int) -> None:
    """Drop random pairs of each kind until there are no more than `wanted` of it."""
    pairs = list(read_jsonl(path))
    order = list(range(len(pairs)))
    random.Random(f"{seed}/same count").shuffle(order)
    for kind, count in wanted.items():
        for surplus in [index for index in order if pairs[index].get("kind") == kind][count:]:
            pairs[surplus] = {}
    write_jsonl(path, filter(None, pairs))


# ---- what is measured --------------------------------------------------------------------------------


def measure(place: Path) -> Measures:
    """Each measure's value for every held-out question, from the evaluated completions."""
    solutions = {row["id"]: row["solution"] for row in read_jsonl(place / PLATINUM)}
    names = ("greedy", "mean@8", "maj@8", "pass@8", "right", "sound", "s_wm")
    values: Measures = {name: [] for name in names}
    for row in read_jsonl(place / PLATINUM_EVAL / "dpo.jsonl"):
        samples = row["samples"]
        views = [{"text": one["completion"], "answer": one["answer"]} for one in samples]
        right = [view for view, one in zip(views, samples, strict=True) if one["correct"]]
        gold = {"text": solutions[row["id"]], "answer": row["gold"]}
        *mine, golds = analyse_group(row["question"], [*right, gold]).reasonings
        judged = [judge(one, golds) for one in mine]
        s_wm = score_group(row["question"], views).mean("s_wm")
        found = (row["correct"], len(right) / len(samples), majority(samples), bool(right))
        for name, value in zip(names, (*found, len(right), judged.count("sound"), s_wm), strict=True):
            values[name].append(float(value))
    return values


def levels(measures: Measures) -> list[str]:
    """Each measure over all questions, in percent."""
    sums = {name: sum(values) for name, values in measures.items()}
    shares = {name: total / len(measures[name]) for name, total in sums.items()}
    shares["sound among correct"] = sums["sound"] / sums["right"]
    return [f"{100 * shares[name]:.1f}" for name in MEASURES]


def difference(a: Measures, b: Measures, name: str) -> tuple[float, float, float]:
    """b minus a, paired by question, with its bootstrap interval."""
    if name != "sound among correct":
        values = np.array(b[name]) - np.array(a[name])
        return float(values.mean()), *bootstrap_interval(values, seed=0)
    parts = np.array([a["sound"], a["right"], b["sound"], b["right"]])
    rng = np.random.default_rng(0)
    drawn = [parts[:, rng.integers(0, parts.shape[1], parts.shape[1])].sum(axis=1) for _ in range(4000)]
    value, *resampled = (sums[2] / sums[3] - sums[0] / sums[1] for sums in (parts.sum(axis=1), *drawn))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(value), float(low), float(high)


def difference_rows(results: dict[int, Arms], other: str) -> list[list[str]]:
    """kappa 1 against another arm: each seed, and the mean over seeds (Student's t over seeds)."""
    rows: list[list[str]] = []
    columns: dict[str, list[float]] = {name: [] for name in MEASURES}
    for seed, arms in results.items():
        rows.append([str(seed)])
        for name in MEASURES:
            value, low, high = difference(arms[other]["measures"], arms["kappa 1"]["measures"], name)
            columns[name].append(value)
            rows[-1].append(cell(value, low, high))
    if (size := len(results)) > 1:
        rows.append(["mean of seeds"])
        for values in columns.values():
            mean = float(np.mean(values))
            half = float(student.ppf(0.975, size - 1) * np.std(values, ddof=1) / math.sqrt(size))
            rows[-1].append(cell(mean, mean - half, mean + half))
    return rows


def cell(value: float, low: float, high: float) -> str:
    """`+1.2 (-0.2 to +2.5)`"""
    return f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


if __name__ == "__main__":
    main()
