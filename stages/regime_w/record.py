"""Records of rollouts, from this pipeline or from elsewhere: every field is typed here, before anything uses it.

    for question in read_questions(path): ...  # data/rollouts/; with `scored`, data/regime_w_rollouts/

What means the same becomes the same: an id is text (5 becomes "5"), "30" and 30.0 are the number 30, a list of token
ids is their number, 1 is true. Anything else is refused. A null says nothing: the field counts as absent, except where
null is a value. Fields that are not named here stay as they are.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from stages.regime_w.signals import SIGNALS
from stages.run.errors import UserError
from stages.run.files import read_numbered_jsonl

Row = dict[str, Any]
Kind = Callable[[Any], Any]  # the value as it is used; raises ValueError saying what is wanted
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


# ---- Kinds of values ---------------------------------------------------------------------------------


def text(value: Any) -> str:
    """Text that can be written in UTF-8."""
    if not isinstance(value, str):
        raise ValueError("text")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise ValueError("text without half a character (a lone surrogate)")
    return value


def number(value: Any) -> int | float:
    """A finite number, or one written as text."""
    wanted = ValueError("a number")
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise wanted
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wanted
    if abs(value) > sys.float_info.max:
        raise ValueError("a finite number")
    return value


def whole(value: Any) -> int:
    """A whole number, also written as text or with a fraction of 0."""
    if type(value) is int:  # not a bool
        return value
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal() and len(value) < 400:
        return int(value)  # every digit of a long one, such as a seed
    try:
        made = number(value)
    except ValueError:
        raise ValueError("a whole number") from None
    if made != int(made):
        raise ValueError("a whole number")
    return int(made)


def count(value: Any) -> int:
    """How many tokens: a whole number of 0 or more, or the tokens themselves in a list of ids or of texts."""
    if isinstance(value, list) and (
        all(type(one) is int for one in value) or all(isinstance(one, str) for one in value)
    ):
        return len(value)
    try:
        made = whole(value)
    except ValueError:
        made = -1
    if not 0 <= made < 2**53:
        raise ValueError("a number of tokens, or the list of their ids")
    return made


def name(value: Any) -> str:
    """An id or a name: text, or a whole number, which becomes text."""
    if isinstance(value, str):
        return text(value)
    try:
        return str(whole(value))
    except ValueError:
        raise ValueError("text or a whole number") from None


def answer(value: Any) -> str:
    """A number as it is written in an answer, or anything else that was answered, as text."""
    if isinstance(value, str):
        return text(value)
    try:
        made = number(value)
    except ValueError:
        raise ValueError("text or a number") from None
    return str(int(made) if made == int(made) else made)


def gold(value: Any) -> str | int | float:
    """What a right answer is read from: text or a number, as it stands."""
    answer(value)
    return value


def flag(value: Any) -> bool:
    """True or false, also written as 1 and 0."""
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise ValueError("true or false (or 1 or 0)")


def rows(value: Any) -> list[Any]:
    """A list; what stands in it is typed apart."""
    if not isinstance(value, list):
        raise ValueError("a list of objects")
    return value


# ---- Fields ------------------------------------------------------------------------------------------

Kinds = dict[str, Kind]
QUESTION: Kinds = {
    "id": name, "question": text, "gold": gold, "solution": text, "planted": flag, "trajectories": rows,
}  # fmt: skip
TRAJECTORY: Kinds = {
    "id": name, "arm": name, "style": name, "text": text, "tokens": count, "logprob": number, "finish": text,
    "seed": whole, "temperature": number, "top_p": number, "propensity": number, "uniform": flag,
}  # fmt: skip
# What `coherence` adds. It writes this anew, so it does not look at what an earlier scoring left.
QUESTION_SCORES: Kinds = {
    **dict.fromkeys((*SIGNALS, "suspicion"), number),
    **{"suspect": flag, "suspect_answer": answer},
}
TRAJECTORY_SCORES: Kinds = {
    **{"answer": answer, "correct": flag, "fault": text, "soundness": text},
    **dict.fromkeys((*SIGNALS, "reward"), number),
}
NULL_IS_A_VALUE = ("answer", "fault", "soundness", "suspect_answer")


def shown(value: Any) -> str:
    """A value as it stands in the file, in one line, cut."""
    return f"{json.dumps(value, ensure_ascii=False):.60}"


def typed(row: Any, kinds: Kinds, where: str, needed: Collection[str] = ()) -> Row:
    """The row with its fields as `kinds` reads them; those `needed` must be there.

    Raises UserError, beginning with `where`, that names the field, what was found and what is wanted.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: an object is wanted, found {shown(row)}")
    for key in needed:
        if key not in row:
            found = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{where}: field '{key}' is missing; fields found: {found}")
    made: Row = {}
    for key, value in row.items():
        kind = kinds.get(key)
        if value is None and kind and key not in needed:
            if key in NULL_IS_A_VALUE:
                made[key] = None
            continue
        try:
            made[key] = kind(value) if kind else value
        except ValueError as error:
            raise UserError(f"{where}: field '{key}' must be {error}, found {shown(value)}") from None
    return made


# ---- Files -------------------------------------------------------------------------------------------


def read_questions(path: Path, scored: bool = False) -> Iterator[Row]:
    """Yield the questions of a file of rollouts, typed; each trajectory has an id, by default `<question id>/<place>`.

    With `scored`, what `coherence` adds is typed too, where it is there. Raises UserError with file, line, question,
    trajectory and field for a value that cannot be used; also when two questions, or two trajectories of one question,
    have the same id.
    """
    of_question, of_trajectory = QUESTION, TRAJECTORY
    needed = ["id", "question", "trajectories"]
    if scored:
        of_question, of_trajectory = QUESTION | QUESTION_SCORES, TRAJECTORY | TRAJECTORY_SCORES
    else:
        needed.insert(2, "gold")
    lines: dict[str, int] = {}
    for line, record in read_numbered_jsonl(path):
        where = f"{path}:{line}" + (f": question {record['id']!r:.60}" if "id" in record else "")
        question = typed(record, of_question, where, needed)
        if question["id"] in lines:
            raise same_id(path, lines[question["id"]], line, question["id"])
        lines[question["id"]] = line
        trajectories: dict[str, Row] = {}
        for place, row in enumerate(question["trajectories"]):
            own = f"{where}, trajectory {place}"
            made = {"id": f"{question['id']}/{place}", **typed(row, of_trajectory, own, ("text",))}
            if trajectories.setdefault(made["id"], made) is not made:
                raise UserError(f"{own}: an earlier one has the same id {made['id']!r}; each needs its own")
        question["trajectories"] = list(trajectories.values())
        yield question


def same_id(path: Path, first: int, second: int, key: str) -> UserError:
    """What is said of a question, or a pair, that is there twice."""
    return UserError(f"{path}: lines {first} and {second} have the same id {key!r}; each may be there once")
