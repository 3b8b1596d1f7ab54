"""Fill the tables of a page about a run, so that no figure there is typed by hand.

    python bench/real_run.py ../run page.md              # a clone in which `dvc repro` has ended, and the page
    python bench/real_run.py ../gsm8k page.md --run gsm8k  # another run on the same page

What stands between `<!-- NAME -->` and `<!-- end -->` is written anew, NAME being one of: `results`, `suspects` (what
the commands of these names print there), `sft` (the base model beside SFT, where `dvc repro evaluate@base evaluate@sft`
was the whole run), `rollouts` (from metrics/) and `stages` (seconds and memory). With --run the blocks are those called
`<!-- gsm8k NAME -->`, and the others stay. For the signals see signals.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from common import new_parser, note

from stages.run.files import atomic_write, read_json
from stages.stats.looks import kept_words

SFT_JUDGED = "metrics/kept/sft.json"


def main() -> None:
    """Rewrite the blocks of the page."""
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path, help="where the run is")
    parser.add_argument("page", type=Path)
    parser.add_argument("--run", default="", help="the word that the names of the run's blocks begin with")
    options = parser.parse_args()
    for needed in (options.page, options.folder / SFT_JUDGED):
        if not needed.is_file():
            raise SystemExit(
                f"{needed}: is missing; name a folder in which `dvc repro` has ended, and a page"
            )
    text = options.page.read_text(encoding="utf-8")

    def written(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise SystemExit(f"{options.page}: no block is called {name}; choose from {', '.join(BLOCKS)}")
        note(name)
        return f"<!-- {prefix}{name} -->\n{BLOCKS[name](options.folder)}\n<!-- end -->"

    prefix = f"{options.run} " if options.run else ""
    pattern = rf"<!-- {re.escape(prefix)}(?!end )(\w+) -->\n.*?<!-- end -->"
    text, found = re.subn(pattern, written, text, flags=re.DOTALL)
    if not found:
        raise SystemExit(
            f"{options.page}: no block begins with `<!-- {prefix}`; write one, with `<!-- end -->` under it"
        )
    with atomic_write(options.page) as file:
        file.write(text)


def printed(*command: str) -> Callable[[Path], str]:
    """A block with what `python -m stages COMMAND` prints in the folder of the run."""

    def block(folder: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "stages", *command],
            cwd=folder,
            env={**os.environ, "COLUMNS": "150"},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n")
        return f"```text\n{lines.split('Where to look next')[0].rstrip()}\n```"

    return block


def sft(folder: Path) -> str:
    """The step that SFT kept, and its greedy answers beside those of the base model."""
    answers = [f"data/platinum_eval/{policy}.jsonl" for policy in ("base", "sft")]
    head = f"```text\nSFT {kept_words(read_json(folder / SFT_JUDGED))}\n\n"
    return printed("compare", *answers)(folder).replace("```text\n", head, 1)


def rollouts(folder: Path) -> str:
    """Of each round: its trajectories, what became of them, and the step that DPO kept."""
    rows = []
    for name in rounds(folder):
        found = read_json(folder / f"metrics/regime_w/{name}.json")
        row = [name, f"{found['trajectories']:,}", percent(found["accuracy"])]
        row += [
            percent(found["questions_with_correct"]),
            *(f"{found['soundness'][kind]:,}" for kind in ("sound", "lucky", "unproven")),
        ]
        pairs = folder / f"metrics/preference/{name}.json"
        kinds = read_json(pairs) if pairs.is_file() else {}
        row += [f"{kinds[kind]['pairs']:,}" if kinds else "" for kind in ("correctness", "coherence")]
        kept = folder / f"metrics/kept/{name}.json"
        judged = read_json(kept) if kept.is_file() else {}
        row.append(f"{judged['kept']} of {judged['last']}" if judged else "")
        rows.append(row)
    head = [
        "round",
        "trajectories",
        "right, %",
        "questions with a right one, %",
        "sound",
        "lucky",
        "unproven",
    ]
    return table([*head, "correctness pairs", "coherence pairs", "step kept"], rows)


def stages(folder: Path) -> str:
    """The last run of each stage: seconds, and MiB of its largest process."""
    last = {
        (facts := read_json(path))["stage"]: facts for path in sorted((folder / ".work/runs").glob("*.json"))
    }
    rows = [
        [name, f"{facts['seconds']:,.0f}", f"{facts['peak_memory_mib']:,}"] for name, facts in last.items()
    ]
    total = sum(facts["seconds"] for facts in last.values())
    return table(["stage", "seconds", "memory, MiB"], [*rows, ["all", f"{total:,.0f}", ""]])


BLOCKS: dict[str, Callable[[Path], str]] = {
    "results": printed("results"),
    "sft": sft,
    "suspects": printed("suspects", "--limit", "10"),
    "rollouts": rollouts,
    "stages": stages,
}


def rounds(folder: Path) -> list[str]:
    """The rounds that have scored trajectories, in the order of their runs."""
    return sorted(
        (path.stem for path in (folder / "metrics/regime_w").glob("*.json")),
        key=lambda name: (name == "dpo", name),
    )


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main()
