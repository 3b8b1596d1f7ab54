"""Does each phase help on the tiny profile, whatever the seed? Runs the whole pipeline once per seed.

    python bench/seeds.py                  # seeds 1 2 3: about 8 minutes each on two cores
    python bench/seeds.py --seeds 4 5 --set dpo.learning_rate=1e-4

Each run is a copy of the working tree with its own problems, base model and random numbers. Prints a
Markdown table, the one in docs/tiny.md.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import call, change, copy_project, new_parser, note, print_table

STEPS = (("base_to_sft", "base→SFT"), ("sft_to_dpo", "SFT→DPO"))


def main() -> None:
    """Run the pipeline for every seed asked for and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--set", dest="changes", nargs="*", default=[], metavar="KEY=VALUE", help="of the profile"
    )
    parser.add_argument("--keep", type=Path, help="keep the copies in this folder")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="seeds-"))
    rows = []
    for seed in options.seeds:
        rows.append(row(seed, run(seed, options.changes, folder / f"seed-{seed}")))
        note(" | ".join(rows[-1]))
    print_table(["seed", "base", "SFT", "DPO", *(f"{name}: greedy, mean@8" for _, name in STEPS)], rows)
    if not options.keep:
        shutil.rmtree(folder)


def run(seed: int, changes: list[str], place: Path) -> dict[str, Any]:
    """One pipeline run in a copy of the working tree; returns its metrics/comparison.json."""
    copy_project(place)
    change(place / "params.yaml", [f"seed={seed}"])
    change(place / "profiles/tiny.yaml", [f"model.seed={seed}", *changes])
    call(place, "dvc", "repro", "-q")
    return json.loads((place / "metrics/comparison.json").read_text())


def row(seed: int, comparison: dict[str, Any]) -> list[str]:
    """One row of the table: greedy / mean@8 of the policies, then each step's differences with their p."""
    first, second = (comparison[name] for name, _ in STEPS)
    cells = [
        f"{part['accuracy_' + side]:.1%} / {part['mean_' + side]:.1%}"
        for part, side in ((first, "a"), (first, "b"), (second, "b"))
    ]
    for part in (first, second):
        greedy = f"{100 * part['difference']:+.1f} (p {part['p']:.1g})"
        cells.append(f"{greedy}, {100 * part['mean_difference']:+.1f} (p {part['mean_p']:.1g})")
    return [str(seed), *cells]


if __name__ == "__main__":
    main()
