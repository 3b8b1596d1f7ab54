"""Write this run's questions to `data/gsm8k/{train,valid,platinum}.jsonl`, from the hub, from files or generated.

    {"id": "train-00017", "question": "Ann has 3 bags ...", "solution": "... #### 10", "gold": "10"}

`changed.jsonl` beside them holds twins of Platinum's questions: one number is another one (docs/changed-questions.md),
`tests.jsonl` the questions of the other test sets (stages/text/testsets.py).

An id is the row's place in its source, so it does not change when cleaning drops other rows. A question that occurs
twice is kept once. A training question that is also in Platinum (all of it, or 13 words in a row) is removed. A
twin, or a question of another test set, that is also in train or valid is removed itself. Every removal is counted in
`metrics/data.json`, and so are rows with HTML entities (`&amp;`), which are kept. A generated row with a deliberately
wrong answer (`data.wrong_labels`) has `planted: true`, to measure how well suspect labels are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from stages.regime_w.changed import ChangeCounts, changed_rows
from stages.run.errors import UserError
from stages.run.files import atomic_folder, write_json, write_jsonl
from stages.run.params import FilesData, GeneratedData, GeneratedTest, HubData, load_params
from stages.run.paths import DATA_METRICS, PROBLEMS
from stages.run.stage import stage_run
from stages.text.rows import GRAM, Cleaner, Overlap, Row, apart, checked_row, pick_validation
from stages.text.sources import FORMATS, read_rows
from stages.text.testsets import files_of_tests, read_tests
from stages.tiny.problems import Split, labelled, problems
from stages.tiny.twins import generated_twins

Source = GeneratedData | HubData | FilesData


def main() -> None:
    """Read, check, clean and write all splits. Raises UserError for an unusable row or source."""
    data = load_params().data
    inputs = [Path(data.train), Path(data.platinum)] if isinstance(data, FilesData) else []
    for path in inputs:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; own.train and own.platinum name {FORMATS}")
    inputs += files_of_tests(data.tests)
    outputs = [PROBLEMS, DATA_METRICS]
    with stage_run("prepare", sections=("data", "seed"), inputs=inputs, outputs=outputs) as run:
        splits, counts, entities = make_splits(data, run.params.seed)
        with atomic_folder(PROBLEMS) as folder:
            for name, rows in splits.items():
                write_jsonl(folder / f"{name}.jsonl", rows)
        write_json(DATA_METRICS, counts)
        removed = {
            "doubled": counts["duplicates_train"] + counts["duplicates_platinum"],
            "in Platinum": counts["overlap_exact"],
            f"with {GRAM} words in a row from Platinum": counts["overlap_13gram"],
        }
        what = ", ".join(f"{n} {why}" for why, n in removed.items() if n) or "nothing"
        if conflicts := counts["conflicting_golds"]:
            run.say(f"{conflicts} doubled questions had another answer; the first one was kept")
        if entities:
            what_to_do = "Turn them into text in the source, unless they are meant"
            first = f"kept as they are; the first is {entities[0]}"
            run.say(f"{len(entities)} rows hold HTML entities, {first}. {what_to_do}")
        sizes = ", ".join(f"{len(rows):,} {name}" for name, rows in splits.items() if rows)
        run.finish(f"{sizes}; removed: {what}")


def make_splits(data: Source, seed: int) -> tuple[dict[str, list[Row]], dict[str, Any], list[str]]:
    """The rows of all five files, the counts for `metrics/data.json`, and the places of HTML entities.

    The generator makes as many rows as are wanted; from other sources, `data.valid` rows are taken out of train. Train
    and valid are counted together. Raises UserError for an unusable row, or when too few rows are left.
    """
    entities: list[str] = []
    if isinstance(data, GeneratedData):
        platinum_cleaner = Cleaner()
        made = _generated("platinum", 0)  # the same for every seed, as the real Platinum is
        platinum = list(islice(platinum_cleaner.clean(made), data.platinum))
        cleaner = Cleaner(Overlap(platinum))
        train = list(islice(cleaner.clean(_generated("train", seed, data.wrong_labels)), data.train))
        valid = list(islice(cleaner.clean(_generated("valid", seed)), data.valid))
    else:
        platinum_cleaner = Cleaner()
        platinum = list(platinum_cleaner.clean(read_rows(data.platinum, "platinum", entities)))
        cleaner = Cleaner(Overlap(platinum))
        rows = list(cleaner.clean(read_rows(data.train, "train", entities)))
        if not platinum or len(rows) <= data.valid:
            raise UserError(
                f"data: {len(rows)} training and {len(platinum)} Platinum rows are left after cleaning; "
                f"data.valid takes {data.valid} of the training rows, and some of each must remain"
            )
        chosen = pick_validation(rows, data.valid, seed)
        train = [row for row in rows if row["id"] not in chosen]
        valid = [row for row in rows if row["id"] in chosen]
    counts: dict[str, Any] = {
        "train": len(train),
        "valid": len(valid),
        "platinum": len(platinum),
        "read_train": cleaner.counts["read"],
        "read_platinum": platinum_cleaner.counts["read"],
        "duplicates_train": cleaner.counts["duplicates"],
        "duplicates_platinum": platinum_cleaner.counts["duplicates"],
        "conflicting_golds": cleaner.counts["conflicts"] + platinum_cleaner.counts["conflicts"],
        "overlap_exact": cleaner.counts["exact"],
        "overlap_13gram": cleaner.counts["gram"],
    }
    tests, counted = read_tests(data.tests, [*train, *valid], entities, _generated_test)
    if isinstance(data, GeneratedData):
        counts["planted_wrong_labels"] = sum(row.get("planted", False) for row in train)
    else:
        counts["html_entities"] = len(entities)
    changed = ChangeCounts()
    drawn = list(_twins(data, platinum, seed, changed))
    twins = apart(drawn, [*train, *valid])
    if data.changed != "none":
        counts["changed"] = {**changed.metrics(), "overlap_train": len(drawn) - len(twins)}
    if counted:
        counts["tests"] = counted
    held_out = {"platinum": platinum, "changed": twins, "tests": tests}
    return {"train": train, "valid": valid} | held_out, counts, entities


def _twins(data: Source, platinum: list[Row], seed: int, counts: ChangeCounts) -> Iterator[Row]:
    if data.changed == "none":
        return iter(())
    if isinstance(data, GeneratedData):
        return generated_twins([row["id"] for row in platinum], "platinum", 0, data.changed, seed, counts)
    return changed_rows(platinum, data.changed, seed, counts)


def _generated(split: Split, seed: int, wrong_labels: float = 0.0) -> Iterator[Row]:
    for place, (problem, answer, planted) in enumerate(labelled(split, seed, wrong_labels)):
        name = f"{split}-{place:05d}"
        row = checked_row(name, problem.question, answer, f"generated problem {name}")
        yield {**row, "planted": True} if planted else row


def _generated_test(name: str, test: GeneratedTest) -> Iterator[Row]:
    for place, problem in enumerate(problems("platinum", 0, test.start)):
        yield {"id": f"{name}-{place:05d}", "question": problem.question, "gold": str(problem.result)}
