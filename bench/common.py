"""What the benches share: folders to run stages in, input data, plain `model.generate`, and Markdown tables.

Importing this module also makes `stages` importable.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    from stages.policy.request import Request

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose `--help` begins with the description of a bench, as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


# ---- folders to run stages in --------------------------------------------------------------------------


def make_workplace(folder: Path) -> Path:
    """Fill `folder` with what `python -m stages` needs to run there with the repository's parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / "params.yaml", folder)
    shutil.copytree(ROOT / "profiles", folder / "profiles", dirs_exist_ok=True)
    (folder / "stages").symlink_to(ROOT / "stages")
    return folder


def copy_project(place: Path) -> None:
    """Copy what git tracks or would track to `place`, without results, as a repository of its own."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock" and not name.startswith("metrics/"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)


def change(path: Path, assignments: Iterable[str]) -> None:
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


def call(place: Path, *command: str) -> None:
    """Run a command of this environment (`dvc`, `python`) in `place`; its failure ends the bench."""
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(tools / command[0]), *command[1:]], cwd=place, check=True, env=environment)


# ---- input data ----------------------------------------------------------------------------------------


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


# ---- plain model.generate ------------------------------------------------------------------------------


def plain_batches(requests: Iterable[Request], size: int) -> list[list[Request]]:
    """The requests in their own order, up to `size` at once; those of a batch share temperature and top_p."""
    alike: dict[tuple[float, float], list[Request]] = {}
    for request in requests:
        alike.setdefault((request.temperature, request.top_p), []).append(request)
    return [group[at : at + size] for group in alike.values() for at in range(0, len(group), size)]


def generate_plainly(
    model: Any, batch: Sequence[Request], pad: int, ends: Sequence[int]
) -> list[tuple[int, ...]]:
    """The new tokens of each request by one call of `model.generate`, as most people write it.

    Prompts are padded on the left, and the batch goes on until its longest answer is done. Without `ends`, nothing
    but the limit stops an answer.
    """
    import torch

    width = max(len(one.prompt) for one in batch)
    ids = torch.tensor([[pad] * (width - len(one.prompt)) + list(one.prompt) for one in batch])
    mask = torch.tensor([[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for one in batch])
    drawn = {"do_sample": True, "temperature": batch[0].temperature, "top_p": batch[0].top_p, "top_k": 0}
    model.generation_config.eos_token_id = list(ends) or None
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(one.max_new_tokens for one in batch),
            pad_token_id=pad,
            **(drawn if batch[0].temperature else {"do_sample": False}),
        )
    rows = output[:, width:].tolist()
    lengths = [next((at for at, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [tuple(row[:length]) for row, length in zip(rows, lengths, strict=True)]


# ---- what is printed -----------------------------------------------------------------------------------


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
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


def versions(*packages: str) -> str:
    """The versions of those packages that are installed."""
    found = []
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)
