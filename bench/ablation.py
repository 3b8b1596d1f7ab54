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

import argparse
import hashlib
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student
from workplace import ROOT, call, change, copy_project

sys.path.insert(0, str(ROOT))
from stages.core.params import load_params
from stages.core.records import jsonl_line, read_jsonl
from stages.core.stats import bootstrap_interval, majority
from stages.regime_w.reward import RewardParams, reward
from stages.regime_w.signals import score_group, soundness

ARMS = ("correctness", "kappa 0", "kappa 1", "placebo")
SCORED, PAIRS = Path("data/regime_w_rollouts.jsonl"), Path("data/coherence_preferences.jsonl")
MEASURES = ("greedy", "mean@8", "maj@8", "pass@8", "sound among correct", "s_wm")
Measures = dict[str, list[float]]  # one value a question, in the order of the held-out file


def main() -> None:
    """Run every arm of every seed and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 1, 2])
    parser.add_argument(
        "--keep", type=Path, help="keep the runs in this folder, and go on with what is there"
    )
    parser.add_argument(
        "--set", dest="changes", nargs="*", default=[], metavar="KEY=VALUE", help="profile values"
    )
    options = parser.parse_args()
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="ablation-"))).resolve()
    results = {seed: run_seed(seed, folder / f"seed-{seed}", options.changes) for seed in options.seeds}
    print(arms_table(results))
    for other in ("correctness", "placebo"):
        print(f"\nkappa 1 minus {other}, in points (s_wm in hundredths), with 95 % intervals\n")
        print(difference_table(results, other))
    if not options.keep:
        shutil.rmtree(folder)


def run_seed(seed: int, place: Path, changes: list[str]) -> dict[str, dict[str, Any]]:
    """All arms of one seed: pairs of each kind, and the measures of every held-out question."""
    done = place / "ablation"
    if not done.is_dir():
        copy_project(place)
        change(place / "params.yaml", [f"seed={seed}"])
        change(place / "profiles/tiny.yaml", [f"model.seed={seed}", *changes])
        call(place, "dvc", "repro", "-q", "rollout")
        done.mkdir()
    results: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        target = done / f"{arm.replace(' ', '-')}.json"
        if not target.is_file():
            make_pairs(place, arm, seed, results)
            digest = hashlib.sha256((place / PAIRS).read_bytes()).hexdigest()
            twin = next((other for other, row in results.items() if row["sha256"] == digest), None)
            if twin is None:
                call(place, "python", "-m", "stages", "dpo")
                call(place, "python", "-m", "stages", "evaluate", "dpo")
            measures = results[twin]["measures"] if twin else measure(place)
            kinds = [pair["kind"] for pair in read_jsonl(place / PAIRS)]
            counts = {kind: kinds.count(kind) for kind in ("correctness", "coherence")}
            target.write_text(json.dumps({"sha256": digest, "pairs": counts, "measures": measures}))
        results[arm] = json.loads(target.read_text())
        print(
            f"seed {seed}, {arm}: {results[arm]['pairs']}, {summary(results[arm]['measures'])}",
            file=sys.stderr,
        )
    return results


# ---- the four kinds of pairs -------------------------------------------------------------------------


def make_pairs(place: Path, arm: str, seed: int, results: dict[str, dict[str, Any]]) -> None:
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
        same_count(place / PAIRS, results["kappa 1"]["pairs"], seed)


def shuffle(place: Path, seed: int) -> None:
    """Deal each question's s_wm anew among its correct trajectories, and reward them by it."""
    weights = RewardParams(**load_params(place).regime_w.reward.model_dump())
    lines = []
    for record in read_jsonl(place / SCORED):
        right = [row for row in record["trajectories"] if row["correct"]]
        values = [row["s_wm"] for row in right]
        random.Random(f"{seed}/placebo/{record['id']}").shuffle(values)
        for row, value in zip(right, values, strict=True):
            row["s_wm"] = value
            row["reward"] = reward(True, value, record["s_wm"], record["s_end"], row["tokens"], weights)
        lines.append(jsonl_line(record))
    (place / SCORED).write_text("".join(lines))


def same_count(path: Path, wanted: dict[str, int], seed: int) -> None:
    """Drop random pairs of a kind until there are no more than `wanted` of it."""
    pairs = list(read_jsonl(path))
    order = list(range(len(pairs)))
    random.Random(f"{seed}/same count").shuffle(order)
    for kind, count in wanted.items():
        surplus = [index for index in order if pairs[index] and pairs[index]["kind"] == kind][count:]
        for index in surplus:
            pairs[index] = {}
    path.write_text("".join(jsonl_line(pair) for pair in pairs if pair))


# ---- what is measured --------------------------------------------------------------------------------


def measure(place: Path) -> Measures:
    """Each measure's value for every held-out question, from the evaluated completions."""
    solutions = {row["id"]: row["answer"] for row in read_jsonl(place / "data/gsm8k/platinum.jsonl")}
    values: Measures = {
        name: [] for name in ("greedy", "mean@8", "maj@8", "pass@8", "right", "sound", "s_wm")
    }
    for row in read_jsonl(place / "data/platinum_eval/dpo.jsonl"):
        samples = row["samples"]
        views = [{"text": one["completion"], "answer": one["answer"]} for one in samples]
        right = [view for view, one in zip(views, samples, strict=True) if one["correct"]]
        solution, gold = solutions[row["id"]], row["gold"]
        values["greedy"].append(float(row["correct"]))
        values["mean@8"].append(len(right) / len(samples))
        values["maj@8"].append(majority(samples))
        values["pass@8"].append(float(bool(right)))
        values["right"].append(len(right))
        values["sound"].append(
            sum(soundness(row["question"], solution, gold, one) == "sound" for one in right)
        )
        values["s_wm"].append(score_group(row["question"], views).mean("s_wm"))
    return values


def level(measures: Measures, name: str) -> float:
    """A measure over all questions."""
    if name == "sound among correct":
        return sum(measures["sound"]) / sum(measures["right"])
    return sum(measures[name]) / len(measures[name])


def summary(measures: Measures) -> str:
    """All measures of one arm in a line."""
    return ", ".join(f"{name} {100 * level(measures, name):.1f}" for name in MEASURES)


def difference(a: Measures, b: Measures, name: str) -> tuple[float, float, float]:
    """b minus a, paired by question, with its bootstrap interval."""
    if name != "sound among correct":
        values = np.array(b[name]) - np.array(a[name])
        return float(values.mean()), *bootstrap_interval(values, seed=0)
    parts = np.array([a["sound"], a["right"], b["sound"], b["right"]])
    rng = np.random.default_rng(0)
    drawn = np.array(
        [parts[:, rng.integers(0, parts.shape[1], parts.shape[1])].sum(axis=1) for _ in range(4000)]
    )
    shares: Callable[[Any], Any] = lambda sums: sums[..., 2] / sums[..., 3] - sums[..., 0] / sums[..., 1]  # noqa: E731
    low, high = np.percentile(shares(drawn), [2.5, 97.5])
    return float(shares(parts.sum(axis=1))), float(low), float(high)


# ---- tables ------------------------------------------------------------------------------------------


def arms_table(results: dict[int, dict[str, dict[str, Any]]]) -> str:
    """One line per seed and arm."""
    lines = ["| seed | arm | pairs (correctness + coherence) | " + " | ".join(MEASURES) + " |"]
    lines.append("|---" * (len(MEASURES) + 3) + "|")
    for seed, arms in results.items():
        for arm, row in arms.items():
            pairs = row["pairs"]
            cells = [f"{100 * level(row['measures'], name):.1f}" for name in MEASURES]
            lines.append(
                f"| {seed} | {arm} | {pairs['correctness']} + {pairs['coherence']} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def difference_table(results: dict[int, dict[str, dict[str, Any]]], other: str) -> str:
    """kappa 1 against another arm: each seed, and the mean over seeds (Student's t over seeds)."""
    lines = ["| seed | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    columns: dict[str, list[float]] = {name: [] for name in MEASURES}
    for seed, arms in results.items():
        cells = []
        for name in MEASURES:
            value, low, high = difference(arms[other]["measures"], arms["kappa 1"]["measures"], name)
            columns[name].append(value)
            cells.append(f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    if len(results) > 1:
        cells = []
        for values in columns.values():
            mean, half = float(np.mean(values)), spread(values)
            cells.append(f"{100 * mean:+.1f} ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f})")
        lines.append("| mean of seeds | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> float:
    """Half the 95 % interval of a mean over seeds."""
    size = len(values)
    return float(student.ppf(0.975, size - 1) * np.std(values, ddof=1) / math.sqrt(size))


if __name__ == "__main__":
    main()
