"""Outputs are whole or not there, and progress survives a kill at any moment."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.core.errors import UserError
from stages.core.records import (
    Journal,
    atomic_write,
    jsonl_line,
    read_json,
    read_jsonl,
    read_numbered_jsonl,
    write_json,
    write_jsonl,
)

TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"id": "a", "tokens": 3', "3: not a JSON object in UTF-8"),
        (b'{"id": "\xff", "tokens": 3}', "3: not a JSON object in UTF-8"),
        (b'{"id": "a", "tokens": ' + b"9" * 5000 + b"}", "3: not a JSON object in UTF-8"),
        (b"[" * 100_000, "3: not a JSON object in UTF-8"),
        (b"[1]", "3: a JSON object is wanted, found list"),
        (b'{"id": "a"}', "3: field 'tokens' is missing; fields found: 'id'"),
        (b'{"id": 7, "tokens": 3}', "3: field 'id' must be str, found int (7)"),
        (b'{"id": "a", "tokens": "3"}', "3: field 'tokens' must be int or NoneType, found str ('3')"),
        (b'{"id": "a", "tokens": true}', "3: field 'tokens' must be int or NoneType, found bool (True)"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    """File, line and field are in the message; blank lines count as lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "x", "tokens": null}\n\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        list(read_jsonl(path, {"id": str, "tokens": (int, type(None))}))
    assert str(error.value).startswith(f"{path}:{words}")


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A wrong path is one clear line."""
    with pytest.raises(UserError, match=r"no\.jsonl: cannot be read \(No such file"):
        list(read_jsonl(tmp_path / "no.jsonl"))


def test_truth_values_are_read_where_wanted(tmp_path: Path) -> None:
    """`correct` may be true, false or null."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"correct": true}\n{"correct": null}\n')
    fields = {"correct": (bool, type(None))}
    assert [row["correct"] for row in read_jsonl(path, fields)] == [True, None]


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    """An editor's line number, not the record's."""
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}')
    assert list(read_numbered_jsonl(path)) == [(2, {"a": 1}), (4, {"a": 2})]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(rows=st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=4))
def test_what_is_written_is_read_back(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    """One record a line, whatever characters it holds; floats in full."""
    path = tmp_path / "a.jsonl"
    assert write_jsonl(path, rows) == len(rows) == path.read_bytes().count(b"\n")
    assert list(read_jsonl(path)) == rows


def test_nan_is_refused() -> None:
    """NaN is not JSON: no reader but Python's would take it."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        jsonl_line({"loss": float("nan")})


# ---- writing whole files -----------------------------------------------------------------------------


def test_old_file_survives_an_exception(tmp_path: Path) -> None:
    """Nothing half-written is left, and no temporary file."""
    path = tmp_path / "out.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert read_json(path) == {"old": 1}
    assert names(tmp_path) == ["out.json"]


def test_failed_value_leaves_the_old_file(tmp_path: Path) -> None:
    """NaN is found in the middle of writing."""
    path = tmp_path / "out.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": 1, "loss": float("nan")})
    assert read_json(path) == {"old": 1}
    assert names(tmp_path) == ["out.json"]


def test_new_file_appears_at_the_end_only(tmp_path: Path) -> None:
    """A reader sees the old file or the whole new one."""
    path = tmp_path / "sub" / "out.jsonl"
    with atomic_write(path) as file:
        file.write("{}\n")
        assert not path.exists()
    assert path.read_text() == "{}\n"


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    """A place that cannot be written is one clear line."""
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match=r"data/out\.json: cannot be written"):
        write_json(tmp_path / "data" / "out.json", {})


def test_damaged_json(tmp_path: Path) -> None:
    """A damaged metrics file says what to do."""
    (tmp_path / "m.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"m\.json: damaged JSON .*; delete it"):
        read_json(tmp_path / "m.json")


def test_full_disk_is_one_line(tmp_path: Path) -> None:
    """A journal that can no longer be written says so, by whichever call finds out."""
    path = tmp_path / "j.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))  # the nearest thing to a disk that fills up
    try:
        with (
            pytest.raises(UserError, match=r"j\.jsonl: cannot be written \(.*free some room"),
            Journal(path) as full,
        ):
            for n in range(1000):
                full.add({"id": f"q{n}", "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept, damaged = reopened(path)
    assert len(kept) > 20 and damaged == 0
    assert [row["id"] for row in kept] == [f"q{n}" for n in range(len(kept))]


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    """A file where a folder should be."""
    (tmp_path / "work").write_text("")
    with pytest.raises(UserError, match=r"j\.jsonl: cannot be written"):
        Journal(tmp_path / "work" / "j.jsonl")


# ---- journal -----------------------------------------------------------------------------------------


def filled(path: Path, count: int = 5) -> list[dict[str, object]]:
    journal = Journal(path)
    rows: list[dict[str, object]] = [
        {"id": f"q{i}", "text": "ünï\n", "logprob": -0.1 * i} for i in range(count)
    ]
    for row in rows:
        journal.add(row)
    journal.close()
    return rows


def reopened(path: Path) -> tuple[list[dict[str, object]], int]:
    journal = Journal(path)
    journal.close()
    return list(journal.records.values()), journal.damaged


def test_journal_gives_back_what_was_added(tmp_path: Path) -> None:
    """Nothing changes on the way, and more can be added after reopening."""
    path = tmp_path / "work" / "j.jsonl"
    rows = filled(path)
    assert reopened(path) == (rows, 0)
    journal = Journal(path)
    journal.add({"id": "new"})
    journal.close()
    assert reopened(path) == ([*rows, {"id": "new"}], 0)


def test_torn_last_line_is_dropped(tmp_path: Path) -> None:
    """A kill in the middle of a write, at any byte of the last line: that record alone is done again."""
    path = tmp_path / "j.jsonl"
    rows = filled(path, 3)
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        assert reopened(path) == (rows[:2], 0)
        assert path.read_bytes() == whole[:start]
    assert names(tmp_path) == ["j.jsonl", "j.jsonl.lock"]


def test_flipped_byte_is_set_aside(tmp_path: Path) -> None:
    """Any byte of a line, flipped: the record is set aside, counted, and not believed."""
    path = tmp_path / "j.jsonl"
    rows = filled(path, 3)
    whole = path.read_bytes()
    first = whole.find(b"\n")
    second = whole.find(b"\n", first + 1)
    for place in range(first + 1, second):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        kept, damaged = reopened(path)
        assert kept == [rows[0], rows[2]], place
        assert damaged >= 1
        assert path.read_bytes() == whole[: first + 1] + whole[second + 1 :]
    aside = (tmp_path / "j.jsonl.damaged").read_bytes()
    assert aside.count(b"\n") >= second - first - 1


def test_damaged_record_is_done_again(tmp_path: Path) -> None:
    """After a repair the journal holds every record once more."""
    path = tmp_path / "j.jsonl"
    rows = filled(path)
    path.write_bytes(path.read_bytes().replace(b"-0.2", b"-0.7"))
    journal = Journal(path)
    assert journal.damaged == 1 and "q2" not in journal.records
    journal.add(rows[2])
    journal.close()
    kept, damaged = reopened(path)
    assert sorted(kept, key=lambda row: str(row["id"])) == rows and damaged == 0


def test_first_record_of_a_key_wins(tmp_path: Path) -> None:
    """A record written twice by an interrupted resume counts once."""
    path = tmp_path / "j.jsonl"
    filled(path, 1)
    path.write_bytes(path.read_bytes() * 2)
    assert len(reopened(path)[0]) == 1


def test_two_writers_are_refused(tmp_path: Path) -> None:
    """One writer per file; the second one is told, and the first one's records stay."""
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.add({"id": "a"})
    with pytest.raises(UserError, match="another run is writing it"):
        Journal(path)
    journal.close()
    assert reopened(path) == ([{"id": "a"}], 0)


def test_other_key(tmp_path: Path) -> None:
    """A record without the key is damage, not a crash."""
    path = tmp_path / "j.jsonl"
    filled(path, 2)
    journal = Journal(path, key="text")
    journal.close()
    assert list(journal.records) == ["ünï\n"] and journal.damaged == 0
    journal = Journal(path, key="step")
    journal.close()
    assert journal.records == {} and journal.damaged == 2
