"""How far do the tiny profile's figures vary with the seed, the threads and the processor's instructions?

    python bench/spread.py                                     # five whole runs, 2 to 4 minutes each on two cores
    python bench/spread.py --runs 17/2/avx2 4/1/default --set sft.learning_rate=5e-4

A run is SEED/THREADS/INSTRUCTIONS; the last is ATEN_CPU_CAPABILITY: default, avx2, or avx512, which is left out on a
processor that lacks it. With `default`, MKL too takes none but the oldest. Each is a copy of the working tree. Prints a
Markdown table (the one in docs/tiny.md) that ends with each column's standard deviation.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import call, change, copy_project, new_parser, note, print_table

RUNS = ("17/2/avx512", "17/2/avx2", "17/1/default", "1/1/avx2", "2/2/default")
STEPS = ("base_to_sft", "sft_to_dpo")


def main() -> None:
    """Do every run that is asked for and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), metavar="SEED/THREADS/INSTRUCTIONS")
    parser.add_argument(
        "--set", dest="changes", nargs="*", default=[], metavar="KEY=VALUE", help="of the profile"
    )
    parser.add_argument("--keep", type=Path, help="keep the copies in this folder")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="spread-"))
    rows, figures = [], []
    for name in options.runs:
        if name.endswith("/avx512") and torch.backends.cpu.get_cpu_capability() != "AVX512":
            note(f"{name}: this processor has no AVX-512")
            continue
        comparison = run(*name.split("/"), options.changes, folder / name.replace("/", "-"))
        figures.append(accuracies(comparison))
        rows.append(
            [*name.split("/"), *(f"{100 * value:.1f}" for value in figures[-1]), *verdicts(comparison)]
        )
        note(" | ".join(rows[-1]))
    if len(rows) > 1:
        spread = [f"{100 * statistics.stdev(column):.1f}" for column in zip(*figures, strict=True)]
        rows.append(["standard deviation", "", "", *spread, "", ""])
    policies = [f"{policy} {what}" for policy in ("base", "SFT", "DPO") for what in ("greedy", "mean@8")]
    print_table(["seed", "threads", "instructions", *policies, "base→SFT", "SFT→DPO"], rows)
    if not options.keep:
        shutil.rmtree(folder)


def run(seed: str, threads: str, instructions: str, changes: list[str], place: Path) -> dict[str, Any]:
    """One pipeline run in a copy of the working tree; returns its metrics/comparison.json."""
    copy_project(place)
    change(place / "params.yaml", [f"seed={seed}"])
    change(place / "profiles/tiny.yaml", [f"hardware.threads={threads}", *changes])
    os.environ["ATEN_CPU_CAPABILITY"] = instructions
    os.environ["MKL_CBWR"] = "COMPATIBLE" if instructions == "default" else "AUTO"
    call(place, "dvc", "repro", "-q")
    return json.loads((place / "metrics/comparison.json").read_text())


def accuracies(comparison: dict[str, Any]) -> list[float]:
    """Greedy accuracy and mean@8 of base, SFT and DPO, in this order."""
    first, second = (comparison[name] for name in STEPS)
    sides = ((first, "a"), (first, "b"), (second, "b"))
    return [part[f"{what}_{side}"] for part, side in sides for what in ("accuracy", "mean")]


def verdicts(comparison: dict[str, Any]) -> list[str]:
    """What each step changed: the difference in points and the p-value, greedy and mean@8."""
    cells = []
    for part in (comparison[name] for name in STEPS):
        greedy = f"{100 * part['difference']:+.1f} (p {part['p']:.1g})"
        cells.append(f"{greedy}, {100 * part['mean_difference']:+.1f} (p {part['mean_p']:.1g})")
    return cells


if __name__ == "__main__":
    main()
