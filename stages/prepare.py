"""Write this run's questions: `data/gsm8k/{train,valid,platinum}.jsonl`, from hub, files or generator.

    {"id": "train-00017", "question": "Ann has 3 bags ...", "answer": "... #### 10", "gold": "10"}

An id is the row's place in its source, so it stays when cleaning drops other rows. A doubled question is
kept once. A generated row whose answer was made wrong on purpose (`data.wrong_labels`) also has `planted: true`:
no stage learns from that field, it only tells how well suspect labels are found. What train shares with Platinum
is taken out of train (the whole question, or 13 words in a row, as in the GPT-3 paper, appendix C), and every
removal is counted in `metrics/data.json`.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from stages.core.answers import gold_answer
from stages.core.errors import UserError
from stages.core.params import FilesData, GeneratedData, HubData, HubDataset, load_params
from stages.core.records import read_numbered_jsonl, write_json, write_jsonl
from stages.core.stage import atomic_folder, stage_run
from stages.tiny.problems import Split, mislabelled, problems

OUT = Path("data/gsm8k")
METRICS = Path("metrics/data.json")
FIELDS = ("question", "answer")
GRAM = 13

Row = dict[str, Any]


def main() -> None:
    """Read, check, clean and write all three splits. Raises UserError for an unusable row or source."""
    data = load_params().data
    inputs = [Path(data.train), Path(data.platinum)] if isinstance(data, FilesData) else []
    for path in inputs:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; data.train and data.platinum name JSONL files")
    with stage_run("prepare", sections=("data", "seed"), inputs=inputs, outputs=[OUT, METRICS]) as run:
        splits, counts = make_splits(data, run.params.seed)
        with atomic_folder(OUT) as folder:
            for name, rows in splits.items():
                write_jsonl(folder / f"{name}.jsonl", rows)
        write_json(METRICS, counts)
        removed = {
            "doubled": counts["duplicates_train"] + counts["duplicates_platinum"],
            "in Platinum": counts["overlap_exact"],
            f"with {GRAM} words in a row from Platinum": counts["overlap_13gram"],
        }
        what = ", ".join(f"{n} {why}" for why, n in removed.items() if n) or "nothing"
        run.say(", ".join(f"{len(rows):,} {name}" for name, rows in splits.items()) + f"; removed: {what}")
        if counts["conflicting_golds"]:
            run.say(
                f"{counts['conflicting_golds']} doubled questions had another answer; the first one was kept"
            )


def make_splits(
    data: GeneratedData | HubData | FilesData, seed: int
) -> tuple[dict[str, list[Row]], dict[str, int]]:
    """The rows of train, valid and platinum, and what `metrics/data.json` says of them.

    Generated train and valid are drawn until they are full; else `data.valid` rows are taken out of train.
    Counts named `train` cover train and valid together, as far as they say what was read or removed.
    Raises UserError when a row is not usable, or too few are left.
    """
    if isinstance(data, GeneratedData):
        platinum_cleaner = Cleaner()
        platinum = list(islice(platinum_cleaner.clean(_generated("platinum", seed)), data.platinum))
        cleaner = Cleaner(Overlap(platinum))
        train = list(islice(cleaner.clean(_generated("train", seed, data.wrong_labels)), data.train))
        valid = list(islice(cleaner.clean(_generated("valid", seed)), data.valid))
    else:
        platinum_cleaner = Cleaner()
        platinum = list(platinum_cleaner.clean(_read(data.platinum, "platinum")))
        cleaner = Cleaner(Overlap(platinum))
        rows = list(cleaner.clean(_read(data.train, "train")))
        if not platinum or len(rows) <= data.valid:
            raise UserError(
                f"data: {len(rows)} training and {len(platinum)} Platinum rows are left after cleaning; "
                f"data.valid takes {data.valid} of the training rows, and some of each must remain"
            )
        chosen = choose(rows, data.valid, seed)
        train = [row for row in rows if row["id"] not in chosen]
        valid = [row for row in rows if row["id"] in chosen]
    counts = {
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
    if isinstance(data, GeneratedData):
        counts["planted_wrong_labels"] = sum(row.get("planted", False) for row in train)
    return {"train": train, "valid": valid, "platinum": platinum}, counts


def choose(rows: Iterable[Row], count: int, seed: int) -> set[str]:
    """The ids of `count` rows for validation: those with the smallest hash of (seed, id).

    A row's rank does not depend on the others: where k rows come or go, at most k of the chosen change.
    """

    def rank(identity: str) -> bytes:
        return hashlib.sha256(f"{seed}/{identity}".encode()).digest()

    return set(sorted((row["id"] for row in rows), key=rank)[:count])


def normalise(text: str) -> str:
    """`text` as compared with others: Unicode NFKC, case folded, only its words, one space between them."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()))


def grams(text: str) -> set[str]:
    """All runs of 13 words of a normalised text; none when it is shorter."""
    words = text.split()
    return {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


class Overlap:
    """What a question may not share with the held-out rows."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.texts = {normalise(row["question"]) for row in rows}
        self.grams: set[str] = set().union(*map(grams, self.texts))


@dataclass
class Cleaner:
    """Drops what was seen before and what is held out, and counts it."""

    overlap: Overlap = field(default_factory=Overlap)
    counts: Counter[str] = field(default_factory=Counter)
    golds: dict[str, str] = field(default_factory=dict)  # by normalised question

    def clean(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows to keep, in order."""
        for row in rows:
            self.counts["read"] += 1
            text = normalise(row["question"])
            if text in self.golds:
                self.counts["duplicates"] += 1
                self.counts["conflicts"] += row["gold"] != self.golds[text]
                continue
            self.golds[text] = row["gold"]
            if text in self.overlap.texts:
                self.counts["exact"] += 1
            elif not self.overlap.grams.isdisjoint(grams(text)):
                self.counts["gram"] += 1
            else:
                yield row


def _generated(split: Split, seed: int, wrong_labels: float = 0.0) -> Iterator[Row]:
    for place, problem in enumerate(problems(split, seed)):
        rng = random.Random(f"{seed}/{split}/label/{place}")
        planted = rng.random() < wrong_labels
        answer = mislabelled(problem, rng) if planted else problem.answer
        row = _row(f"{split}-{place:05d}", problem.question, answer, f"generated {split} problem {place}")
        yield {**row, "planted": True} if planted else row


def _read(source: str | HubDataset, split: str) -> Iterator[Row]:
    records = _from_hub(source) if isinstance(source, HubDataset) else _from_file(Path(source))
    for place, (where, record) in enumerate(records):
        yield _row(f"{split}-{place:05d}", record["question"], record["answer"], where)


def _from_file(path: Path) -> Iterator[tuple[str, Row]]:
    for number, record in read_numbered_jsonl(path, dict.fromkeys(FIELDS, str)):
        yield f"{path}:{number}", record


def _from_hub(source: HubDataset) -> Iterator[tuple[str, Row]]:
    import datasets

    name = f"{source.id} ({source.config}, {source.split})"
    try:
        table = datasets.load_dataset(source.id, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # whatever datasets, the hub's client and the network below them may raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: cannot be loaded at revision {source.revision[:12]} "
            f"({type(error).__name__}: {reason:.300}); "
            "check the network and data.*.{id,config,split,revision}, or use data.source: files"
        ) from error
    missing = [column for column in FIELDS if column not in table.column_names]
    if missing:
        raise UserError(
            f"{name}: has no column '{missing[0]}'; columns found: {', '.join(table.column_names)}"
        )
    for place, record in enumerate(table):
        yield f"{name} row {place}", record


def _row(identity: str, question: object, answer: object, where: str) -> Row:
    for name, value in zip(FIELDS, (question, answer), strict=True):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: field '{name}' is empty or not text ({value!r:.60})")
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise UserError(
                f"{where}: field '{name}' holds half a character (a lone surrogate); repair the text"
            )
    gold = gold_answer(str(answer)) if "####" in str(answer) else None
    if gold is None:
        raise UserError(
            f"{where}: field 'answer' must end in '#### ' and a number, found {str(answer).strip()[-40:]!r}; "
            "correct or remove this row"
        )
    return {"id": identity, "question": question, "answer": answer, "gold": gold}
