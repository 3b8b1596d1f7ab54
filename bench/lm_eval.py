"""Greedy evaluation on Platinum: ours against lm-evaluation-harness and plain `generate`, on one model, in one run.

    python3 -m venv bench/.venv && bench/.venv/bin/pip install -r bench/requirements.txt
    python bench/lm_eval.py --batch-sizes 1 64 256     # after `dvc repro`

Ours is `python -m stages evaluate` with `evaluate.samples: 0`, for the SFT policy or the one that --policy names. The
harness is `lm_eval run --model hf` with the adapter by `peft=` and its own gsm8k task, in which the questions, the
prompt, the token limit and the end token are replaced by ours; filters and metric stay. Plain `generate` is
bench/plain.py, graded by ours. All have as many threads as the profile has threads and processes together, and compute
in 32 bits on a processor that has no bf16 instructions.

Every round runs all of them, one after the other, so that a busy moment of the machine does not hit one alone. The
least of all rounds counts. "whole command" begins with starting Python, "generating" is what each reports of itself,
"processor" is what all threads of the whole command used. While others work on the machine, trust only the processor
time, and only with `--threads 1`: two threads burn time waiting for each other.

Prints the verdicts that differ, each with the reason, and a Markdown table last.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from common import ROOT, change, machine, make_workplace, new_parser, note, print_table, versions
from ruamel.yaml import YAML

from stages.run.files import read_json, read_jsonl, write_json
from stages.run.params import Params, load_params
from stages.run.paths import BASE, CHANGED, PLATINUM, PLATINUM_EVAL, TESTS, WORK
from stages.run.process import OFFLINE, computes_bf16
from stages.run.rounds import adapter_of
from stages.text.number import stated
from stages.text.prompts import filled_template, prompt_ids, prompt_messages, prompt_text

HARNESS = ROOT / "bench/.venv/bin/lm_eval"
GSM8K = "lib/python*/site-packages/lm_eval/tasks/gsm8k/gsm8k.yaml"  # in the harness's environment
FILTERS = {"strict-match": ("correct", "answer"), "flexible-extract": ("flexible_correct", "flexible_answer")}
LAST_BAR = re.compile(r"Running generate_until requests: 100%[^\r\n]*\[[^\]]*?([0-9.]+)(it/s|s/it)\]")
PLAIN = "plain generate"
Row = dict[str, Any]


@dataclass(frozen=True)
class Timed:
    """One run: what it wrote, and seconds of the whole command, of generating, and of processor time."""

    whole: float
    generating: float
    processor: float
    rows: list[Row]


def main() -> None:
    """Run both, compare them, print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--questions", type=int, help="only the first N")
    parser.add_argument(
        "--batch-sizes", nargs="+", default=["1", "64"], help="of the harness, `auto` too; its default is 1"
    )
    parser.add_argument("--generate", help="also plain `generate`, with so many questions in a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", default="sft", help="which one to evaluate, `base` too")
    parser.add_argument("--threads", type=int, help="of both (default: the profile's)")
    parser.add_argument("--harness", type=Path, default=HARNESS, help="its `lm_eval` command")
    options = parser.parse_args()
    for needed, remedy in (
        (ROOT / PLATINUM, "run `dvc repro` first"),
        (options.harness, "see the top of this file"),
    ):
        if not needed.is_file():
            raise SystemExit(f"{needed}: is missing; {remedy}")
    harness = options.harness.absolute()
    with tempfile.TemporaryDirectory(prefix="lm-eval-") as scratch:
        place = make_workplace(Path(scratch) / "project")
        threads = [f"hardware.threads={options.threads}"] if options.threads else []
        change(place / f"profiles/{load_params(place).profile}.yaml", ["evaluate.samples=0", *threads])
        (place / "checkpoints").symlink_to(ROOT / "checkpoints")
        (place / PLATINUM).parent.mkdir(parents=True)
        lines = (ROOT / PLATINUM).read_text(encoding="utf-8").splitlines(keepends=True)[: options.questions]
        (place / PLATINUM).write_text("".join(lines), encoding="utf-8")
        (place / CHANGED).touch()
        (place / TESTS).touch()
        params = load_params(place)
        write_task(place, params, harness)
        plain = [PLAIN] if options.generate else []
        runs: dict[str, list[Timed]] = {name: [] for name in ("ours", *plain, *options.batch_sizes)}
        for number in range(options.rounds):
            for name, timed in runs.items():
                if name == "ours":
                    run = run_ours(place, params, options.policy)
                elif name == PLAIN:
                    run = run_plain(place, params, options.policy, options.generate)
                else:
                    run = run_harness(place, params, options.policy, harness, name)
                timed.append(run)
                note(
                    f"round {number + 1}, {name}: {run.whole:.1f} s, generating {run.generating:.1f} s, "
                    f"processor {run.processor:.1f} s; load of the machine {os.getloadavg()[0]:.1f}"
                )
    report(runs, params, harness)


def write_task(place: Path, params: Params, harness: Path) -> None:
    """platinum.yaml: the harness's gsm8k task with our questions, prompt, limit and end token."""
    from transformers import AutoTokenizer

    [published] = harness.parents[1].glob(GSM8K)
    task = YAML(typ="safe").load(published)
    for name in ("tag", "dataset_name", "training_split", "fewshot_split"):
        task.pop(name)
    tokenizer = AutoTokenizer.from_pretrained(place / BASE, local_files_only=True)
    if params.prompt.chat:
        prompt = filled_template(tokenizer, prompt_messages(params.prompt, "{{question}}"))
    else:
        prompt = (tokenizer.bos_token or "") + prompt_text(params.prompt, "{{question}}")
    task |= {
        "task": "platinum",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / PLATINUM)}},
        "num_fewshot": 0,
        "doc_to_text": prompt,
        "doc_to_target": "{{gold}}",
        "generation_kwargs": {
            "until": [tokenizer.eos_token],
            "do_sample": False,
            "max_gen_toks": params.evaluate.max_new_tokens,
        },
    }
    write_json(place / "platinum.yaml", task)  # JSON is YAML


def run_ours(place: Path, params: Params, policy: str) -> Timed:
    """`python -m stages evaluate`, from an empty journal."""
    whole, processor, _ = clock([sys.executable, "-m", "stages", "evaluate", policy], place, params)
    facts = read_json(sorted((place / WORK / "runs").glob("*.json"))[-1])
    rows = list(read_jsonl(place / PLATINUM_EVAL / f"{policy}.jsonl"))
    return Timed(whole, facts["seconds_of"]["generating"], processor, rows)


def run_plain(place: Path, params: Params, policy: str, size: str) -> Timed:
    """bench/plain.py, in fixed batches."""
    command = [sys.executable, str(ROOT / "bench/plain.py"), policy, size, "plain.jsonl"]
    whole, processor, printed = clock(command, place, params)
    return Timed(whole, float(printed.split()[-1]), processor, list(read_jsonl(place / "plain.jsonl")))


def run_harness(place: Path, params: Params, policy: str, harness: Path, batch_size: str) -> Timed:
    """`lm_eval run` with one batch size; its rows are in our order, one for each question and filter."""
    model = f"pretrained={BASE},dtype={'auto' if computes_bf16() else 'float32'}"
    if adapter := adapter_of(policy):
        model += f",peft={adapter}"
    with tempfile.TemporaryDirectory(dir=place) as out:
        command = [
            *(str(harness), "run", "--model", "hf", "--model_args", model, "--device", "cpu"),
            *("--tasks", "platinum.yaml", "--batch_size", batch_size, "--output_path", out, "--log_samples"),
        ]
        whole, processor, errors = clock(command, place, params)
        [samples] = Path(out).rglob("samples_platinum_*.jsonl")
        rows = sorted(read_jsonl(samples), key=lambda row: row["doc_id"])
    bar = LAST_BAR.findall(errors)
    if not bar:
        raise SystemExit(f"{harness}: printed no progress bar to read its time from:\n{errors[-2000:]}")
    rate, unit = bar[-1]
    questions = len(rows) / len(FILTERS)
    generating = questions / float(rate) if unit == "it/s" else questions * float(rate)
    return Timed(whole, generating, processor, rows)


def clock(command: Sequence[str], place: Path, params: Params) -> tuple[float, float, str]:
    """Run a command in `place` without network: its seconds, its processor seconds, what it printed."""
    environment = {
        **os.environ,
        **dict.fromkeys(OFFLINE, "1"),
        "HF_HOME": str(place / "hf"),
        "OMP_NUM_THREADS": str(cores(params)),
        "TOKENIZERS_PARALLELISM": "false",
    }
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: failed\n{done.stderr[-2000:]}")
    return (
        seconds,
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        done.stderr + done.stdout,
    )


def cores(params: Params) -> int:
    """The cores that ours keeps busy; its own processes set their own threads."""
    hardware = params.hardware
    processes = hardware.processes if isinstance(hardware.processes, int) else 1
    return processes * (hardware.threads or os.cpu_count() or 1)


def report(runs: dict[str, list[Timed]], params: Params, harness: Path) -> None:
    """Print verdicts that differ and the table."""
    parts = ("whole", "generating", "processor")
    least = {name: [min(getattr(run, part) for run in runs[name]) for part in parts] for name in runs}
    ours, table = runs["ours"][0].rows, []
    for name, timed in runs.items():
        rows = timed[0].rows
        if any(list(map(text, run.rows)) != list(map(text, rows)) for run in timed):
            print(f"{name}: not every round gave the same completions; the first one's are compared")
        if name == "ours":
            times = [f"{seconds:.1f} s" for seconds in least[name]]
            accuracy = [share(row[key] for row in ours) for key, _ in FILTERS.values()]
            table.append(["ours", *times, *accuracy, "", ""])
            continue
        times = [f"{a:.1f} s ({a / b:.1f}x)" for a, b in zip(least[name], least["ours"], strict=True)]
        if name == PLAIN:
            accuracy = [share(row[key] for row in rows) for key, _ in FILTERS.values()]
            pairs = list(zip(rows, ours, strict=True))
            differing = sum(row[key] != own[key] for row, own in pairs for key, _ in FILTERS.values())
            table.append([name, *times, *accuracy, alike(rows, ours), str(differing)])
            continue
        by_filter = {key: [row for row in rows if row["filter"] == key] for key in FILTERS}
        check_prompts(by_filter["strict-match"], ours, params)
        same = alike(by_filter["strict-match"], ours)
        differing = [found for key in FILTERS for found in differences(key, ours, by_filter[key])]
        print(f"lm-eval, batch {name}: {len(differing)} verdicts of {len(rows):,} differ")
        for reason, count in Counter(reason for reason, _ in differing).most_common():
            print(f"  {count} x {reason}")
        for reason, line in differing:
            print(f"  {line}: {reason}")
        accuracy = [share(row["exact_match"] for row in by_filter[key]) for key in FILTERS]
        table.append([f"lm-eval, batch {name}", *times, *accuracy, same, str(len(differing))])
    print(f"\n{len(ours):,} questions, profile {params.profile}, {machine(cores(params))}")
    script = "from importlib.metadata import version as v; print(v('lm_eval'), v('transformers'), v('torch'))"
    theirs = subprocess.run(
        [harness.with_name("python"), "-c", script], check=True, capture_output=True, text=True
    )
    print(f"lm_eval, transformers, torch {theirs.stdout.strip()} (ours: {versions('transformers', 'torch')})")
    print(f"Least of {len(runs['ours'])} round(s); in brackets: how many times as fast ours is\n")
    head = "|whole command|generating|processor|strict|flexible|same completions|verdicts that differ"
    print_table(head.split("|"), table)


def check_prompts(theirs: list[Row], ours: list[Row], params: Params) -> None:
    """Stop when the two were not asked with the same token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / BASE, local_files_only=True)
    for row, own in zip(theirs, ours, strict=True):
        prompt = tokenizer(row["arguments"]["gen_args_0"]["arg_0"], add_special_tokens=False)["input_ids"]
        if prompt != prompt_ids(tokenizer, params.prompt, own["question"]):
            raise SystemExit(f"{own['id']}: the prompts differ, so the answers cannot be compared")


def differences(key: str, ours: list[Row], theirs: list[Row]) -> list[tuple[str, str]]:
    """Reason and description of each question on which one filter's verdict is not ours."""
    correct, answer = FILTERS[key]
    word = {True: "right", False: "wrong"}
    found = []
    for own, row in zip(ours, theirs, strict=True):
        verdict = bool(row["exact_match"])
        if own[correct] == verdict:
            continue
        extracted = row["filtered_resps"][0]
        if text(row) != text(own):
            cut = text(own).startswith(text(row))
            reason = "the harness cut the completion" if cut else "another completion"
        elif extracted == "[invalid]":
            reason = "its filter finds no answer"
        elif own[answer] is None:
            reason = "only its filter finds an answer"
        elif stated(extracted) == Fraction(own[answer]):
            reason = "the same number, written in another way"
        else:
            reason = "another number was taken"
        verdicts = f"ours {own[answer]} ({word[own[correct]]}), harness {extracted} ({word[verdict]})"
        found.append((reason, f"{own['id']}, {key}: gold {own['gold']}, {verdicts}"))
    return found


def text(row: Row) -> str:
    """The completion in a row of ours or of the harness's."""
    completion: str = row["completion"] if "completion" in row else row["resps"][0][0]
    return completion


def alike(theirs: list[Row], ours: list[Row]) -> str:
    """On how many questions the completions are the same."""
    count = sum(text(row) == text(own) for row, own in zip(theirs, ours, strict=True))
    return f"{count:,} of {len(ours):,}"


def share(verdicts: Iterable[float]) -> str:
    """Mean of verdicts in percent."""
    values = list(verdicts)
    return f"{sum(values) / len(values):.1%}"


if __name__ == "__main__":
    main()
