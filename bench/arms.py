"""Arms of an experiment on the tiny profile: DPO several times from the same SFT policy and rollouts, on several seeds.

What an arm changes is either the pairs or the profile. Each is trained, evaluated on the same Platinum questions as
all others, and compared with another arm, paired: by question within a seed, then over the seeds.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from common import call, change, copy_project, new_parser, note, print_table
from scipy.stats import t as student

from stages.regime_w.voting import Voter
from stages.run.files import read_json, read_jsonl, write_json, write_jsonl
from stages.run.params import load_params
from stages.run.paths import CHANGED, PLATINUM, PLATINUM_EVAL
from stages.stats.one import bootstrap_interval, elected, votes_of

SEEDS = (17, 1, 2, 3, 4)
MEASURES = ("greedy", "mean@8", "coherent@8", "both")
Measures = dict[
    str, list[float]
]  # a value for each question (of `both`: each that has a twin), in the file's order
START = "SFT"  # the policy that all arms of a seed start from, shown as an arm


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    run: Callable[
        [Path, int], int
    ]  # makes the policy in that folder, given the seed; returns how many pairs it used


def arms_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that such an experiment has."""
    parser = new_parser(description)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="arms at once, one thread each")
    parser.add_argument(
        "--questions", type=int, default=600, help="Platinum questions to ask, the first ones"
    )
    parser.add_argument(
        "--keep", type=Path, help="keep the results in this folder, and go on with what is there"
    )
    parser.add_argument(
        "--set", dest="changes", nargs="*", default=[], metavar="KEY=VALUE", help="of the profile"
    )
    return parser


def run_experiment(
    description: str | None, arms: Sequence[Arm], comparisons: Sequence[tuple[str, str]]
) -> None:
    """The whole command: run every arm of every seed and print levels and differences."""
    options = arms_parser(description).parse_args()
    folder = (options.keep or Path(tempfile.mkdtemp(prefix="arms-"))).resolve()
    results = run_arms(arms, options, folder)
    print_levels(results)
    print()
    print_differences(results, comparisons)
    if not options.keep:
        shutil.rmtree(folder)


def run_arms(arms: Sequence[Arm], options: argparse.Namespace, folder: Path) -> dict[str, dict[int, Any]]:
    """What every arm of every seed measured: name, seed, `pairs` and `measures`. What lies in `folder` is kept."""
    seeds = options.seeds
    changes = ["hardware.threads=1", *options.changes]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda seed: prepare(folder / f"seed-{seed}", seed, changes, options.questions), seeds))
        tasks = [(seed, arm) for seed in seeds for arm in arms]
        list(pool.map(lambda task: run_arm(folder / f"seed-{task[0]}", *task), tasks))
    names = [START, *(arm.name for arm in arms)]
    return {
        name: {seed: read_json(result(folder / f"seed-{seed}", name)) for seed in seeds} for name in names
    }


def prepare(place: Path, seed: int, changes: Sequence[str], questions: int) -> None:
    """Run one seed up to the scored trajectories, and measure its SFT policy."""
    target = result(place, START)
    if target.is_file():
        return
    shutil.rmtree(place, ignore_errors=True)
    copy_project(place)
    change(place / "params.yaml", [f"seed={seed}"])
    change(place / "profiles/tiny.yaml", changes)
    call(place, "dvc", "repro", "-q", "coherence@dpo")
    keep_first(place, questions)
    call(place, "python", "-m", "stages", "evaluate", "sft")
    write_json(target, {"pairs": 0, "measures": measure(place, "sft")})
    shown(seed, START, read_json(target))


def keep_first(place: Path, questions: int) -> None:
    """Ask the first Platinum questions only, and their twins."""
    rows = list(islice(read_jsonl(place / PLATINUM), questions))
    write_jsonl(place / PLATINUM, rows)
    known = {row["id"] for row in rows}
    write_jsonl(place / CHANGED, [twin for twin in read_jsonl(place / CHANGED) if twin["of"] in known])


def run_arm(place: Path, seed: int, arm: Arm) -> None:
    """Train and measure one arm in a copy of the seed's folder, so that several can run at once."""
    target = result(place, arm.name)
    if target.is_file():
        return
    copy = place.with_name(f"{place.name}-{target.stem}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy, ignore=shutil.ignore_patterns(".dvc", ".git", ".work", "arms"))
    pairs = arm.run(copy, seed)
    call(copy, "python", "-m", "stages", "evaluate", "dpo")
    write_json(target, {"pairs": pairs, "measures": measure(copy, "dpo")})
    shutil.rmtree(copy)
    shown(seed, arm.name, read_json(target))


def result(place: Path, name: str) -> Path:
    """Where the measures of an arm are kept."""
    return place / "arms" / f"{name.replace(' ', '-')}.json"


def shown(seed: int, name: str, found: dict[str, Any]) -> None:
    """Say what an arm reached."""
    levels = ", ".join(f"{measure} {level:.1f}" for measure, level in levels_of([found]).items())
    note(f"seed {seed}, {name}: {found['pairs']} pairs, {levels}")


def measure(place: Path, policy: str) -> Measures:
    """Each measure's value for every Platinum question, from the evaluated completions."""
    voter = Voter(load_params(place).regime_w)
    values: Measures = {name: [] for name in MEASURES}
    for row in read_jsonl(place / PLATINUM_EVAL / f"{policy}.jsonl"):
        samples = row["samples"]
        values["greedy"].append(float(row["correct"]))
        values["mean@8"].append(sum(one["correct"] for one in samples) / len(samples))
        weights = voter.weigh(row["question"], samples)[voter.rule]
        values["coherent@8"].append(elected(votes_of(samples), weights))
        if row["twins"]:
            twins = [one["correct"] for one in row["twins"]]
            values["both"].append(row["correct"] * sum(twins) / len(twins))
    return values


# ---- tables --------------------------------------------------------------------------------------------


def levels_of(found: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Each measure in percent, the mean over seeds."""
    found = list(found)
    return {
        name: 100 * float(np.mean([np.mean(one["measures"][name]) for one in found])) for name in MEASURES
    }


def print_levels(results: dict[str, dict[int, Any]]) -> None:
    """One line an arm: pairs and measures, with the standard deviation over seeds."""
    rows = []
    for name, seeds in results.items():
        each = [levels_of([one]) for one in seeds.values()]
        mean = levels_of(seeds.values())
        spread = {
            key: np.std([one[key] for one in each], ddof=1) if len(each) > 1 else 0.0 for key in MEASURES
        }
        pairs = np.mean([one["pairs"] for one in seeds.values()])
        rows.append([name, f"{pairs:,.0f}", *(f"{mean[key]:.1f} ± {spread[key]:.1f}" for key in MEASURES)])
    print_table(["arm", "pairs", *MEASURES], rows)


def print_differences(results: dict[str, dict[int, Any]], against: Sequence[tuple[str, str]]) -> None:
    """One line a comparison (arm, minus another): the mean over seeds in points, and what could have been seen."""
    rows = [
        [f"{arm} − {other}", *(over_seeds(results[arm], results[other], key) for key in MEASURES)]
        for arm, other in against
    ]
    print_table(["difference in points", *MEASURES], rows)


def over_seeds(a: dict[int, Any], b: dict[int, Any], key: str) -> str:
    """`+1.2 (-0.2 to +2.5; 1.9)`: a minus b, its 95 % interval, and the smallest difference seen with 80 % power.

    Student's t over seeds, which all have the same questions. With one seed: whole questions are resampled instead.
    The smallest visible difference is (t(0.975) + t(0.8)) standard errors.
    """
    values = [np.array(a[seed]["measures"][key]) - np.array(b[seed]["measures"][key]) for seed in a]
    means = [100 * float(one.mean()) for one in values]
    if len(means) == 1:
        low, high = bootstrap_interval(values[0], seed=0)
        return f"{means[0]:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    mean, error = float(np.mean(means)), float(np.std(means, ddof=1)) / math.sqrt(len(means))
    half, power = (float(student.ppf(level, len(means) - 1)) * error for level in (0.975, 0.8))
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f}; {half + power:.1f})"
