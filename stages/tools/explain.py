"""`python -m stages explain QUESTION_ID`: all that led to the scores of one question's trajectories.

    e1 3*4=12      what was read of a trajectory: 12 comes from the question's numbers m1 and m2,
       m1*m2       10 from e1 and m3; `<` marks the equation with the answer
    e2 12-2=10 <
       e1-m3
    m1 3→4  14 MG  with m1 one larger it would have answered 14, as most trajectories and the gold do

Signals, verdicts and rewards are those of the scored file, which a private scorer may have made; equations,
links and counterfactuals are read here. Trajectories in which everything shown is the same share a column.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from fractions import Fraction
from heapq import nlargest
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.coherence import FIELDS, SIGNALS, gold_trace, read_views
from stages.core.answers import canonical, gold_answer, read_answer, same_answer
from stages.core.errors import UserError
from stages.core.params import Params, load_params
from stages.core.records import Fields, read_json, read_jsonl
from stages.core.stage import manifest_path
from stages.preference import KINDS, TRAJECTORY_FIELDS, make_pairs
from stages.regime_w.reward import RewardParams, reward_parts
from stages.regime_w.signals import CONSTANT, Trace, analyse_group
from stages.regime_w.solution import Equation, Number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

ROLLOUTS = Path("data/regime_w_rollouts.jsonl")
PAIRS = Path("data/coherence_preferences.jsonl")
NUMBER = (int, float)
PAIR_FIELDS: Fields = {"question_id": str, "kind": str, "chosen_id": str, "rejected_id": str}
# What a file from elsewhere may lack, but not have of another type.
OF_PAIR: Fields = {"margin": NUMBER, "chosen_tokens": int, "rejected_tokens": int}
OF_QUESTION: Fields = {**dict.fromkeys((*SIGNALS, "suspicion"), NUMBER), "suspect_answer": str}
OF_TRAJECTORY: Fields = {
    **{"answer": str, "correct": bool, "soundness": str, "reward": NUMBER, "tokens": int},
    **dict.fromkeys(SIGNALS, NUMBER),
}
PARTS = ("correct", "coherence", "consensus", "length")
REFUSED = {
    "truncated": "the better one was cut off",
    "leaking": "the better one goes on into another problem",
    "empty": "the better one is empty",
    "answerless": "the better one states no answer",
    "not_sound": "the better one is not sound",
    "suspect": "the gold is suspect",
    "identical": "the same text",
    "margin": "rewards too close",
    "repeated": "the same two texts paired already",
    "trajectory_limit": "one of them in enough pairs already",
    "question_limit": "enough pairs from this question",
}
LABELS = (11, 18)  # width of the row labels, at least and at most
WIDEST, READABLE = 34, 31  # width of a trajectory's column at most, and at least where its text is shown


def main(
    question_id: str,
    rollouts: Path = ROLLOUTS,
    pairs: Path | None = None,
    text: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Print one question of a scored file; `text` shows the trajectories' texts too.

    Raises UserError when there is no such question, or a file cannot be used.
    """
    picture = explain(find_question(rollouts, question_id), rollouts, pairs, load_params())
    if as_json:
        json.dump(picture, sys.stdout, ensure_ascii=False, indent=2)
        print()
        return
    from rich.console import Console

    show(picture, console or Console(highlight=False), text)


def find_question(path: Path, question_id: str) -> dict[str, Any]:
    """The record of one question. Raises UserError, with the nearest ids, when there is none."""
    ids = []
    for record in read_jsonl(path, FIELDS):
        if record["id"] == question_id:
            return record
        ids.append(record["id"])
    if not ids:
        raise UserError(f"{path}: holds no questions; run `dvc repro coherence`")
    near = nlargest(
        3, ids, lambda name: (name.endswith(question_id), SequenceMatcher(None, name, question_id).ratio())
    )
    raise UserError(f"{path}: no question '{question_id}'; the nearest ids are {', '.join(near)}")


# ---- what there is to show ---------------------------------------------------------------------------


def explain(record: dict[str, Any], rollouts: Path, pairs: Path | None, params: Params) -> dict[str, Any]:
    """Everything about one question as plain data; numbers are exact, written as answers are."""
    name, question, rows = record["id"], record["question"], record["trajectories"]
    gold = gold_answer(str(record["gold"]))
    if gold is None:
        raise UserError(f"{rollouts}: question '{name}': its gold {record['gold']!r:.60} is no number")
    try:
        views = read_views(name, question, rows)
    except UserError as error:
        raise UserError(f"{rollouts}: {error}") from None
    check_optional(record, OF_QUESTION, f"{rollouts}: question '{name}'")
    for index, row in enumerate(rows):
        check_optional(row, OF_TRAJECTORY, f"{rollouts}: question '{name}': trajectory {index}")
    analysis = analyse_group(question, views)
    golds = gold_trace(record.get("solution"), analysis.numbers)
    majority = majorities(analysis.traces)
    weights, source = reward_params(rollouts, params)
    trajectories = []
    for index, (row, trace) in enumerate(zip(rows, analysis.traces, strict=True)):
        reading = read_answer(row["text"], question)
        shown: dict[str, Any] = {key: row.get(key) for key in ("arm", "style")}
        answer = row.get("answer", trace.answer)
        shown |= {"answer": answer, "correct": row.get("correct", same_answer(answer, gold))}
        shown |= {"soundness": row.get("soundness"), **{key: row.get(key) for key in SIGNALS}}
        shown |= {"reward": row.get("reward"), "reward_parts": parts_of(row, record, weights)}
        shown |= {key: row.get(key) for key in ("finish", "tokens", "logprob")}
        shown |= {**trace_rows(trace, majority, golds), "text": row["text"]}
        shown["read"] = [reading.start, reading.end]
        trajectories.append({"id": str(row.get("id") or f"{name}/{index}"), **shown})
    doubt: dict[str, Any] = {
        key: record[key] for key in ("suspicion", "suspect_answer", "planted") if key in record
    }
    return {
        "id": name,
        "question": question,
        "numbers": {f"m{place}": canonical(number) for place, number in enumerate(analysis.numbers, 1)},
        "gold": {
            "answer": gold,
            "solution": record.get("solution"),
            **(trace_rows(golds, majority, golds) if golds else {}),
        },
        "signals": {key: record.get(key) for key in SIGNALS},
        **doubt,
        "reward_params_from": source,
        "trajectories": trajectories,
        **pairs_of(record, trajectories, rollouts, pairs, params),
    }


def check_optional(record: dict[str, Any], fields: Fields, where: str) -> None:
    """Raises UserError when a field that may be absent (or null) is there and of another type."""
    for key, kind in fields.items():
        value = record.get(key)
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            wanted = {NUMBER: "a number", int: "a whole number", bool: "true or false", dict: "an object"}
            raise UserError(f"{where}: field '{key}' must be {wanted.get(kind, 'text')}, found {value!r:.60}")


def reward_params(rollouts: Path, params: Params) -> tuple[RewardParams, str]:
    """The reward's parameters the file was made with, from its manifest, else those of params.yaml."""
    manifest = manifest_path(rollouts)
    if manifest.is_file():
        try:
            return RewardParams(**read_json(manifest)["params"]["regime_w"]["reward"]), str(manifest)
        except (KeyError, TypeError):
            pass  # the manifest of something else
    return RewardParams(**params.regime_w.reward.model_dump()), "params.yaml"


def parts_of(row: dict[str, Any], record: dict[str, Any], params: RewardParams) -> dict[str, float] | None:
    """What the file's reward is the sum of; `other` is what the parameters do not explain. None if unscored."""
    needed = (row.get("s_wm"), record.get("s_wm"), record.get("s_end"), row.get("reward"), row.get("correct"))
    if None in needed:
        return None
    s_wm, mean, s_end, value, correct = needed
    parts = reward_parts(correct, s_wm, mean, s_end, row.get("tokens"), params)  # type: ignore[arg-type]
    other = float(value) - parts.total  # type: ignore[arg-type]
    named = {name: getattr(parts, name) for name in PARTS}
    return named | ({"other": other} if abs(other) > 1e-9 else {})


def majorities(traces: Sequence[Trace]) -> list[set[Number]]:
    """For each changed number the answers most trajectories move to; empty where no two agree."""
    found = []
    for column in zip(*(trace.counterfactuals for trace in traces), strict=True):
        counts = Counter(value for value in column if value is not None)
        most = max(counts.values(), default=0)
        found.append({value for value, count in counts.items() if count == most} if most > 1 else set())
    return found


def trace_rows(trace: Trace, majority: Sequence[set[Number]], golds: Trace | None) -> dict[str, Any]:
    """Equations, links, carrier and counterfactuals of one text, as plain data."""
    equations = []
    for index, (equation, row) in enumerate(zip(trace.solution.equations, trace.links, strict=True)):
        numbers = [canonical(operand.printed) + "%" * operand.percent for operand in equation.operands]
        sources = [source_name(source) for source in row]
        linked = [
            number if source is None else source + "%" * (operand.percent and source.startswith("m"))
            for number, source, operand in zip(numbers, sources, equation.operands, strict=True)
        ]
        computed = None if equation.computed is None else canonical(equation.computed)
        equations.append(
            {
                "name": f"e{index + 1}",
                "written": f"{infix(equation, numbers)}={canonical(equation.value)}",
                "linked": infix(equation, linked),
                "sources": sources,
                "holds": equation.holds,
                "computed": computed,
            }
        )
    moves = []
    for place, value in enumerate(trace.counterfactuals):
        of_gold = None if golds is None else golds.counterfactuals[place]
        moves.append(
            {
                "value": None if value is None else canonical(value),
                "stays": value is not None and canonical(value) == trace.answer,
                "majority": value is not None and bool(majority) and value in majority[place],
                "gold": value is not None and value == of_gold,
            }
        )
    return {
        "equations": equations,
        "skipped": trace.solution.skipped,
        "carrier": None if trace.carrier is None else f"e{trace.carrier + 1}",
        "counterfactuals": moves,
    }


def source_name(source: int) -> str | None:
    """Where an operand comes from: 'e2' (an equation), 'm1' (a number of the question), None (a constant)."""
    if source == CONSTANT:
        return None
    return f"e{source + 1}" if source >= 0 else f"m{-1 - source}"


def infix(equation: Equation, names: Sequence[str]) -> str:
    """The expression with the given names for its operands, and no more parentheses than it needs."""
    stack: list[tuple[str, int]] = []
    for step in equation.program:
        if isinstance(step, int):
            stack.append((names[step], 3))
            continue
        right, strength = stack.pop()
        if step == "neg":
            stack.append((f"-({right})" if strength < 3 else f"-{right}", 0))
            continue
        left, left_strength = stack.pop()
        own = 1 if step in "+-" else 2
        if left_strength < own and not (left_strength == 0 and own == 1):
            left = f"({left})"
        if strength < own or (strength == own and step in "-/"):
            right = f"({right})"
        stack.append((f"{left}{step}{right}", own))
    return stack[0][0]


def pairs_of(
    record: dict[str, Any],
    trajectories: list[dict[str, Any]],
    rollouts: Path,
    path: Path | None,
    params: Params,
) -> dict[str, Any]:
    """The pairs the question gave according to the pairs file, and, per kind, why candidates gave none.

    Without a file (none named, and the trajectories are not the pipeline's own) they are made by params.yaml.
    """
    if path is None and rollouts == ROLLOUTS and PAIRS.is_file():
        path = PAIRS
    found: list[dict[str, Any]] | None = None
    if path is not None:
        found = [pair for pair in read_jsonl(path, PAIR_FIELDS) if pair["question_id"] == record["id"]]
        for pair in found:
            check_optional(pair, OF_PAIR, f"{path}: pair {pair['chosen_id']} > {pair['rejected_id']}")
    candidates = None
    rows = [{**row, "id": t["id"]} for row, t in zip(record["trajectories"], trajectories, strict=True)]
    if all(isinstance(row.get(key), kind) for row in rows for key, kind in TRAJECTORY_FIELDS.items()):  # type: ignore[arg-type]
        one = params.preference.model_copy(update={"length_balance": False})  # that one is over all questions
        made, summary = make_pairs(iter([{**record, "trajectories": rows}]), one)
        found = made if path is None else found
        candidates = {
            kind: {
                "made": summary[kind]["pairs"],
                "refused": {reason: count for reason, count in summary[kind]["refused"].items() if count},
            }
            for kind in KINDS
            if getattr(params.preference, kind).per_question
        }
    wanted = ("kind", "chosen_id", "rejected_id", *OF_PAIR)
    return {
        "pairs_from": "params.yaml" if path is None else str(path),
        "pairs": None if found is None else [{key: pair.get(key) for key in wanted} for pair in found],
        "candidates": candidates,
    }


# ---- showing it --------------------------------------------------------------------------------------


def show(picture: dict[str, Any], console: Console, text: bool = False) -> None:
    """Print what `explain` found; fits the console's width."""
    from rich.text import Text

    rows = picture["trajectories"]
    right = sum(bool(row["correct"]) for row in rows)
    line = Text.assemble(
        (picture["id"], "bold"), f"  gold {picture['gold']['answer']}, {right} of {len(rows)} right"
    )
    if any(value is not None for value in picture["signals"].values()):
        line.append("; means " + "  ".join(f"{k} {_three(v)}" for k, v in picture["signals"].items()))
    console.print(line)
    if picture.get("suspicion"):
        console.print(
            Text(
                f"suspicion {_three(picture['suspicion'])}: they agree on {picture['suspect_answer']}",
                "yellow",
            )
        )
    console.print(Text(picture["question"]), style="italic")
    numbers = [f"{name} = {value}" for name, value in picture["numbers"].items()]
    console.print(Text(", ".join(numbers) or "no number in digits: nothing to change"))

    columns = _columns(picture, text)
    labels = max((len(label) for cells in columns for label in cells), default=0)
    labels = min(max(labels, LABELS[0]), LABELS[1])
    room = console.width - labels - 2
    width = min(max(map(_widest, columns), default=0), WIDEST)
    width = min(max(width, READABLE if text else 0), room - 2)
    per_row = max(1, room // (width + 2))
    tables = max(1, -(-len(columns) // per_row))
    for start, end in pairwise(-(-len(columns) * place // tables) for place in range(tables + 1)):
        _print_columns(columns[start:end], labels, width, console)
    _print_legend(picture, console)
    _print_pairs(picture, console)


Cells = dict[str, list["Text"]]  # of one column: the lines for each row label


def _columns(picture: dict[str, Any], text: bool) -> list[Cells]:
    """The gold's column, if it has a solution, and one for each group of like trajectories."""
    from rich.text import Text

    prefix = f"{picture['id']}/"
    columns = []
    if "equations" in picture["gold"]:
        gold = picture["gold"]
        cells: Cells = {"": [Text("gold", "bold")], "answer": [Text(gold["answer"])]}
        cells |= _trace_cells(gold, picture["numbers"], of_gold=True)
        columns.append(cells | ({"text": [Text(gold["solution"])]} if text else {}))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in picture["trajectories"]:
        alike = {key: value for key, value in row.items() if key not in ("id", "arm", "style", "logprob")}
        groups.setdefault(json.dumps(alike), []).append(row)
    for group in groups.values():
        row = group[0]
        cells = {"": [Text(" ".join(one["id"].removeprefix(prefix) for one in group), "bold")]}
        arms = " ".join(dict.fromkeys(str(one["arm"]) for one in group if one["arm"] is not None))
        cells["arm"] = [Text(arms)]
        mark, style = ("✓", "green") if row["correct"] else ("✗", "red")
        cells["answer"] = [Text(f"{'none' if row['answer'] is None else row['answer']} {mark}", style)]
        cells |= _trace_cells(row, picture["numbers"])
        for name in SIGNALS:
            cells[name] = [Text(_three(row[name]))]
        cells["reward"] = [Text(_three(row["reward"]), "bold")]
        for name, value in (row["reward_parts"] or {}).items():
            cells[f"  {name}"] = [Text(f"{value:+.3f}", "dim" if not value else "")]
        cells["soundness"] = [Text(row["soundness"] or "–")]
        finish = "–" if row["finish"] is None else str(row["finish"])
        cells["finish"] = [Text(finish, "red" if finish == "length" else "")]
        cells["tokens"] = [Text("–" if row["tokens"] is None else f"{row['tokens']:,}")]
        start, end = row["read"]
        unread = ((row["text"][:start], "before"), (row["text"][end:], "after"))
        if words := [f"{len(part):,} characters {where}" for part, where in unread if part.strip()]:
            cells["not read"] = [Text(", ".join(words), "yellow")]
        if text:
            whole = Text(row["text"])
            whole.stylize("dim", 0, start)
            whole.stylize("dim", end)
            cells["text"] = [whole]
        columns.append(cells)
    return columns


def _trace_cells(row: dict[str, Any], numbers: dict[str, str], of_gold: bool = False) -> Cells:
    """The rows of what was read of one text."""
    from rich.text import Text

    lines = []
    for equation in row["equations"]:
        line = Text.assemble((f"{equation['name']} ", "cyan"), equation["written"])
        if not equation["holds"]:
            line.append(f" ✗ {equation['computed'] or 'division by 0'}", "red")
        if equation["name"] == row["carrier"]:
            line.append(" <", "bold")
        lines += [line, Text(" " * (len(equation["name"]) + 1) + equation["linked"], "dim")]
    if row["skipped"]:
        lines.append(Text(f"{row['skipped']} not readable", "yellow"))
    cells: Cells = {"equations": lines or [Text("none", "yellow")]}
    cells["answer by"] = [Text(row["carrier"] or "no equation", "" if row["carrier"] else "yellow")]
    labels = [f"{name} {value}→{_one_more(value)}" for name, value in numbers.items()] or ["unchanged"]
    for label, move in zip(labels, row["counterfactuals"], strict=True):
        if move["value"] is None:
            cells[label] = [Text("?", "yellow")]
            continue
        cell = Text(move["value"] + (" stays" if move["stays"] and numbers else ""))
        marks = "M" * move["majority"] + "G" * (move["gold"] and not of_gold)
        cell.append(f" {marks}" if marks else "", "bold cyan")
        cells[label] = [cell]
    return cells


def _one_more(value: str) -> str:
    return canonical(Fraction(value) + 1)


def _widest(cells: Cells) -> int:
    """Terminal columns the longest line wants, apart from prose; arms wrap between words."""
    arms = (word for line in cells.get("arm", []) for word in line.plain.split())
    lines = (
        line for label, group in cells.items() if label not in ("arm", "not read", "text") for line in group
    )
    return max(*map(len, arms), *(line.cell_len for line in lines), 0)


def _print_columns(columns: list[Cells], labels_width: int, width: int, console: Console) -> None:
    """One table; the rows are those any of its columns has, in the order they come."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    labels = list(dict.fromkeys(label for cells in reversed(columns) for label in cells))[1:]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", width=labels_width, style="dim")
    for cells in columns:
        table.add_column(cells[""][0], width=width, overflow="fold")
    for label in labels:
        if label in ("equations", "answer by", "s_end", "reward", "soundness", "text"):
            table.add_section()
        table.add_row(Text(label), *(Text("\n").join(cells.get(label, [])) for cells in columns))
    console.print(table)


def _print_legend(picture: dict[str, Any], console: Console) -> None:
    """What the marks mean, and what is wrong with the scores."""
    from rich.text import Text

    unscored = all(row["reward"] is None for row in picture["trajectories"])
    console.print(
        "e1 an equation, below it where its numbers come from: m1 the question's, e1 an earlier result, else a "
        "constant. < carries the answer, ✗ does not hold (its true value). m1 3→4: the answer if m1 were one "
        "larger; M as the majority's, G as the gold's, ? undefined.",
        style="dim",
    )
    if unscored:
        console.print(
            "No signals and rewards: score the file with `python -m stages coherence`.", style="yellow"
        )
    elif any("other" in (row["reward_parts"] or {}) for row in picture["trajectories"]):
        source = picture["reward_params_from"]
        words = f"other: what the parameters in {source} do not explain; the file was made with others."
        console.print(Text(words), style="yellow")


def _print_pairs(picture: dict[str, Any], console: Console) -> None:
    """The pairs the question gave, and why not more."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    pairs, prefix = picture["pairs"], f"{picture['id']}/"
    made_here = picture["pairs_from"] == "params.yaml"
    if pairs is None:
        console.print("\nPairs need `correct` and `reward` on each trajectory", style="bold")
    elif not pairs:
        console.print("\nNo pairs from this question", style="bold")
    else:
        words = f"{len(pairs)} pair{'s' * (len(pairs) > 1)} from this question"
        console.print(f"\n{words}{', as params.yaml would have it' * made_here}", style="bold")
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in ("kind", "chosen > rejected", "margin", "tokens"):
            table.add_column(name, justify="left" if name in ("kind", "chosen > rejected") else "right")
        for pair in pairs:
            ids = [pair[key].removeprefix(prefix) for key in ("chosen_id", "rejected_id")]
            tokens = [
                "–" if pair[key] is None else str(pair[key]) for key in ("chosen_tokens", "rejected_tokens")
            ]
            table.add_row(
                Text(pair["kind"]), Text(" > ".join(ids)), _three(pair["margin"]), " > ".join(tokens)
            )
        console.print(table)
    for line in pair_words(picture):
        console.print(Text(line))


def pair_words(picture: dict[str, Any]) -> Iterator[str]:
    """Why candidates gave no pair, a line per kind."""
    rows, pairs = picture["trajectories"], picture["pairs"]
    for kind, count in (picture["candidates"] or {}).items():
        right = sum(row["correct"] for row in rows)
        if kind == "correctness" and right in (0, len(rows)):
            words = "all trajectories are " + ("right" if right else "wrong")
        elif kind == "coherence" and right < 2:
            words = "fewer than two trajectories are right"
        else:
            words = ", ".join(
                f"{REFUSED.get(reason, reason)} ({n})" for reason, n in count["refused"].items()
            )
        made = sum(pair["kind"] == kind for pair in pairs or [])
        if pairs is not None and made != count["made"]:
            words += (", " if words else "") + (
                f"params.yaml would give {count['made']} (length_balance, or other parameters then)"
            )
        if words:
            yield f"{kind}, not made: {words}"


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
