"""Rollouts at a size no test would draw: memory, journal and resume, with an engine that answers at once.

    python bench/large.py                          # 10,000, 100,000 and 1,000,000 questions, eight trajectories each

Needs `checkpoints/base` and `data/gsm8k/train.jsonl` of a run. For each size, in a process of its own, the real
rollout stage runs in a temporary project on that many copies of the training questions; the engine is a
stand-in that gives every request a fixed text of usual length at once, so everything but the model is measured:
reading, prompts, requests, journal, parts, output. It is then killed after nine tenths of the questions in a
second run, and started again: `restart` is the time from the start of that process to its first new request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from workplace import ROOT, change

sys.path.insert(0, str(ROOT))
STOP, FIRST = "LARGE_STOP_AFTER", "LARGE_FIRST_REQUEST"


class Stand:
    """An engine that gives every request one text, and notes when it was first asked for something new."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self.given = 0

    def generate(self, requests: Iterable[Any], done: frozenset[str] = frozenset()) -> Iterator[Any]:
        """See `Engine.generate`."""
        from stages.engine.base import Completion

        for request in requests:
            if request.id in done:
                continue
            if not self.given:
                Path(os.environ[FIRST]).write_text(str(time.time()))
            self.given += 1
            if self.given == int(os.environ[STOP]):
                os.kill(os.getpid(), 9)
            yield Completion(request.id, self.tokens, "stop", -3.5)


def run_stage() -> None:
    """The rollout stage in this process with the stand-in; prints its peak memory."""
    from stages import rollout
    from stages.core.launch import prepare_process
    from stages.core.policy import load_tokenizer

    prepare_process()
    text = "She has <<3*4=12>>12 apples in her bags.\n" * 5 + "#### 12"
    engine = Stand(tuple(load_tokenizer().encode(text, add_special_tokens=False)))
    rollout.open_engine = lambda *_: contextlib.nullcontext(engine)  # type: ignore[assignment]
    rollout.main()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def start(place: Path, stop: int) -> tuple[float, float, int | None]:
    """Run the stage in `place`: seconds, seconds to the first new request, peak MiB (None when it was killed)."""
    first = place / "first"
    environment = {**os.environ, STOP: str(stop), FIRST: str(first)}
    began = time.time()
    done = subprocess.run(
        [sys.executable, __file__, "--stage"], cwd=place, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode not in (0, -9):
        raise SystemExit(f"the stage ended with status {done.returncode}")
    memory = int(done.stdout.split()[-1]) if not done.returncode else None
    return time.time() - began, float(first.read_text()) - began, memory


def measure(questions: int, folder: Path) -> list[str]:
    """One row of the table."""
    place = folder / str(questions)
    (place / "data/gsm8k").mkdir(parents=True)
    for name in ("params.yaml", "profiles"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    (place / "checkpoints").symlink_to(ROOT / "checkpoints")
    change(place / "profiles/tiny.yaml", ["rollout.questions=null"])
    rows = [json.loads(line) for line in (ROOT / "data/gsm8k/train.jsonl").read_text().splitlines()]
    with (place / "data/gsm8k/train.jsonl").open("w") as out:
        for number in range(questions):
            out.write(json.dumps({**rows[number % len(rows)], "id": f"train-{number:07d}"}) + "\n")
    seconds, _, memory = start(place, stop=0)
    output = place / "data/rollouts.jsonl"
    size = output.stat().st_size
    whole = output.read_bytes() if questions <= 10_000 else b""
    output.unlink()
    start(place, stop=questions * 8 * 9 // 10)
    _, restart, _ = start(place, stop=0)
    if whole and output.read_bytes() != whole:
        raise SystemExit("a resumed run gave other bytes")
    shutil.rmtree(place)
    rate = questions * 8 / seconds
    return [
        f"{questions:,}",
        f"{seconds:,.0f} s",
        f"{rate:,.0f}",
        f"{memory} MiB",
        f"{size / 2**20:,.0f} MiB",
        f"{restart:.1f} s",
    ]


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--stage", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        return run_stage()
    print("| questions | whole run | trajectories/s | peak memory | output | restart after nine tenths |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="large-") as folder:
        for questions in options.questions:
            print("| " + " | ".join(measure(questions, Path(folder))) + " |", flush=True)
    return None


if __name__ == "__main__":
    main()
