"""The test sets beside Platinum (`data.tests`), one after the other, as rows of data/gsm8k/tests.jsonl:

    {"id": "svamp-00017", "test": "svamp", "question": "Dan had $ 3 left ...", "gold": "1"}

A gold may be a bare number, because only the answer counts. A question that occurs twice in a set is kept once. One
that is also in train or valid (all of it, or 13 words in a row) is left out, so that test sets never change what is
trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from stages.run.errors import UserError
from stages.run.params import FileTest, GeneratedTest, Test
from stages.text.rows import Cleaner, Overlap, Row
from stages.text.sources import read_rows

Generate = Callable[[str, GeneratedTest], Iterator[Row]]  # the rows of a generated set, endless


def files_of_tests(tests: Mapping[str, Test]) -> list[Path]:
    """The files that the test sets name. Raises UserError for one that is not there, with those that are."""
    paths = {name: Path(test.path) for name, test in tests.items() if isinstance(test, FileTest)}
    for name, path in paths.items():
        if not path.is_file():
            there = ", ".join(sorted(one.name for one in path.parent.glob("[!.]*"))) or "nothing"
            raise UserError(
                f"{path}: there is no such file, so data.tests.{name} cannot be read (there is: {there})"
            )
    return list(paths.values())


def read_tests(
    tests: Mapping[str, Test], training: Sequence[Row], entities: list[str], generate: Generate
) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """The rows of all test sets, and for each what was read, kept and left out.

    Raises UserError for a source that cannot be read, an unusable row, and a set of which nothing is left.
    """
    overlap = Overlap(training if tests else ())
    rows: list[Row] = []
    counts: dict[str, dict[str, int]] = {}
    for name, test in tests.items():
        cleaner = Cleaner(overlap)
        if isinstance(test, GeneratedTest):
            kept = list(islice(cleaner.clean(generate(name, test)), test.questions))
        else:
            source = test.path if isinstance(test, FileTest) else test
            kept = list(cleaner.clean(read_rows(source, name, entities, test, cleaner.counts)))
        count = cleaner.counts
        if not kept:
            raise UserError(
                f"data.tests.{name}: no question is left of {count['read'] + count['skipped']} "
                f"({count['skipped']} without a gold, {count['exact'] + count['gram']} that are in train)"
            )
        rows += (
            {"id": row["id"], "test": name, "question": row["question"], "gold": row["gold"]} for row in kept
        )
        counts[name] = {
            "questions": len(kept),
            "read": count["read"] + count["skipped"],
            "skipped": count["skipped"],
            "duplicates": count["duplicates"],
            "conflicting_golds": count["conflicts"],
            "overlap_exact": count["exact"],
            "overlap_13gram": count["gram"],
        }
    return rows, counts
