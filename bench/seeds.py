"""Does each phase help on the tiny profile, whatever the seed? Runs the whole pipeline once per seed.

    python bench/seeds.py                  # seeds 1 2 3: about 8 minutes each on two cores
    python bench/seeds.py --seeds 4 5 --set dpo.learning_rate=1e-4

Each run is a copy of the working tree with its own problems, base model and random numbers. Prints a
Markdown table, the one in docs/tiny.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
STEPS = (("base_to_sft", "base→SFT"), ("sft_to_dpo", "SFT→DPO"))


def main() -> None:
    """Run the pipeline for every seed asked for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--set", dest="changes", nargs="*", default=[], metavar="KEY=VALUE", help="profile values"
    )
    parser.add_argument("--keep", type=Path, help="keep the copies in this folder")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="seeds-"))
    lines = []
    for seed in options.seeds:
        comparison = run(seed, options.changes, folder / f"seed-{seed}")
        lines.append(row(seed, comparison))
        print(lines[-1], file=sys.stderr)
    print("| seed | base | SFT | DPO | " + " | ".join(f"{name}: greedy, mean@8" for _, name in STEPS) + " |")
    print("|---|---|---|---|---|---|")
    print("\n".join(lines))
    if not options.keep:
        shutil.rmtree(folder)


def run(seed: int, changes: list[str], place: Path) -> dict[str, Any]:
    """One pipeline run in a copy of the working tree; returns its metrics/comparison.json."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock" and not name.startswith("metrics/"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    change(place / "params.yaml", [f"seed={seed}"])
    change(place / "profiles/tiny.yaml", [f"model.seed={seed}", *changes])
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(tools / "dvc"), "repro", "-q"], cwd=place, check=True, env=environment)
    return json.loads((place / "metrics/comparison.json").read_text())  # type: ignore[no-any-return]


def change(path: Path, assignments: list[str]) -> None:
    """Set `a.b=value` keys of a YAML file; a key that is not there is an error."""
    yaml = YAML()
    tree = yaml.load(path.read_text())
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        if last not in node:
            raise SystemExit(f"{path}: there is no key {key}")
        node[last] = yaml.load(value)
    with path.open("w") as file:
        yaml.dump(tree, file)


def row(seed: int, comparison: dict[str, Any]) -> str:
    """One line of the table: greedy / mean@8 of the policies, then each step's differences with their p."""
    first, second = (comparison[name] for name, _ in STEPS)
    cells = [
        f"{part['accuracy_' + side]:.1%} / {part['mean_' + side]:.1%}"
        for part, side in ((first, "a"), (first, "b"), (second, "b"))
    ]
    for part in (first, second):
        greedy = f"{100 * part['difference']:+.1f} (p {part['p']:.1g})"
        cells.append(f"{greedy}, {100 * part['mean_difference']:+.1f} (p {part['mean_p']:.1g})")
    return f"| {seed} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
