"""How fast answers are read, and how fast and in how much memory `grade` and `compare` work on one log.

    python bench/grading.py LOG.jsonl [one]

LOG has the fields `question`, `gold` and `completion`. `one`: on one core. Every figure is of this machine.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def reading(path: Path) -> None:
    """Completions a second of `read_answer` and `same_answer` alone, on one core; the best of five."""
    sys.path.insert(0, str(REPO))
    from stages.core.answers import gold_answer, read_answer, same_answer

    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 20_000)]
    texts = [(row["completion"], row["question"], gold_answer(str(row["gold"]))) for row in rows]
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for completion, question, gold in texts:
            same_answer(read_answer(completion, question).answer, gold)
        best = min(best, time.perf_counter() - started)
    print(f"reading and comparing answers: {len(texts) / best:,.0f} completions a second on one core")


def tool(name: str, *arguments: str, cores: set[int], rows: int) -> None:
    """Wall time and peak memory of one command, that of its largest process."""
    before = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "stages", name, *arguments, "--json"],
        cwd=REPO, check=True, stdout=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{name}: {rows:,} rows in {seconds:.1f} s, {rows / seconds:,.0f} a second, at most {peak:,.0f} MiB so far"
    )


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    cores = set(list(os.sched_getaffinity(0))[: 1 if "one" in sys.argv else None])
    with path.open("rb") as file:
        rows = sum(1 for _ in file)
    print(f"{path.name}: {rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB; {len(cores)} cores")
    reading(path)
    with tempfile.TemporaryDirectory() as folder:
        graded = str(Path(folder) / "graded.jsonl")
        tool("grade", str(path), cores=cores, rows=rows)
        tool("grade", str(path), "--out", graded, cores=cores, rows=rows)
        tool("compare", graded, graded, cores=cores, rows=rows)


if __name__ == "__main__":
    main()
