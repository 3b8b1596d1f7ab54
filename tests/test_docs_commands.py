"""Every command in README.md, SECURITY.md and docs/ is run by a test, or a sign beside it says what it needs.

A command is a line of a fenced block tagged `sh`, a `$` line of one tagged `console`, or inline code that begins with
a known program. To pass, it must

- match a row of COVERED, whose test exists and names what the row says; or
- have `# needs ...` (a GPU, a network, a remote, Ray) at its end or as the first line of its block; or
- match UNTRIED, if it is inline.

Other blocks are tagged too: text, yaml, python, mermaid.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = sorted([REPO / "README.md", REPO / "SECURITY.md", *(REPO / "docs").rglob("*.md")])
TAGS = {"sh", "console", "text", "yaml", "json", "python", "mermaid"}
NEEDS = r"#.*\bneeds (a GPU|a network|a remote|Ray|root)( and (a GPU|a network|a remote))?"
PROGRAMS = ("python", "pip", "dvc", "git", "make", "ray", "source .", "scripts/", ".venv/bin/")

RUN = "tests/pipeline/test_documented_commands.py::test_it_runs_as_written"
PIPELINE = "tests/pipeline/test_pipeline.py::"
RERUN = "tests/pipeline/test_rerun_rules.py::"
HOST = "tests/scripts/test_host.py::"
OUTLIVES = HOST + "test_a_run_outlives_the_connection_it_was_started_from"
COMPARED = PIPELINE + "test_sft_and_dpo_are_compared_by_dvcs_own_command"
SWEEP = "tests/pipeline/test_experiments.py::test_a_queue_of_four_from_start_to_table"
STORED = "tests/pipeline/test_remotes.py::"
MAKE = "tests/test_docs_commands.py::test_make_runs_what_the_tests_run"
# Command (a regular expression for all of it), the test that runs it, and a text in that test to know it by.
COVERED = (
    (r"make( \.venv/installed)?", MAKE, "dvc repro"),
    (r"make test(-all)?", MAKE, "pytest"),
    (r"python3 -m venv \.venv|(source|\.) \.venv/bin/activate", MAKE, "venv"),
    (r"pip install -r requirements(-remote)?\.txt", MAKE, "-r requirements.txt"),
    (r"dvc repro( [a-z]+(@\S+)?)?", "tests/pipeline/conftest.py::small_run", "repro"),
    (r"dvc repro headline", PIPELINE + "test_sft_and_dpo_are_compared_by_tags_also_in_a_fresh_clone", "headline"),
    (r"dvc repro --allow-missing|dvc pull --allow-missing -r private",
     STORED + "test_base_kept_out_of_pushes", "--allow-missing"),
    (r"dvc status", RERUN + "test_comments_and_hardware_rerun_nothing", "status"),
    (r"dvc dag( --md)?", "tests/test_docs.py::test_the_picture_is_that_of_the_pipeline", "dag"),
    (r"dvc metrics show", PIPELINE + "test_metrics_show_is_a_readable_table", "show"),
    (r"dvc exp run -n (sft|dpo) -S headline\.policy=(sft|dpo)", COMPARED, "exp"),
    (r"dvc metrics diff( sft dpo --targets metrics/headline\.json)?", COMPARED, "diff"),
    (r"dvc plots diff( sft dpo)?", COMPARED, "plots"),
    (r"git tag sft", PIPELINE + "test_sft_and_dpo_are_compared_by_tags_also_in_a_fresh_clone", "tag"),
    (r"git status", PIPELINE + "test_nothing_but_declared_outputs_was_written", "status"),
    (r"dvc gc --workspace", RUN, "dvc gc --workspace"),
    (r'dvc config --local cache\.type (hardlink,copy|".+")', RUN, "cache.type hardlink,copy"),
    (r"dvc (push|pull|checkout)( -r (private|other))?", STORED + "test_there_and_back", "pull"),
    (r"dvc remote default --local private", RUN, "dvc remote default --local private"),
    (r"python -m stages remote check( private( --no-objects)?)?", STORED + "test_there_and_back", "check"),
    (r"python -m stages remote check private --repair", STORED + "test_a_corrupt_object_is_refused", "repair"),
    (r"python -m stages --help", PIPELINE + "test_help_lists_every_stage_and_tool_with_a_line_each", "help"),
    (r"python -m stages NAME", PIPELINE + "test_help_lists_every_stage_and_tool_with_a_line_each", "name"),
    (r"python -m stages export --policy dpo \.\./looper-dpo",
     "tests/pipeline/test_export.py::test_an_exported_policy_answers_alike_in_plain_transformers", "export"),
    (r"python -m stages trace (ID|\S+)",
     "tests/pipeline/test_export.py::test_a_pair_and_an_answer_are_traced_to_the_base", "trace"),
    (r"python -m stages prepare", "tests/pipeline/conftest.py::small_run", "repro"),
    (r"python -m stages plan( dpo@dpo)?",
     RERUN + "test_a_regime_w_weight_really_reruns_what_follows_and_nothing_before", "plan"),
    (r"python -m stages pretrain \.\./base-again",
     "tests/tiny/test_base.py::test_the_command_makes_such_a_folder_with_the_same_bytes_each_time", "main(tmp_path"),
    (r"python -m stages check", PIPELINE + "test_check_passes_and_shows_the_first_prompts", "check"),
    (r"dvc exp run (--queue -S .+ dpo|--run-all -j 1)|dvc exp apply NAME", SWEEP, "apply"),
    (r"dvc queue (status|logs NAME)|dvc exp show", SWEEP, "queue"),
    (r"python -m stages results --experiments( NAME)?", SWEEP, "--experiments"),
    (r"python -m stages results", PIPELINE + "test_results_are_printed_as_a_table", "results"),
    (r"python -m stages evaluate sft", PIPELINE + "test_an_evaluation_run_again_gives_the_same_bytes", "evaluate"),
    (r"python -m stages coherence", RERUN + "test_a_private_scorer_outside_the_tree_is_a_dependency", "coherence"),
    (r'python -m stages ask "Ann .+" --samples 8', "tests/pipeline/test_ask.py::test_samples_vote", "--samples"),
    (r'python -m stages ask "Ann .+"', "tests/pipeline/test_ask.py::test_greedy_answer_is_the_evaluations", "ask"),
    (r"python -m stages (grade( .+ --out \w+\.jsonl)?|compare( graded_before.+)?)",
     "tests/pipeline/test_ask.py::test_compare_and_grade_repeat_what_the_run_found", "grade"),
    (r"python -m stages changed questions\.jsonl --out twins\.jsonl",
     "tests/tools/test_changed.py::test_the_command", "changed"),
    (r"python -m stages explain( QUESTION_ID| train-\d+)?",
     "tests/tools/test_explain.py::test_command_line", "explain"),
    (r"python -m stages pairs( --kind coherence --sample 1)?", RUN, "stages pairs --kind coherence --sample 1"),
    (r"python -m stages suspects", RUN, "stages suspects"),
    (r"python -m stages runs", RUN, "stages runs"),
    (r"python -m pytest tests/pipeline/test_kill\.py --kills 20 -s",
     "tests/pipeline/test_kill.py::test_killed_again_and_again_it_gives_the_same_bytes", "kills"),
    (r"scripts/host\.sh check", HOST + "test_a_good_host_passes_and_nothing_is_changed", "check"),
    (r"scripts/host\.sh setup", HOST + "test_setup_installs_and_can_be_repeated", "setup"),
    (r"scripts/host\.sh (start( \w+)?|status)", OUTLIVES, "start"),
    (r"scripts/host\.sh stop", HOST + "test_stop_ends_it_in_order_and_start_goes_on", "stop"),
    (r"scripts/host\.sh attach", HOST + "test_wrong_use_is_told", "attach"),
)  # fmt: skip
# Inline commands that need what no test has: a GPU, a cluster, a storage, the hub.
UNTRIED = (
    r"dvc exp run -S profile=abel-7b|python -m pytest (-m gpu|tests/engine -k vllm)|ray .+"
    r"|pip install -r requirements-(gpu|ray)\.txt|dvc remote (add|modify) .+"
)
# What every shell and git does, and what only moves the reader.
SHELL = r"(cd|cp) .+|echo ray > \.launcher|git (clone|add|commit|push|checkout|lfs pull)\b.*|\.\.\."


@dataclass(frozen=True)
class Command:
    """One command on a page, and the lines of its block that may say what it needs; inline, None."""

    page: str
    text: str
    signs: str | None

    def is_covered(self) -> bool:
        if any(re.fullmatch(row[0], self.text) for row in COVERED) or re.fullmatch(SHELL, self.text):
            return True
        if script := re.match(r"python bench/(\w+\.py)", self.text):  # run by hand; bench/README.md lists it
            return f"| `{script[1]}` |" in (REPO / "bench" / "README.md").read_text(encoding="utf-8")
        if tests := re.fullmatch(r"python -m pytest (tests/\S+\.py)", self.text):
            return (REPO / tests[1]).is_file()
        return bool(re.fullmatch(UNTRIED, self.text) if self.signs is None else re.search(NEEDS, self.signs))


def parts(line: str) -> list[str]:
    """`A=1 .venv/bin/x && y` -> ["x", "y"]; no comment."""
    line = re.sub(r"(^|\s)#\s.*", "", line)
    commands = [part.strip() for part in re.split(r"\s(?:&&|;|\|)\s", line)]
    return [re.sub(r"^(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?", "", one) for one in commands if one]


def commands_of(page: Path) -> Iterator[Command]:
    name, text = page.relative_to(REPO).as_posix(), page.read_text(encoding="utf-8")
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for tag, block in fence.findall(text):
        assert tag in TAGS, f"{name}: tag the block ```sh for commands, else one of {sorted(TAGS)}:\n{block}"
        lines = block.splitlines()
        first = lines[0] if lines[0].startswith("#") else ""
        for line in lines:
            if tag == "sh" or (tag == "console" and line.startswith("$ ")):
                for one in parts(line.removeprefix("$ ")):
                    yield Command(name, one, f"{first} {line}")
    prose = fence.sub("", text)
    assert not re.search(rf"^    ({'|'.join(map(re.escape, PROGRAMS))})", prose, re.M), (
        f"{name}: untagged command"
    )
    for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose):
        if code.startswith(PROGRAMS) and (" " in code or code == "make"):
            for one in parts(code):
                yield Command(name, one, None)


ALL = [command for page in PAGES for command in commands_of(page)]


def test_every_command_is_run_by_a_test_or_says_what_it_needs() -> None:
    assert len(ALL) > 60
    unknown = [f"{one.page}: {one.text}" for one in ALL if not one.is_covered()]
    assert not unknown, "neither in COVERED nor marked (`# needs a GPU`, ...):\n" + "\n".join(unknown)


@pytest.mark.parametrize(("command", "test", "word"), COVERED, ids=[row[0][:40] for row in COVERED])
def test_the_test_that_runs_it_exists(command: str, test: str, word: str) -> None:
    file, _, name = test.partition("::")
    source = (REPO / file).read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = next((node for node in nodes if node.name == name), None)
    assert found, f"{file} has no {name}"
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    body = "\n".join(source.splitlines()[first - 1 : found.end_lineno])
    assert word in (source if test == RUN else body), f"{test} does not name {word!r}"


def test_every_row_is_needed() -> None:
    """A row for a command that no page has any more covers nothing."""
    idle = [row[0] for row in COVERED if not any(re.fullmatch(row[0], one.text) for one in ALL)]
    assert not idle


def test_make_runs_what_the_tests_run(tmp_path: Path) -> None:
    """`make` is too long for a test; what it would run is: the environment, then commands that the tests run."""
    (tmp_path / "tests").mkdir()
    for file in (REPO / "Makefile", *REPO.glob("requirements*.txt"), *REPO.glob("tests/*.txt")):
        shutil.copy2(file, tmp_path / file.relative_to(REPO))

    def plan(*target: str) -> str:
        command = ["make", "--no-print-directory", "--dry-run", *target]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    lines = plan().splitlines()
    assert any(line.endswith("-m venv .venv") for line in lines)
    assert any(line.endswith("-r requirements.txt") for line in lines)
    assert lines[-1] == ".venv/bin/python -m stages repro"  # dvc repro, then the table
    test = plan("test").splitlines()
    assert any("-r requirements-dev.txt -r requirements-remote.txt" in line for line in test)
    assert [line.split()[0].rpartition("/")[2] for line in test[-4:]] == ["ruff", "ruff", "mypy", "python"]
    assert "-m pytest -n 3 " in test[-1]
    assert "--kills 20" in plan("test-all") and "--kills" not in test[-1]
