"""Files are read with clear errors, and written whole or not at all."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.run.errors import UserError
from stages.run.files import (
    atomic_folder,
    atomic_write,
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
    """The message has file, line and field. Blank lines count, so that an editor finds the line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "x", "tokens": null}\n\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        list(read_jsonl(path, {"id": str, "tokens": (int, type(None))}))
    assert str(error.value).startswith(f"{path}:{words}")


def test_nan_and_infinity_are_null(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": NaN, "b": [-Infinity, 1.5]}\n')
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [{"a": None, "b": [None, 1.5]}]


def test_gzip_is_unpacked_and_a_damaged_one_named(tmp_path: Path) -> None:
    """Known by its first bytes. Cut short, its whole lines are read before the error."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n'))
    assert list(read_numbered_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"a\.jsonl: damaged gzip after line 3 \(.*\); compress it anew"):
        list(read_numbered_jsonl(path))


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A wrong path is one clear line."""
    with pytest.raises(UserError, match=r"no\.jsonl: cannot be read \(No such file"):
        list(read_jsonl(tmp_path / "no.jsonl"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(rows=st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=4))
def test_what_is_written_is_read_back(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    """One record a line, with any characters, and floats in full."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows)
    assert path.read_bytes().count(b"\n") == len(rows)
    assert list(read_jsonl(path)) == rows


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_old_file_survives_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    """NaN, which JSON does not have, is found in the middle of writing. No temporary file is left."""
    path = tmp_path / "sub" / "out.json"
    write_json(path, {"old": 1})
    with pytest.raises(error):
        if error is ValueError:
            write_json(path, {"a": 1, "loss": float("nan")})
        else:
            with atomic_write(path) as file:
                file.write("half")
                raise KeyboardInterrupt
    assert read_json(path) == {"old": 1}
    assert names(path.parent) == ["out.json"]


def test_a_folder_is_replaced_wholly_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "some"
    with atomic_folder(target) as fresh:
        (fresh / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as fresh:
        (fresh / "b").write_text("half")
        raise KeyboardInterrupt
    assert names(target) == ["a"]
    with atomic_folder(target) as fresh:
        (fresh / "c").write_text("new")
    assert names(target) == ["c"]
    assert names(target.parent) == ["some"]  # no temporary folder is left


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    """A place that cannot be written is one clear line."""
    (tmp_path / "data").write_text("")
    with pytest.raises(UserError, match=r"data/out\.json: cannot be written"):
        write_json(tmp_path / "data" / "out.json", {})


def test_damaged_json(tmp_path: Path) -> None:
    """A damaged metrics file says what to do."""
    (tmp_path / "m.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"m\.json: damaged JSON .*; delete it"):
        read_json(tmp_path / "m.json")
