"""What the benches share: a folder to run stages in, the data they run on, and Markdown tables."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def make_workplace(folder: Path) -> Path:
    """Fill `folder` with what `python -m stages` needs to run there with the repository's parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / "params.yaml", folder)
    shutil.copytree(ROOT / "profiles", folder / "profiles", dirs_exist_ok=True)
    (folder / "stages").symlink_to(ROOT / "stages")
    return folder


def example_solutions(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of OpenAI's `example_model_solutions.jsonl`: question, ground_truth, and a dict per model.

    Raises SystemExit with the line when a row is something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = all(isinstance(row[model]["solution"], str) for model in MODELS)
            whole = whole and isinstance(row["question"], str) and "A:" in row["ground_truth"]
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise SystemExit(
                f"{path}:{number}: is not a row of example_model_solutions.jsonl (openai/grade-school-math)"
            )
        yield row


def groups_of_four(path: Path) -> Iterator[dict[str, Any]]:
    """Each row as a record of `rollouts.jsonl`: four trajectories, one per model, `arm` is the model's name.

    The gold is what the ground truth's last line `A: N` says; the ground truth is the worked `solution`.
    """
    for number, row in enumerate(example_solutions(path)):
        yield {
            "id": f"example-{number:04}",
            "question": row["question"],
            "gold": row["ground_truth"].rsplit("A:", 1)[1].strip(),
            "solution": row["ground_truth"],
            "trajectories": [{"arm": model, "text": row[model]["solution"]} for model in MODELS],
        }


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def note(text: str) -> None:
    """Say on stderr how far a bench is, so that stdout holds the table only."""
    print(text, file=sys.stderr, flush=True)


def machine(cores: int) -> str:
    """What a table was measured on, for the line above it."""
    return f"{cores} core{'s' * (cores != 1)}, {platform.machine()}, Python {platform.python_version()}"
