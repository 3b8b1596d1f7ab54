"""What do two pipelines at once cost on one machine, and what does it cost one alone that idle threads sleep?

    python bench/together.py               # about 13 minutes on two cores
    python bench/together.py --stages prepare base sft

Each line of the table is one or two whole runs of the tiny profile, each in a copy of the working tree: one alone, two
at once, and one alone whose idle threads spin (OMP_WAIT_POLICY=ACTIVE), as they would without this project's setting.
The second table is time and memory of each stage of the run alone.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import call, copy_project, machine, new_parser, note, print_table


def main() -> None:
    """Time the three cases and print both tables."""
    parser = new_parser(__doc__)
    parser.add_argument("--stages", nargs="*", default=[], help="only these stages, and what they need")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="together-") as name:
        folder = Path(name)
        alone = repro([folder / "alone"], options.stages)
        both = repro([folder / "one", folder / "other"], options.stages)
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
        spinning = repro([folder / "spinning"], options.stages)
        facts = [
            json.loads(path.read_text()) for path in sorted((folder / "alone/.work/runs").glob("*.json"))
        ]
    print(machine(os.cpu_count() or 1))
    cases = (("one alone", alone), ("two at once", both), ("one alone, idle threads spin", spinning))
    rows = [[case, f"{seconds:.0f}", f"{seconds / alone:.2f}"] for case, seconds in cases]
    print_table(["runs", "seconds", "times one alone"], rows)
    stages = [[one["stage"], f"{one['seconds']:.1f}", str(one["peak_memory_mib"])] for one in facts]
    print_table(["stage", "seconds", "peak memory, MiB"], stages)


def repro(places: list[Path], stages: list[str]) -> float:
    """Seconds until `dvc repro` is done in all places, started at the same time."""
    for place in places:
        copy_project(place)
    started = time.monotonic()
    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(lambda place: call(place, "dvc", "repro", "-q", *stages), places))
    seconds = time.monotonic() - started
    note(f"{len(places)} at once: {seconds:.0f} s")
    return seconds


if __name__ == "__main__":
    main()
