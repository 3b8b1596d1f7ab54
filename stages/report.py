"""Compare the policies, and write the comparison, data for DVC's plots, and `report.html`: one page that loads nothing.

When a curve, a plot or a manifest is missing, the page leaves it out or says so. One evaluated policy is enough.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

from stages.page.facts import SUMMARIES, TABLES, page_facts, round_files
from stages.page.render import render
from stages.run.errors import UserError
from stages.run.files import FieldTypes, atomic_write, read_json, read_jsonl, write_json
from stages.run.params import load_params
from stages.run.paths import (
    COMPARISON,
    KEPT,
    PAGE,
    PLATINUM_DETAILS,
    PLATINUM_EVAL,
    POLICY_PLOT,
    TESTS_EVAL,
    VOTE_DETAILS,
    VOTES,
)
from stages.run.rounds import compared, policies_of, shown
from stages.run.stage import stage_run
from stages.stats.one import BOOTSTRAP_SEED, samples_in
from stages.stats.paired import compare, compare_changed, compare_tests, compare_votes

FIELDS: FieldTypes = {
    "id": str, "question": str, "gold": str, "completion": str, "answer": (str, type(None)), "correct": bool,
    "tokens": int, "finish": str, "leak": bool, "answers_found": int,
}  # fmt: skip
TEST_FIELDS: FieldTypes = {"id": str, "test": str, "completion": str, "correct": bool}
VOTE_FIELDS: FieldTypes = {"id": str, "coherent": (float, int)}
Table = Mapping[str, list[dict[str, Any]]]  # the rows of each policy
PLOTTED = ("accuracy", "accuracy_low", "accuracy_high", "mean", "mean_low", "mean_high", "truncated", "leak")


def main() -> None:
    """Write the paired comparisons, the plot data and the page.

    Raises UserError when no policy was evaluated, or a file is damaged.
    """
    # Inputs: the policies that were evaluated, and every table and summary that is there.
    starts = {name: one.start for name, one in load_params().rounds.items()}
    evaluated = {name: PLATINUM_EVAL / f"{name}.jsonl" for name in policies_of(starts)}
    wanted = ", ".join(path.name for path in evaluated.values())
    evaluated = {name: path for name, path in evaluated.items() if path.is_file()}
    if not evaluated:
        raise UserError(f"{PLATINUM_EVAL}: holds none of {wanted}; run `dvc repro`")
    details = [PLATINUM_DETAILS / f"{name}.json" for name in evaluated]
    voted = {name: VOTE_DETAILS / f"{name}.json" for name in evaluated}
    voted = {name: path for name, path in voted.items() if path.is_file()}
    asked = [TESTS_EVAL / f"{name}.jsonl" for name in evaluated]
    elected = [VOTES / f"{name}.jsonl" for name in evaluated]
    kept = [KEPT / f"{name}.json" for name in policies_of(starts)]
    files = dict.fromkeys([*asked, *elected, *SUMMARIES, *TABLES, *kept, *round_files(starts)])
    more = [path for path in files if path.is_file()]
    with stage_run(
        "report",
        sections=("rounds",),
        inputs=[*evaluated.values(), *details, *voted.values(), *more],
        outputs=[PAGE, COMPARISON, POLICY_PLOT],
    ) as run:
        rows = {name: list(read_jsonl(path, FIELDS)) for name, path in evaluated.items()}
        tests = {path.stem: list(read_jsonl(path, TEST_FIELDS)) for path in asked if path in more}
        votes = {path.stem: list(read_jsonl(path, VOTE_FIELDS)) for path in elected if path in more}

        # Each policy, and each pair of policies.
        policies = {name: read_json(PLATINUM_DETAILS / f"{name}.json") for name in rows}
        comparisons = {
            f"{a}_to_{b}": compare_all(a, b, rows, votes, tests)
            for a, b in compared(starts)
            if a in rows and b in rows
        }
        write_json(COMPARISON, comparisons)
        write_policies(policies)

        # The page.
        ballots = {name: read_json(path) for name, path in voted.items()}
        facts = page_facts(policies, comparisons, rows, ballots, starts)
        with atomic_write(PAGE) as file:
            file.write(render(facts))
        for warning in [*facts["unchanged"], *facts["warnings"], *facts["disagreements"]]:
            run.say(f"WARNING {warning}")
        verdict = "".join(f": {one['title']}, greedy: {one['greedy']}" for one in facts["verdicts"][:1])
        run.finish(f"{PAGE}{verdict}")


def compare_all(a: str, b: str, rows: Table, votes: Table, tests: Table) -> dict[str, Any]:
    """Policy `b` against `a`: greedy answers and samples, twins, votes, and the other test sets."""
    names = shown(a), shown(b)
    return {
        **compare(rows[a], rows[b], *names, BOOTSTRAP_SEED),
        **compare_changed(rows[a], rows[b], names, BOOTSTRAP_SEED),
        **compare_votes(votes.get(a, ()), votes.get(b, ()), names, BOOTSTRAP_SEED),
        **compare_tests(tests.get(a, ()), tests.get(b, ()), names, BOOTSTRAP_SEED),
    }


def write_policies(policies: Mapping[str, Mapping[str, Any]]) -> None:
    """Write one line for each policy, for `dvc plots`; the columns do not depend on the number of samples."""
    with atomic_write(POLICY_PLOT) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["policy", *PLOTTED])
        for name, values in policies.items():
            k = samples_in(values)
            keys = [column.replace("mean", f"mean_at_{k}") for column in PLOTTED]
            writer.writerow([shown(name), *(values.get(key, "") for key in keys)])
