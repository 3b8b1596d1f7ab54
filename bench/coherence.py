"""How fast is the `coherence` stage, and how much memory does it take, from 10,000 to a million trajectories?

    python bench/coherence.py                                  # about 7 minutes and 2 GB of disk on two cores
    python bench/coherence.py --sizes 10000                    # five seconds

Each line of the table is one real `python -m stages coherence --rollouts ... --out ...` in a folder of its own, on
groups of eight. The texts are two stories of the tiny generator, told and solved step by step (about 430 characters);
no two of them are equal. The last line is what one would write instead: ten lines of Python that take the last number
of each text by a regular expression and count who agrees (s_end alone, nothing else). Linux only: it reads /proc.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, make_workplace, new_parser, note, print_table

from stages.run.files import write_jsonl
from stages.tiny.problems import Problem, Style, draw, mistaken

GROUP = 8
OPENINGS = (
    "Let us work this out step by step.",
    "We go through the story in order.",
    "First we write down what is given.",
    "Here is how the numbers change.",
    "We take one event after the other.",
    "Let us count carefully, one by one.",
    "To answer this we follow both stories.",
    "We need both amounts and then the sum.",
)
BY_HAND = """
import json, re, sys
from collections import Counter
number = re.compile(r"-?[0-9][0-9.,]*")
with open(sys.argv[1]) as rollouts, open(sys.argv[2], "w") as out:
    for line in rollouts:
        record = json.loads(line)
        for one in record["trajectories"]:
            found = number.findall(one["text"])
            one["answer"] = found[-1].rstrip(".,").replace(",", "") if found else None
        votes = Counter(one["answer"] for one in record["trajectories"])
        for one in record["trajectories"]:
            one["s_end"] = (votes[one["answer"]] - 1) / (len(record["trajectories"]) - 1)
        out.write(json.dumps(record, ensure_ascii=False) + "\\n")
"""


def main() -> None:
    """Make the inputs, run the stage on each, print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise SystemExit("bench/coherence.py reads memory from /proc, which only Linux has")
    usable = os.sched_getaffinity(0)
    one = {min(usable)}
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-coherence-") as folder:
        place = make_workplace(Path(folder) / "run")
        rollouts, out = Path(folder) / "rollouts.jsonl", Path(folder) / "scored.jsonl"
        command = [
            sys.executable,
            "-m",
            "stages",
            "coherence",
            "--rollouts",
            str(rollouts),
            "--out",
            str(out),
        ]
        for size in options.sizes:
            questions = write_jsonl(rollouts, told_groups(max(1, size // GROUP)))
            note(f"{questions * GROUP:,} trajectories, {rollouts.stat().st_size:,} bytes")
            for cores in [one, usable] if len(usable) > 1 else [one]:
                run = measure(command, place, cores)
                check_output(place, out, questions)
                rows.append(row(f"`coherence`, {len(cores)} core{'s' * (len(cores) > 1)}", questions, run))
            by_hand = [sys.executable, "-c", BY_HAND, str(rollouts), str(out)]
            rows.append(row("last number by hand, 1 core", questions, measure(by_hand, place, one)))
    print(f"{machine(len(usable))}, groups of {GROUP}\n")
    head = "run|trajectories|trajectories/s|µs each|CPU µs each|main process|largest worker|together"
    print_table(head.split("|"), rows)


# ---- inputs --------------------------------------------------------------------------------------------


def told_groups(questions: int) -> Iterator[dict[str, Any]]:
    """Records of rollouts: a question of two stories each, with eight different tellings, some of them mistaken."""
    rng, logprobs, seen = random.Random(17), random.Random(29), set()
    while len(seen) < questions:
        pair = (draw(rng), draw(rng))
        key = (pair[0].question, pair[1].question)
        if key in seen:
            continue
        seen.add(key)
        name, trajectories = f"bench-{len(seen):06}", []
        for index, opening in enumerate(OPENINGS):
            style: Style = "plain" if index < 6 else "changes"
            parts = [mistaken(one, style, rng, 0.3, 0.3, 0.05) for one in pair]
            text = f"{opening}\n{told(pair, parts)}"
            logprob = (
                -len(text) * logprobs.betavariate(2, 6) / 2
            )  # spread as a policy's are, hardly two alike
            trajectory = {
                "id": f"{name}/{index}",
                "arm": f"arm{index}",
                "text": text,
                "tokens": len(text) // 4,
            }
            trajectories.append({**trajectory, "logprob": logprob, "finish": "stop", "seed": index})
        solution = told(pair, [one.solution("steps") for one in pair])
        yield {
            "id": name,
            "question": " ".join(story(one) for one in pair) + " What do both results add up to?",
            "gold": solution.rsplit("#### ", 1)[1],
            "solution": solution,
            "trajectories": trajectories,
        }


def story(problem: Problem) -> str:
    """A problem without what it asks."""
    return problem.question.rsplit(". ", 1)[0] + "."


def told(pair: tuple[Problem, Problem], solutions: list[str]) -> str:
    """Both stories retold and solved, and their results added."""
    lines, results = [], []
    for problem, solution in zip(pair, solutions, strict=True):
        steps, result = solution.rsplit("\n#### ", 1)
        lines.append(f"The story says: {story(problem)}\n{steps}")
        results.append(int(result))
    total = sum(results)
    lines.append(f"Both results add up to <<{results[0]}+{results[1]}={total}>>{total}.\n#### {total}")
    return "\n".join(lines)


# ---- running -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One process with its children: seconds on the clock and of processor time, peak memory in MiB."""

    seconds: float
    cpu: float
    main: float
    worker: float
    together: float


def measure(command: list[str], place: Path, cores: set[int]) -> Run:
    """Run `command` in `place` on `cores` and watch its memory every 50 ms; stops when it fails."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=place,
        env=environment,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    main = worker = together = 0.0
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        sizes = memory(process.pid)
        main = max(main, sizes.get(process.pid, (0, 0))[0])
        worker = max([worker, *(peak for pid, (peak, _) in sizes.items() if pid != process.pid)])
        together = max(together, sum(now for _, now in sizes.values()))
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    said = process.stderr.read().decode().strip()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} ended with {process.returncode}: {said}")
    note(f"  {seconds:.1f} s on {len(cores)} core(s)  {said}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, main, worker, together)


def memory(pid: int) -> dict[int, tuple[float, float]]:
    """Peak and present resident memory in MiB of a process and all its descendants."""
    sizes: dict[int, tuple[float, float]] = {}
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        try:
            status = Path(f"/proc/{one}/status").read_text()
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        found = dict(re.findall(r"^(VmHWM|VmRSS):\s+([0-9]+) kB", status, re.MULTILINE))
        if found:  # a process that has just ended has none
            sizes[one] = (int(found["VmHWM"]) / 1024, int(found["VmRSS"]) / 1024)
    return sizes


def check_output(place: Path, out: Path, questions: int) -> None:
    """Stop when the stage did not score every trajectory it was given."""
    summary = json.loads((place / "metrics/regime_w/dpo.json").read_text())
    with out.open("rb") as file:
        lines = sum(1 for _ in file)
    if (summary["questions"], summary["trajectories"], lines) != (questions, questions * GROUP, questions):
        raise SystemExit(f"{out}: {lines:,} lines, where {questions:,} are wanted")


def row(name: str, questions: int, run: Run) -> list[str]:
    """One line of the table."""
    size = questions * GROUP
    return [
        name,
        f"{size:,}",
        f"{size / run.seconds:,.0f}",
        f"{1e6 * run.seconds / size:.0f}",
        f"{1e6 * run.cpu / size:.0f}",
        f"{run.main:.0f} MiB",
        f"{run.worker:.0f} MiB" if run.worker else "–",
        f"{run.together:.0f} MiB",
    ]


if __name__ == "__main__":
    main()
