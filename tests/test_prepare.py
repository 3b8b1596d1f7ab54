"""prepare: its sources, its splits, and what it says of a bad row. The cleaning itself: tests/text/test_rows.py."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages import prepare
from stages.prepare import make_splits
from stages.run.errors import UserError
from stages.run.files import read_json, read_jsonl
from stages.run.params import FilesData, FileTest, GeneratedData, GeneratedTest, HubData, HubDataset, HubTest
from stages.text.rows import Cleaner, Overlap, pick_validation

REPO = Path(__file__).resolve().parents[1]
SMALL = REPO / "tests" / "small"
REAL = REPO.parent / "shared" / "data"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def rows_of(count: int, first: int = 0) -> list[dict[str, str]]:
    """Short questions, all different, fewer than 13 words each."""
    return [
        {
            "question": f"Ann has {n} apples and eats one. How many are left?",
            "answer": f"It is {n}-1.\n#### {n - 1}",
        }
        for n in range(first + 1, first + count + 1)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files(
    tmp_path: Path, train: list[dict[str, Any]], platinum: list[dict[str, Any]], valid: int = 2
) -> FilesData:
    return FilesData(
        source="files",
        train=write_rows(tmp_path / "train.jsonl", train),
        platinum=write_rows(tmp_path / "test.jsonl", platinum),
        changed="one",
        valid=valid,
    )


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tests' own parameters."""
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FILES = (
    "  source: files\n  changed: one\n  valid: 2\n"  # tests/small/params.yaml names my.jsonl and held.jsonl
)


def set_data(workplace: Path, text: str) -> None:
    profile = workplace / "profiles" / "small.yaml"
    before, rest = profile.read_text().split("data:\n", 1)
    profile.write_text(f"{before}data:\n{text}model:{rest.split('model:', 1)[1]}")


# ---- the whole stage ---------------------------------------------------------------------------------


def test_stage_writes_three_splits_metrics_and_manifest(workplace: Path) -> None:
    """The fields are as documented, the same run gives the same bytes, and leftovers are removed."""
    prepare.main()
    folder = workplace / "data" / "gsm8k"
    rows = {name: list(read_jsonl(folder / f"{name}.jsonl")) for name in ("train", "valid", "platinum")}
    assert {name: len(part) for name, part in rows.items()} == {"train": 30, "valid": 5, "platinum": 20}
    twins = list(read_jsonl(folder / "changed.jsonl"))
    for name, part in rows.items():
        for row in part:
            fields = ["id", "question", "solution", "gold"]
            assert list(row) == ([*fields, "planted"] if row.get("planted") else fields)
            assert row["id"].startswith(f"{name}-") and row["solution"].endswith(f"#### {row['gold']}")
    metrics = read_json(workplace / "metrics" / "data.json")
    assert metrics["train"] == 30 and metrics["platinum"] == 20
    changed = metrics.pop("changed")
    assert all(isinstance(value, int) for value in metrics.values())
    assert changed["questions"] == 20 and changed["twins"] - changed["overlap_train"] == len(twins) > 10
    assert sum(changed["refused"].values()) == 20 - changed["with_twin"]
    assert {twin["of"] for twin in twins} <= {row["id"] for row in rows["platinum"]}
    assert len(read_json(folder / "manifest.json")["outputs"]) == 6

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "stale.jsonl").write_text("left over")
    prepare.main()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_stage_from_files(workplace: Path) -> None:
    """Paths count from the repository root; their hashes are in the manifest; other fields are ignored."""
    write_rows(workplace / "my.jsonl", [{**row, "extra": 1} for row in rows_of(10)])
    write_rows(workplace / "held.jsonl", rows_of(3, first=50))
    set_data(workplace, FILES)
    prepare.main()
    train = list(read_jsonl(workplace / "data" / "gsm8k" / "train.jsonl"))
    valid = list(read_jsonl(workplace / "data" / "gsm8k" / "valid.jsonl"))
    ids = [row["id"] for row in train + valid]
    assert sorted(ids) == [f"train-{n:05d}" for n in range(10)] and len(valid) == 2
    manifest = read_json(workplace / "data" / "gsm8k" / "manifest.json")
    assert list(manifest["inputs"]) == ["my.jsonl", "held.jsonl"]


def test_bad_file_leaves_the_old_output(workplace: Path) -> None:
    """A mistake in new data never costs the data that is there."""
    prepare.main()
    before = (workplace / "data" / "gsm8k" / "train.jsonl").read_bytes()
    write_rows(workplace / "my.jsonl", [*rows_of(10), {"question": "Why?", "answer": "Because."}])
    write_rows(workplace / "held.jsonl", rows_of(1))
    set_data(workplace, FILES)
    with pytest.raises(UserError, match=r"my\.jsonl:11: field 'answer' must end in"):
        prepare.main()
    (workplace / "my.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"^my\.jsonl: there is no such file; own\.train and .* name JSONL .* CSV"
    ):
        prepare.main()
    assert (workplace / "data" / "gsm8k" / "train.jsonl").read_bytes() == before
    assert [path.name for path in (workplace / "data").iterdir()] == ["gsm8k"]


def test_html_entities_are_told_and_kept(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with their number and the first place, Platinum's before those of train."""
    rows = rows_of(10)
    rows[3]["question"] += " Tom &amp; Ann&#39;s?"
    write_rows(workplace / "my.jsonl", rows)
    write_rows(
        workplace / "held.jsonl", [*rows_of(2, 50), {"question": "Why?", "answer": "5&nbsp;-&nbsp;4\n#### 1"}]
    )
    set_data(workplace, FILES)
    prepare.main()
    assert (
        "2 rows hold HTML entities, kept as they are; the first is held.jsonl:3 (&nbsp;). "
        "Turn them into text in the source, unless they are meant"
    ) in capsys.readouterr().err
    assert read_json(workplace / "metrics" / "data.json")["html_entities"] == 2
    written = read_jsonl(workplace / "data" / "gsm8k" / "platinum.jsonl")
    assert [row["solution"] for row in written][2] == "5&nbsp;-&nbsp;4\n#### 1"


def test_every_format_gives_the_same_splits(tmp_path: Path) -> None:
    """A gzipped CSV for train and a JSON array for Platinum, against JSONL. The formats: tests/text/test_sources.py."""
    plain = files(tmp_path, rows_of(12), rows_of(3, 50))
    table = "question,answer\r\n" + "".join(f'"{r["question"]}","{r["answer"]}"\r\n' for r in rows_of(12))
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(table.encode()))
    (tmp_path / "test.json").write_text(json.dumps(rows_of(3, 50)))
    names = {"train": str(tmp_path / "train.csv.gz"), "platinum": str(tmp_path / "test.json")}
    assert make_splits(plain.model_copy(update=names), 1) == make_splits(plain, 1)


# ---- bad rows ----------------------------------------------------------------------------------------


def test_too_few_rows(tmp_path: Path) -> None:
    """Validation may not take all of train, and an empty held-out file is a mistake."""
    for valid in (4, 5):
        with pytest.raises(UserError, match=r"data: 4 training .* data\.valid takes"):
            make_splits(files(tmp_path, rows_of(4), rows_of(1, first=50), valid), 1)
    with pytest.raises(UserError, match="and 0 Platinum rows"):
        make_splits(files(tmp_path, rows_of(4), []), 1)


# ---- ids, duplicates, validation ---------------------------------------------------------------------


def test_ids_stay_when_other_rows_go(tmp_path: Path) -> None:
    """A removed duplicate leaves a gap; the rows after it keep their ids."""
    rows = rows_of(4)
    splits, counts, _ = make_splits(
        files(tmp_path, [rows[0], rows[0], *rows[1:]], rows_of(1, first=50), 1), 1
    )
    ids = sorted(row["id"] for row in splits["train"] + splits["valid"])
    assert ids == [f"train-0000{n}" for n in (0, 2, 3, 4)]
    assert counts["duplicates_train"] == 1 and counts["read_train"] == 5 and counts["conflicting_golds"] == 0


def test_validation_is_seeded_and_does_not_move() -> None:
    """Of 1,000 rows, 100 chosen: without 10 of the others, at most 10 change; another seed chooses others."""
    rows = [{"id": f"train-{n:05d}"} for n in range(1000)]
    chosen = pick_validation(rows, 100, seed=1)
    assert len(chosen) == 100 and pick_validation(reversed(rows), 100, seed=1) == chosen
    gone = {f"train-{n:05d}" for n in range(0, 1000, 100)}
    fewer = pick_validation([row for row in rows if row["id"] not in gone], 100, seed=1)
    assert fewer >= chosen - gone and len(fewer) == 100
    assert len(pick_validation(rows, 100, seed=2) & chosen) < 40


def test_platinum_is_never_thinned_by_train(tmp_path: Path) -> None:
    """What overlaps leaves train; the held-out set stays whole."""
    _, counts, _ = make_splits(files(tmp_path, rows_of(20), rows_of(10)), 1)
    assert counts["platinum"] == 10 and counts["overlap_exact"] == 10 and counts["train"] == 8


def worked(n: int) -> dict[str, str]:
    return {
        "question": f"Ann has {n} bags of 7 red apples. How many red apples does Ann have in all?",
        "answer": f"<<{n}*7={7 * n}>>{7 * n}\n#### {7 * n}",
    }


def test_twins_of_ones_own_questions(tmp_path: Path) -> None:
    """One a question, or one for each number, or none; the other splits stay as they are."""
    made = {}
    for change in ("one", "all", "none"):
        source = files(tmp_path, rows_of(9), [worked(20), worked(40)]).model_copy(update={"changed": change})
        made[change] = make_splits(source, 1)
    sizes = {change: len(splits["changed"]) for change, (splits, *_) in made.items()}
    assert sizes == {"one": 2, "all": 4, "none": 0}
    twin = made["one"][0]["changed"][0]
    assert twin["of"] == "platinum-00000" and twin["question"] != worked(20)["question"]
    assert "changed" not in made["none"][1] and made["all"][1]["changed"]["twins"] == 4
    assert all(splits | {"changed": []} == made["none"][0] for splits, *_ in made.values())


@pytest.mark.parametrize("more", ["", " Say it."], ids=["all of it", "13 words"])
def test_a_twin_that_is_a_training_question_is_removed(tmp_path: Path, more: str) -> None:
    """The training question stays, so that twins never change what is trained on."""
    asked = worked(20) | {"question": "Ann has 20 bags of 7 red apples. How many apples are there?"}
    (twin,) = make_splits(files(tmp_path, rows_of(9), [asked]), 1)[0]["changed"]
    training = [*rows_of(9), {"question": twin["question"] + more, "answer": "#### 1"}]
    splits, counts, _ = make_splits(files(tmp_path, training, [asked]), 1)
    assert len(splits["train"]) + len(splits["valid"]) == 10
    assert splits["changed"] == [] and counts["changed"]["overlap_train"] == 1


def test_generated_splits_are_full_and_apart() -> None:
    """Generated train and valid are topped up after what was removed; nothing removable is left in them."""
    data = GeneratedData(
        source="generated", train=300, valid=60, platinum=400, changed="one", wrong_labels=0.1
    )
    splits, counts, _ = make_splits(data, 17)
    assert [len(splits[name]) for name in ("train", "valid", "platinum")] == [300, 60, 400]
    held_out = Cleaner(Overlap(splits["platinum"]))
    assert len(list(held_out.clean(splits["train"] + splits["valid"]))) == 360
    assert counts["read_train"] == 360 + counts["overlap_13gram"] and counts["duplicates_train"] == 0


def test_wrong_labels_are_planted_in_train_alone() -> None:
    """About the share asked for, marked, with another answer; every other row is as it would be without."""
    made = {}
    for share in (0.0, 0.1):
        source = GeneratedData(
            source="generated", train=300, valid=60, platinum=60, changed="one", wrong_labels=share
        )
        made[share], counts, _ = make_splits(source, 17)
    planted = [row["id"] for row in made[0.1]["train"] if row.get("planted")]
    assert counts["planted_wrong_labels"] == len(planted) and 15 <= len(planted) <= 45
    for right, row in zip(made[0.0]["train"], made[0.1]["train"], strict=True):
        assert right["question"] == row["question"]
        assert (right["gold"] != row["gold"]) == (row["id"] in planted)
    for split in ("valid", "platinum"):
        assert made[0.0][split] == made[0.1][split]


def test_other_test_sets_change_nothing_else(tmp_path: Path) -> None:
    """A question that is also in train leaves the test set, not train. Generated ones start with a larger number."""
    rows = [*rows_of(2), *rows_of(3, first=70)]
    path = write_rows(tmp_path / "mine.jsonl", [row | {"answer": row["answer"][-2:]} for row in rows])
    tests = {
        "mine": FileTest(source="file", file="mine.jsonl", path=path),
        "larger": GeneratedTest(source="generated", start=[50, 60], questions=20),
    }
    plain = files(tmp_path, rows_of(9), rows_of(3, first=50))
    splits, counts, _ = make_splits(plain.model_copy(update={"tests": tests}), 1)
    before, counted, _ = make_splits(plain, 1)
    assert splits | {"tests": []} == before and "tests" not in counted
    assert [row["id"] for row in splits["tests"] if row["test"] == "mine"] == [
        f"mine-0000{n}" for n in (2, 3, 4)
    ]
    assert counts["tests"]["mine"]["overlap_exact"] == 2
    larger = [row["question"] for row in splits["tests"] if row["test"] == "larger"]
    starts = [int(re.search(r"has (\d+)", question)[1]) for question in larger]  # type: ignore[index]
    assert len(starts) == 20 and all(50 <= start <= 60 for start in starts)


def test_a_test_set_on_the_hub(tmp_path: Path, repositories: tuple[str, str]) -> None:
    """Its columns are named; without them, or without the dataset, one line says which set it is."""
    rows = [{"Body": "Ann has 9.", "Question": "How many?", "Answer": "9.0"}]
    place = {"id": local_repository(tmp_path / "svamp", rows, "test"), "config": "main", "revision": REVISION}
    columns = {"question": ["Body", "Question"], "answer": "Answer"}

    def made(**more: Any) -> Any:
        test = HubTest(source="hub", **place, **more)
        return make_splits(hub(*repositories).model_copy(update={"tests": {"svamp": test}}), 1)

    (row,) = made(split="test", **columns)[0]["tests"]
    assert row == {"id": "svamp-00000", "test": "svamp", "question": "Ann has 9. How many?", "gold": "9"}
    with pytest.raises(
        UserError, match=r"svamp \(main, test\): has no column 'question'; columns found: Body, "
    ):
        made(split="test")
    with pytest.raises(
        UserError, match=r"svamp \(main, tset\): cannot be loaded .*data\.tests\.\*.*source: file$"
    ):
        made(split="tset", **columns)


# ---- the hub -----------------------------------------------------------------------------------------


def local_repository(folder: Path, rows: list[dict[str, Any]], split: str) -> str:
    """A dataset repository as on the hub: a card that names the config `main`, and its files."""
    folder.mkdir()
    write_rows(folder / "rows.jsonl", rows)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: {split}\n    path: rows.jsonl\n---\n"
    )
    return str(folder)


def hub(train: str, platinum: str, config: str = "main") -> HubData:
    return HubData(
        source="hub",
        train=HubDataset(id=train, config=config, split="train", revision=REVISION),
        platinum=HubDataset(id=platinum, config="main", split="test", revision=REVISION),
        changed="one",
        valid=2,
    )


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two local dataset repositories, and a cache of their own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    held = [{**row, "cleaning_status": "ok"} for row in rows_of(3, 50)]
    train = local_repository(tmp_path / "train", rows_of(12), "train")
    return train, local_repository(tmp_path / "held", held, "test")


def test_hub_rows_are_those_of_files(tmp_path: Path, repositories: tuple[str, str]) -> None:
    """The same rows by `load_dataset` and from JSONL give the same splits."""
    assert make_splits(hub(*repositories), 3) == make_splits(files(tmp_path, rows_of(12), rows_of(3, 50)), 3)


def test_hub_mistakes_are_one_line(tmp_path: Path, repositories: tuple[str, str]) -> None:
    """A wrong config or split, wrong columns and a bad row name the dataset, its config and split."""
    train, platinum = repositories
    with pytest.raises(
        UserError, match=r"train \(mian, train\): cannot be loaded at revision 0123456789ab .*mian"
    ):
        make_splits(hub(train, platinum, config="mian"), 3)
    with pytest.raises(UserError, match=r"held \(main, train\): cannot be loaded"):
        make_splits(hub(platinum, platinum), 3)
    other = local_repository(tmp_path / "other", [{"problem": "Why?", "answer": "#### 1"}], "train")
    with pytest.raises(UserError, match=r"other \(main, train\): has no column 'question'; columns found: "):
        make_splits(hub(other, platinum), 3)
    bad = local_repository(tmp_path / "bad", [*rows_of(3), {"question": "Why?", "answer": "no"}], "train")
    with pytest.raises(UserError, match=r"bad \(main, train\) row 3: field 'answer' must end in"):
        make_splits(hub(bad, platinum), 3)


def test_unreachable_hub_is_one_line(workplace: Path) -> None:
    """Without a network: what could not be loaded, and what to do; no traceback."""
    source = f"config: main, split: train, revision: {REVISION}"
    set_data(
        workplace,
        f"  source: hub\n  train: {{id: openai/gsm8k, {source}}}\n"
        f"  platinum: {{id: madrylab/gsm8k-platinum, {source}}}\n  changed: one\n  valid: 2\n",
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "hf"), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "stages", "prepare"]
    done = subprocess.run(command, cwd=workplace, env=env, capture_output=True, text=True, check=False)
    message = done.stderr.strip()
    assert done.returncode and "\n" not in message
    assert "madrylab/gsm8k-platinum (main, train): cannot be loaded at revision 0123456789ab" in message
    assert message.endswith("or use data.source: files")
    assert not (workplace / "data").exists()


# ---- real GSM8K --------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="real GSM8K is not beside this repository (../shared/data)")
def test_real_gsm8k() -> None:
    """No duplicates, four training questions share 13 words with Platinum, and Platinum is kept out of training."""
    platinum = str(REAL / "gsm8k_platinum" / "test.jsonl")
    data = FilesData(
        source="files", train=str(REAL / "gsm8k" / "train.jsonl"), platinum=platinum, changed="one", valid=300
    )
    splits, counts, _ = make_splits(data, 17)
    changed = counts.pop("changed")
    assert (changed["with_twin"], changed["overlap_train"], len(splits["changed"])) == (725, 0, 725)
    assert counts == {
        "train": 7169, "valid": 300, "platinum": 1209, "read_train": 7473, "read_platinum": 1209,
        "duplicates_train": 0, "duplicates_platinum": 0, "conflicting_golds": 0, "overlap_exact": 0,
        "overlap_13gram": 4, "html_entities": 0,
    }  # fmt: skip
    assert splits["platinum"][0]["gold"] == "18"
    # All of Platinum is in GSM8K's test set: given as training data, its 1,209 questions are removed.
    data = FilesData(
        source="files", train=str(REAL / "gsm8k" / "test.jsonl"), platinum=platinum, changed="one", valid=10
    )
    _, counts, _ = make_splits(data, 17)
    assert counts["overlap_exact"] == 1209
    assert counts["train"] + counts["valid"] == 110 - counts["overlap_13gram"]
