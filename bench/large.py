"""Rollouts at a size no test would draw: memory, journal and resume, with an engine that answers at once.

    python bench/large.py                          # 10,000, 100,000 and 1,000,000 questions, eight trajectories each
    python bench/large.py --questions 1000         # a quarter of a minute

Needs `checkpoints/` and `data/gsm8k/train.jsonl` of a finished run of the tiny profile. For each size, in a process of
its own, the real rollout stage runs in a temporary project on that many copies of the training questions. A stand-in
for the engine gives every request the same text of usual length at once, so everything but the model is measured:
reading, prompts, requests, journal, parts, output. A second run is killed after nine tenths of the questions and
started again: `restart` is the time from the start of that process to its first new request.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from common import ROOT, change, make_workplace, new_parser, note, print_table

from stages.policy.request import Completion, Request
from stages.run.files import read_jsonl, sha256_file, write_jsonl
from stages.run.paths import LAST, TRAIN

STOP, FIRST = "LARGE_STOP_AFTER", "LARGE_FIRST_REQUEST"
TEXT = "She has <<3*4=12>>12 apples in her bags.\n" * 5 + "#### 12"  # as long as a usual solution


class StandIn:
    """An engine that gives every request one text, and notes when it was first asked for something new."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens
        self.given = 0

    def generate(
        self, requests: Iterable[Request], done: frozenset[str] = frozenset()
    ) -> Iterator[Completion]:
        """See `Engine.generate`."""
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
    from stages.policy.adapter import load_tokenizer
    from stages.run.process import prepare_process

    prepare_process()
    engine = StandIn(tuple(load_tokenizer().encode(TEXT, add_special_tokens=False)))
    rollout.open_engine = lambda *_: contextlib.nullcontext(engine)  # type: ignore[assignment]
    rollout.main(LAST.round)
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


def measure(questions: int, place: Path) -> list[str]:
    """One row of the table."""
    make_workplace(place)
    change(place / "profiles/tiny.yaml", ["rollout.questions=null"])
    (place / "checkpoints").symlink_to(ROOT / "checkpoints")
    rows, output = list(read_jsonl(ROOT / TRAIN)), place / LAST.rollouts
    write_jsonl(
        place / TRAIN,
        ({**rows[number % len(rows)], "id": f"train-{number:07d}"} for number in range(questions)),
    )
    seconds, _, memory = start(place, stop=0)
    size, whole = output.stat().st_size, sha256_file(output)
    output.unlink()
    start(place, stop=questions * 8 * 9 // 10)
    _, restart, _ = start(place, stop=0)
    if sha256_file(output) != whole:
        raise SystemExit("a resumed run gave other bytes")
    shutil.rmtree(place)
    rate = f"{questions * 8 / seconds:,.0f}"
    return [
        f"{questions:,}",
        f"{seconds:,.0f} s",
        rate,
        f"{memory} MiB",
        f"{size / 2**20:,.0f} MiB",
        f"{restart:.1f} s",
    ]


def main() -> None:
    """Measure every size and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--questions", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--stage", action="store_true", help="(internal: be the process that is measured)")
    options = parser.parse_args()
    if options.stage:
        run_stage()
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="large-") as folder:
        for questions in options.questions:
            rows.append(measure(questions, Path(folder) / str(questions)))
            note(" | ".join(rows[-1]))
    head = "questions|whole run|trajectories/s|peak memory|output|restart after nine tenths"
    print_table(head.split("|"), rows)


if __name__ == "__main__":
    main()
