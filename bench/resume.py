"""How long a resumed rollout takes from the model being loaded to its first new request.

    python bench/resume.py                        # 1,000, 10,000 and 100,000 records done
    python bench/resume.py --records 1000000

Needs `checkpoints/base` and `data/gsm8k/train.jsonl` of a run (`dvc repro base prepare`). A journal of so many
finished trajectories is written to a temporary folder; then, in a process of its own for each size, the
journal is opened, every request is built (prompts filled in and tokenized) and handed to the engine, whose
first request that is not done ends the clock. No model is loaded: what it computes is no part of this.
`processor` is the same in processor time, which a busy machine does not change.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages.core.launch import prepare_process  # noqa: E402
from stages.core.records import Journal, read_jsonl  # noqa: E402

TRAIN = ROOT / "data/gsm8k/train.jsonl"
TEXT = "She has <<3*4=12>>12 apples in her bags.\n" * 5 + "#### 12"  # as long as a usual solution


def main() -> None:
    """Measure every size in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.records[0])))
        return
    table = Table(
        "records done", "journal", "opened", "first request", "processor", "memory", box=None, pad_edge=False
    )
    for column in table.columns:
        column.justify = "right"
    for count in arguments.records:
        with tempfile.TemporaryDirectory() as folder:
            size = write(Path(folder) / "journal.jsonl", count)
            command = [sys.executable, __file__, "--records", str(count), "--measure", folder]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        table.add_row(
            f"{count:,}",
            f"{size / 2**20:,.1f} MiB",
            f"{found['opened']:.2f} s",
            f"{found['first']:.2f} s",
            f"{found['processor']:.2f} s",
            f"{found['memory'] / 1024:+,.0f} MiB",
        )
    Console().print(table)


def problems(trajectories: int) -> list[dict[str, Any]]:
    """Enough problems, eight trajectories each, for one request more than `trajectories`."""
    known = list(read_jsonl(TRAIN, {"id": str, "question": str}))
    count = trajectories // 8 + 1
    return [
        {**one, "id": f"{one['id']}-{n}"}
        for n, one in enumerate(itertools.islice(itertools.cycle(known), count))
    ]


def write(path: Path, count: int) -> int:
    """A journal of `count` finished trajectories; returns its size in bytes."""
    with Journal(path) as journal:
        ids = (f"{problem['id']}/{pull}" for problem in problems(count) for pull in range(8))
        for identity in itertools.islice(ids, count):
            record = {"id": identity, "text": TEXT, "tokens": 93, "finish": "stop", "logprob": -12.345678901}
            journal.add(record)
    return path.stat().st_size


def measure(folder: Path, count: int) -> dict[str, float]:
    """Seconds until the journal is open and until the first new request, processor time, and the memory taken (KiB)."""
    prepare_process()
    os.chdir(ROOT)
    from transformers import AutoTokenizer

    from stages.core.generation import complete
    from stages.core.params import Sections, load_params
    from stages.core.paths import BASE
    from stages.engine.base import Completion, Request
    from stages.engine.transformers_engine import TransformersEngine
    from stages.rollout import build_request

    class Reached(Exception):
        """The first batch with something to do."""

    class Planner(TransformersEngine):
        def __init__(self) -> None:
            self.model, self.batch = (
                SimpleNamespace(training=False, eval=lambda: None, train=lambda _: None),
                512,
            )

        def _complete(self, batch: Sequence[Request]) -> Iterator[Completion]:
            raise Reached

    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    params = Sections(load_params(), ("rollout", "prompt", "seed"))
    run: Any = SimpleNamespace(params=params)
    arms = list(params.rollout.arms.values())
    asked = problems(count)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    worked = time.process_time()
    with Journal(folder / "journal.jsonl") as journal:
        opened = time.perf_counter() - started
        requests = []
        for problem in asked:
            prompts: dict[tuple[str, str | None], tuple[int, ...]] = {}
            requests += [
                build_request(run, tokenizer, problem, pull, arms[pull % len(arms)], prompts)
                for pull in range(8)
            ]
        try:
            complete(Planner(), tokenizer, requests, journal, lambda *_: None)
        except Reached:
            first, processor = time.perf_counter() - started, time.process_time() - worked
    assert len(journal.records) == count
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"opened": opened, "first": first, "processor": processor, "memory": memory}


if __name__ == "__main__":
    main()
