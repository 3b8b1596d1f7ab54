"""Is an answer read right, and how fast? Ours against Math-Verify and the lm-evaluation-harness's two filters.

    python3 -m venv bench/.venv && bench/.venv/bin/pip install -r bench/requirements.txt
    bench/.venv/bin/python bench/answers.py --source example_model_solutions.jsonl     # about a minute

One question is put to every reader: does this completion state this gold answer? Texts:

- real: 4 x 1,319 solutions of OpenAI's models with the published `is_correct`, as published (`A: N`) and with
  GSM8K's own ending (`#### N`) instead, which the harness's strict filter looks for; left out without --source
- statements, numbers, no number, prompts, thoughts: the tables of tests/text/test_{answers,number,span}.py. They were
  written for our reader, and its tests demand all of them: they show what others do there, not who is better. Of those
  with no single number, the first number is asked for, which is wrong.

The harness is its published gsm8k task, version 3.0: stop words, filters, and exact_match after removing
commas, dollar signs and a last full stop (EleutherAI/lm-evaluation-harness, lm_eval/tasks/gsm8k/gsm8k.yaml and
lm_eval/filters/extraction.py). Math-Verify is used as its README says: verify(parse(gold), parse(completion)).
Golds are prepared beforehand. Speed is processor time on one core on the real texts, else on the cases.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from common import MODELS, ROOT, example_solutions, machine, new_parser, note, print_table, versions

from stages.text.answers import gold_answer, read_answer, same_answer

INSTALL = "python3 -m venv bench/.venv && bench/.venv/bin/pip install -r bench/requirements.txt"

# gsm8k.yaml, version 3.0
UNTIL = ("Question:", "</s>", "<|im_end|>")
STRICT_MATCH = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE_EXTRACT = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
DIGITS = re.compile("[0-9]+")
IGNORED = [re.compile(pattern) for pattern in (",", r"\$", "(?s).*#### ", r"\.$")]


@dataclass(frozen=True)
class Case:
    """A completion, the gold answer, the question where it is known, and whether the two agree."""

    completion: str
    gold: str
    question: str | None
    right: bool


@dataclass(frozen=True)
class Reader:
    """A way to judge: `prepare` turns a gold into what `verdict(completion, gold, question)` takes."""

    name: str
    prepare: Callable[[str], Any]
    verdict: Callable[[str, Any, str | None], bool]


def main() -> None:
    """Put all cases to all readers and print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--source", type=Path, help="example_model_solutions.jsonl of grade-school-math")
    options = parser.parse_args()
    families = test_cases()
    timed = [case for cases in families.values() for case in cases]
    if options.source:
        families = {**real_cases(options.source), **families}
        timed = next(iter(families.values()))
    else:
        note("without --source the real solutions are left out")
    measured = []
    for reader in readers():
        note(f"{reader.name} ...")
        speed = best_speed(reader, timed)
        measured.append((reader.name, speed, [judge(reader, cases) for cases in families.values()]))
    ours = measured[0][1]
    print(f"One core of {machine(1).partition(', ')[2]}\n")
    titles = [f"{name} ({len(cases):,})" for name, cases in families.items()]
    print_table(
        ["reader", "completions/s", "ours is", *titles],
        [[name, f"{speed:,.0f}", f"{ours / speed:.2g} ×", *cells] for name, speed, cells in measured],
    )


# ---- readers -------------------------------------------------------------------------------------------


def readers() -> Iterator[Reader]:
    """Ours, the harness's two filters, and Math-Verify where it is installed."""
    yield Reader(
        "stages/text/answers.py",
        gold_answer,
        lambda completion, gold, question: same_answer(read_answer(completion, question).answer, gold),
    )
    yield Reader("harness, strict-match", cleaned, lambda text, gold, _: strict_match(text) == gold)
    yield Reader("harness, flexible-extract", cleaned, lambda text, gold, _: flexible_extract(text) == gold)
    if importlib.util.find_spec("math_verify") is None:
        note(f"Math-Verify is left out, since it is not installed here: {INSTALL}")
        return
    from math_verify import parse, verify

    yield Reader(
        versions("math-verify"),
        parse,
        lambda completion, gold, _: bool(verify(gold, parse(completion))),
    )


def strict_match(text: str) -> str:
    """The first match, as `take_first` has it."""
    found = STRICT_MATCH.search(until(text))
    return cleaned(found[1].strip()) if found else "[invalid]"


def flexible_extract(text: str) -> str:
    """The last match: `group_select: -1`."""
    found = FLEXIBLE_EXTRACT.findall(until(text))
    return cleaned(next(part for part in found[-1] if part).strip()) if found else "[invalid]"


def until(text: str) -> str:
    """What the harness keeps of a generation."""
    for word in UNTIL:
        text = text.split(word)[0]
    return text


def cleaned(text: str) -> str:
    """What exact_match compares."""
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


# ---- cases ---------------------------------------------------------------------------------------------


def real_cases(source: Path) -> dict[str, list[Case]]:
    """The published solutions with their verdicts, in both endings."""
    published, marked = [], []
    for row in example_solutions(source):
        gold = row["ground_truth"].rsplit("A:", 1)[1].strip()
        for model in MODELS:
            steps, _, last = row[model]["solution"].rpartition("A:")
            right = row[model]["is_correct"]
            published.append(Case(row[model]["solution"], gold, row["question"], right))
            marked.append(Case(f"{steps}####{last}", gold, row["question"], right))
    return {"real, `A: N`": published, "real, `#### N`": marked}


def test_cases() -> dict[str, list[Case]]:
    """The cases with an answer from the tests' own tables."""
    number, span, answers = (load_tests(name) for name in ("number", "span", "answers"))
    written = [case for cases in number.NUMBERS.values() for case in cases]
    several = [text for texts in number.UNREADABLE.values() for text in texts]
    stated = [(text, strict) for cases in answers.STATEMENTS.values() for text, strict, _ in cases if strict]
    return {
        "statements": [Case(text, gold, None, True) for text, gold in stated],
        "numbers": [Case(f"#### {text}", gold, None, True) for text, gold in written],
        "no number": [
            Case(f"#### {text}", first[0], None, False) for text in several if (first := DIGITS.findall(text))
        ],
        "prompts": [
            *(Case(text, "18", span.QUESTION, True) for text in span.WITH_THE_QUESTION.values()),
            *(Case(text, "18", None, True) for text in span.WITHOUT.values()),
        ],
        "thoughts": [Case(text, "18", None, True) for text in span.THOUGHTS.values()],
    }


def load_tests(name: str) -> ModuleType:
    """The module tests/text/test_NAME.py."""
    path = ROOT / "tests" / "text" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise SystemExit(f"{path}: needs {error.name}, which is not installed here: {INSTALL}") from None
    return module


# ---- measuring -----------------------------------------------------------------------------------------


def best_speed(reader: Reader, cases: Sequence[Case]) -> float:
    """Completions judged per second of processor time, in the fastest of three passes."""
    prepared = [(case.completion, reader.prepare(case.gold), case.question) for case in cases]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for completion, gold, question in prepared:
            reader.verdict(completion, gold, question)
        seconds.append(time.process_time() - start)
    return len(cases) / min(seconds)


def judge(reader: Reader, cases: Sequence[Case]) -> str:
    """A cell: how many verdicts are right; in brackets how many of the others are too lenient / too strict."""
    lenient = strict = 0
    for case in cases:
        said = reader.verdict(case.completion, reader.prepare(case.gold), case.question)
        lenient += said and not case.right
        strict += case.right and not said
    right = f"{len(cases) - lenient - strict:,}"
    return right if not lenient + strict else f"{right} ({lenient:,}/{strict:,})"


if __name__ == "__main__":
    main()
