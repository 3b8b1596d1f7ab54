"""Greedy evaluation on Platinum: ours against lm-evaluation-harness, on one model, in one run.

    python3 -m venv bench/.venv && bench/.venv/bin/pip install -r bench/requirements.txt
    python bench/lm_eval.py --batch-sizes 1 64 256     # after `dvc repro`

Ours is `python -m stages evaluate POLICY` with `evaluate.samples: 0`. The harness is `lm_eval run --model hf`
with the adapter by `peft=` and a task file written here: the same questions, prompt, token limit and end token,
with the filters and the metric of its own gsm8k task. Both have the profile's threads; the harness keeps torch's
choice of instruction set, ours takes AVX2 (stages/core/launch.py).

Every round runs all of them, one after the other, so that a busy moment of the machine hits no one alone; of each
figure the least of all rounds counts. "whole command" begins with starting Python, "generating" is what each
reports of itself, "processor" is what all threads of the whole command used: when others work on the machine, only
that can be trusted, and only with `--threads 1`, since two threads burn time waiting for each other.

Verdicts that differ are listed with the reason, then comes a Markdown table. Exit status 1: the whole command of
ours is less than twice as fast as the harness at the best of its batch sizes, or a prompt differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from common import ROOT, machine, make_workplace, note, print_table
from seeds import change

sys.path.insert(0, str(ROOT))
from stages.core.answers import parse_number
from stages.core.launch import OFFLINE
from stages.core.params import Params, load_params
from stages.core.prompts import prompt_ids, prompt_text
from stages.core.records import read_jsonl

HARNESS = ROOT / "bench/.venv/bin/lm_eval"
WANTED = 2.0  # times as fast as the harness, whole command against whole command
ADAPTERS = {"base": None, "sft": "checkpoints/sft_lora", "dpo": "checkpoints/dpo_coherence_lora"}
# From lm_eval/tasks/gsm8k/gsm8k.yaml, version 3.0.
GRADING = {
    "metric_list": [
        {
            "metric": "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
            "ignore_case": True,
            "ignore_punctuation": False,
            "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
        }
    ],
    "filter_list": [
        {
            "name": "strict-match",
            "filter": [
                {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"},
                {"function": "take_first"},
            ],
        },
        {
            "name": "flexible-extract",
            "filter": [
                {
                    "function": "regex",
                    "group_select": -1,
                    "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)",
                },
                {"function": "take_first"},
            ],
        },
    ],
}
FILTERS = {"strict-match": ("correct", "answer"), "flexible-extract": ("flexible_correct", "flexible_answer")}
LAST_BAR = re.compile(r"Running generate_until requests: 100%[^\r\n]*\[[^\]]*?([0-9.]+)(it/s|s/it)\]")


@dataclass(frozen=True)
class Timed:
    """One run: what it wrote, and seconds of the whole command, of generating, and of processor time."""

    whole: float
    generating: float
    processor: float
    rows: list[dict[str, Any]]


def main() -> int:
    """Run both, compare them, print the table; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", choices=ADAPTERS, default="sft")
    parser.add_argument("--questions", type=int, help="only the first N")
    parser.add_argument(
        "--batch-sizes", nargs="+", default=["1", "64"], help="of the harness, `auto` too; its default is 1"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of both (default: the profile's)")
    parser.add_argument("--harness", type=Path, default=HARNESS, help="its `lm_eval` command")
    options = parser.parse_args()
    if min(options.rounds, 1 if options.questions is None else options.questions) < 1:
        parser.error("--rounds and --questions must be at least 1")
    platinum = ROOT / "data/gsm8k/platinum.jsonl"
    for needed, remedy in (
        (platinum, "run `dvc repro` first"),
        (options.harness, "see the top of this file"),
    ):
        if not needed.is_file():
            raise SystemExit(f"{needed}: is missing; {remedy}")

    with tempfile.TemporaryDirectory(prefix="lm-eval-") as scratch:
        place = make_workplace(Path(scratch) / "project")
        threads = [f"hardware.threads={options.threads}"] if options.threads else []
        change(place / f"profiles/{load_params(place).profile}.yaml", ["evaluate.samples=0", *threads])
        (place / "checkpoints").symlink_to(ROOT / "checkpoints")
        (place / "data/gsm8k").mkdir(parents=True)
        lines = platinum.read_text(encoding="utf-8").splitlines(keepends=True)[: options.questions]
        (place / "data/gsm8k/platinum.jsonl").write_text("".join(lines), encoding="utf-8")
        params = load_params(place)
        write_task(place, params)

        names = ["ours", *options.batch_sizes]
        runs: dict[str, list[Timed]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name in names:
                if name == "ours":
                    run = run_ours(place, options.policy, params)
                else:
                    run = run_harness(place, options.policy, params, options.harness, name)
                runs[name].append(run)
                note(
                    f"round {number + 1}, {name}: {run.whole:.1f} s, generating {run.generating:.1f} s, "
                    f"processor {run.processor:.1f} s; load of the machine {os.getloadavg()[0]:.1f}"
                )
        return report(runs, params, options.harness)


def write_task(place: Path, params: Params) -> None:
    """The harness's task file, platinum.yaml: our questions, our prompt, our limit, our end token."""
    from transformers import AutoTokenizer

    if params.prompt.chat:
        raise SystemExit(f"profile {params.profile}: has chat prompts; this bench compares plain ones")
    tokenizer = AutoTokenizer.from_pretrained(place / "checkpoints/base", local_files_only=True)
    task = {
        "task": "platinum",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "data/gsm8k/platinum.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": (tokenizer.bos_token or "") + prompt_text(params.prompt, "{{question}}"),
        "doc_to_target": "{{gold}}",
        "generation_kwargs": {
            "until": [tokenizer.eos_token],
            "do_sample": False,
            "max_gen_toks": params.evaluate.max_new_tokens,
        },
        **GRADING,
        "metadata": {"version": 1.0},
    }
    (place / "platinum.yaml").write_text(json.dumps(task, indent=2), encoding="utf-8")  # JSON is YAML


def run_ours(place: Path, policy: str, params: Params) -> Timed:
    """`python -m stages evaluate`, from an empty journal."""
    whole, processor, _ = clock([sys.executable, "-m", "stages", "evaluate", policy], place, params)
    notes = sorted((place / ".work/runs").glob("*.json"))[-1]
    rows = list(read_jsonl(place / f"data/platinum_eval/{policy}.jsonl"))
    return Timed(whole, json.loads(notes.read_text())["seconds_of"]["generating"], processor, rows)


def run_harness(place: Path, policy: str, params: Params, command: Path, batch_size: str) -> Timed:
    """`lm_eval run` with one batch size; its rows are in our order, one for each question and filter."""
    model = "pretrained=checkpoints/base"
    if ADAPTERS[policy]:
        model += f",peft={ADAPTERS[policy]}"
    with tempfile.TemporaryDirectory(dir=place) as out:
        whole, processor, errors = clock(
            [
                *(str(command.absolute()), "run", "--model", "hf", "--model_args", model, "--device", "cpu"),
                *("--tasks", "platinum.yaml", "--batch_size", batch_size),
                *("--output_path", out, "--log_samples"),
            ],
            place,
            params,
        )
        [samples] = Path(out).rglob("samples_platinum_*.jsonl")
        rows = sorted(read_jsonl(samples), key=lambda row: row["doc_id"])
    bar = LAST_BAR.findall(errors)
    if not bar:
        raise SystemExit(f"{command}: printed no progress bar to read its time from:\n{errors[-2000:]}")
    rate, unit = bar[-1]
    questions = len(rows) / len(FILTERS)
    generating = questions / float(rate) if unit == "it/s" else questions * float(rate)
    return Timed(whole, generating, processor, rows)


def clock(command: Sequence[str], place: Path, params: Params) -> tuple[float, float, str]:
    """Run a command in `place` without network: its seconds, its processor seconds, its stderr."""
    environment = {
        **os.environ,
        **dict.fromkeys(OFFLINE, "1"),
        "HF_HOME": str(place / "hf"),
        "OMP_NUM_THREADS": str(params.hardware.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: failed\n{done.stderr[-2000:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, processor, done.stderr


def report(runs: dict[str, list[Timed]], params: Params, harness: Path) -> int:
    """Print verdicts that differ and the table; 1 when ours is too slow or a prompt differs."""
    least = {
        name: {
            part: min(getattr(run, part) for run in timed) for part in ("whole", "generating", "processor")
        }
        for name, timed in runs.items()
    }
    ours, table, prompts_differ = runs["ours"][0].rows, [], False
    for name, timed in runs.items():
        if any(text_of(run.rows) != text_of(timed[0].rows) for run in timed):
            print(f"{name}: not every round gave the same completions; the first one's are compared")
        times = [
            f"{seconds:.1f} s" + (f" ({seconds / least['ours'][part]:.1f}x)" if name != "ours" else "")
            for part, seconds in least[name].items()
        ]
        if name == "ours":
            table.append(
                ["ours", *times, *(share(row[key] for row in ours) for key, _ in FILTERS.values()), "", ""]
            )
            continue
        by_filter = {key: [row for row in timed[0].rows if row["filter"] == key] for key in FILTERS}
        rows = by_filter["strict-match"]
        prompts_differ |= not same_prompts(rows, ours, params)
        same = sum(text(row) == own["completion"] for row, own in zip(rows, ours, strict=True))
        differing = [found for key in FILTERS for found in differences(key, ours, by_filter[key])]
        print(f"lm-eval, batch {name}: {len(differing)} verdicts of {len(FILTERS) * len(rows):,} differ")
        for reason, count in Counter(reason for reason, _ in differing).most_common():
            print(f"  {count} x {reason}")
        for reason, line in differing:
            print(f"  {line}: {reason}")
        accuracy = [share(row["exact_match"] for row in by_filter[key]) for key in FILTERS]
        table.append(
            [f"lm-eval, batch {name}", *times, *accuracy, f"{same:,} of {len(rows):,}", str(len(differing))]
        )
    ratio = min(of["whole"] for name, of in least.items() if name != "ours") / least["ours"]["whole"]
    cores = params.hardware.threads or os.cpu_count() or 1
    print(f"\nWhole command, against the harness's best batch size: {ratio:.1f}x (wanted: {WANTED:g}x)")
    print(f"{len(ours):,} questions, profile {params.profile}, {machine(cores)}, {versions(harness)}")
    print(f"Least of {len(runs['ours'])} round(s); in brackets: how many times as fast ours is\n")
    head = "|whole command|generating|processor|strict|flexible|same completions|verdicts that differ"
    print_table(head.split("|"), table)
    return int(ratio < WANTED or prompts_differ)


def same_prompts(theirs: list[dict[str, Any]], ours: list[dict[str, Any]], params: Params) -> bool:
    """Whether both fed the same token ids; says where they did not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "checkpoints/base", local_files_only=True)
    differing = [
        own["id"]
        for row, own in zip(theirs, ours, strict=True)
        if tokenizer(row["arguments"]["gen_args_0"]["arg_0"], add_special_tokens=False)["input_ids"]
        != prompt_ids(tokenizer, params.prompt, own["question"])
    ]
    if differing:
        print(f"WARNING: {len(differing)} prompts differ, {differing[0]} the first")
    return not differing


def differences(key: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Reason and description of each question on which one filter's verdict is not ours."""
    correct, answer = FILTERS[key]
    found = []
    for own, row in zip(ours, theirs, strict=True):
        if own[correct] == bool(row["exact_match"]):
            continue
        extracted = row["filtered_resps"][0]
        if text(row) != own["completion"]:
            cut = own["completion"].startswith(text(row))
            reason = "the harness cut the completion" if cut else "another completion"
        elif extracted == "[invalid]":
            reason = "its filter finds no answer"
        elif own[answer] is None:
            reason = "only its filter finds an answer"
        elif parse_number(extracted) == Fraction(own[answer]):
            reason = "the same number, written in another way"
        else:
            reason = "another number was taken"
        verdicts = (
            f"ours {own[answer]} ({word(own[correct])}), harness {extracted} ({word(row['exact_match'])})"
        )
        found.append((reason, f"{own['id']}, {key}: gold {own['gold']}, {verdicts}"))
    return found


def text_of(rows: list[dict[str, Any]]) -> list[str]:
    """The completions in rows of ours or the harness's."""
    return [row["completion"] if "completion" in row else text(row) for row in rows]


def text(row: dict[str, Any]) -> str:
    """The completion in one of the harness's rows."""
    completion: str = row["resps"][0][0]
    return completion


def word(correct: object) -> str:
    """A verdict."""
    return "right" if correct else "wrong"


def share(verdicts: Any) -> str:
    """Mean of verdicts in percent."""
    values = list(verdicts)
    return f"{sum(values) / len(values):.1%}"


def versions(harness: Path) -> str:
    """What the two environments hold, for the line above the table."""
    script = (
        "from importlib.metadata import version as v\n"
        "print(*(f'{name} {v(name)}' for name in {names}), sep=', ')"
    )
    asked = (
        (harness.absolute().with_name("python"), ("lm_eval", "transformers", "torch")),
        (Path(sys.executable), ("transformers", "torch")),
    )
    theirs, ours = (
        subprocess.run(
            [str(python), "-c", script.replace("{names}", repr(names))],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
        for python, names in asked
    )  # fmt: skip
    return f"{theirs} (ours: {ours})"


if __name__ == "__main__":
    sys.exit(main())
