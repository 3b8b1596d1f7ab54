"""How fast answers are read, and how fast and in how much memory `grade` and `compare` work on one log.

    python bench/grading.py LOG.jsonl

LOG has the fields `id`, `question`, `gold` and `completion`. All of it runs on one core of this machine.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from common import ROOT, new_parser, print_table

from stages.run.files import read_jsonl
from stages.text.answers import gold_answer, read_answer, same_answer


def reading(path: Path) -> float:
    """Completions a second of `read_answer` and `same_answer` alone; the best of five."""
    rows = islice(read_jsonl(path), 20_000)
    texts = [(row["completion"], row["question"], gold_answer(str(row["gold"]))) for row in rows]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        for completion, question, gold in texts:
            same_answer(read_answer(completion, question).answer, gold)
        seconds.append(time.perf_counter() - started)
    return len(texts) / min(seconds)


def tool(name: str, *arguments: str, rows: int) -> list[str]:
    """Wall time and peak memory of one command. The peak is that of the largest command so far."""
    before = time.perf_counter()
    command = [sys.executable, "-m", "stages", name, *arguments, "--json"]
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit(f"{name}: failed; its own message is above")
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return [f"{seconds:.1f} s", f"{rows / seconds:,.0f}", f"{peak:,.0f} MiB"]


def main() -> None:
    """Read, grade, grade into a file, compare; print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("log", type=Path, metavar="LOG.jsonl")
    path = parser.parse_args().log.resolve()
    with path.open("rb") as file:
        rows = sum(1 for _ in file)
    print(f"{path.name}: {rows:,} lines, {path.stat().st_size / 1e6:,.0f} MB")
    print(f"reading and comparing answers: {reading(path):,.0f} completions a second\n")
    with tempfile.TemporaryDirectory() as folder:
        graded = str(Path(folder) / "graded.jsonl")
        table = [
            ["grade", *tool("grade", str(path), rows=rows)],
            ["grade --out", *tool("grade", str(path), "--out", graded, rows=rows)],
            ["compare", *tool("compare", graded, graded, rows=rows)],
        ]
    print_table(["command", "time", "lines a second", "peak memory so far"], table)


if __name__ == "__main__":
    main()
