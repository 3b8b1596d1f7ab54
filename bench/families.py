"""Which families of models go through the stages?

    python bench/families.py                       # all eight, 4 minutes on two cores
    python bench/families.py --families gpt2 phi3  # two of them

Makes a small random model of each family, with a config, a tokenizer and special tokens of its kind, and takes it
through `prepare`, `check`, `base`, `sft`, `rollout`, `evaluate` and `export` by real commands. Prints the seconds of
each, or "fails" (the line that says why goes to stderr). The last columns: of five greedy completions, how many are
those of `model.generate`; and which pad token was taken. Random models answer nothing right; that it runs is shown.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine, new_parser, note, print_table

from tests.families import FAMILIES, commands, differing, make_place


def main() -> None:
    """Run the bench."""
    parser = new_parser(__doc__)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in parser.parse_args().families:
            rows.append([name, *run_family(name, Path(folder))])
    print(f"{machine(os.cpu_count() or 1)}\n")
    print_table(["family", *commands(ROOT), "as `generate`", "pad token"], rows)


def run_family(name: str, folder: Path) -> list[str]:
    """The seconds of each command, how many completions are as `generate`'s, and the pad token."""
    place = folder / name
    place.mkdir()
    make_place(name, place)
    cells, pad = [], "–"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for stage, words in commands(folder / f"{name}-export").items():
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "stages", *words],
            cwd=place, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        cells.append(f"{time.monotonic() - started:.0f} s" if not done.returncode else "fails")
        note(
            f"{name}: {stage} {cells[-1]} {done.stderr.strip().splitlines()[-1:] if done.returncode else ''}"
        )
        if stage == "base" and (said := re.search(r"pad token: (\S+), ([^(\n]+)", done.stderr)):
            pad = f"`{said[1]}`: {said[2].strip()}".replace("|", "\\|")
    made = place / "checkpoints/base"
    same = f"{5 - differing(made)} of 5" if made.is_dir() else "–"
    return [*cells, same, pad]


if __name__ == "__main__":
    main()
