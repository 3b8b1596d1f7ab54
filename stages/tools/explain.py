"""`python -m stages explain QUESTION_ID`: all that led to the scores of one question's trajectories.

Signals, verdicts and rewards are those of the scored file, which a private scorer may have made; equations,
links and counterfactuals are read here. Trajectories in which everything shown is the same share a column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from textwrap import wrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.regime_w.pairs import KINDS, make_pairs
from stages.regime_w.record import read_questions
from stages.regime_w.reward import reward_parts
from stages.regime_w.scorer import read_gold, read_gold_answer, solution_views
from stages.regime_w.signals import CONSTANT, SIGNALS, GroupAnalysis, Reasoning, analyse_group
from stages.regime_w.solution import Equation, Number
from stages.run.errors import UserError
from stages.run.params import Params, Preference, Reward, load_params
from stages.run.paths import LAST_ROUND, RoundPaths
from stages.text.answers import Reading, canonical, read_answer, same_answer
from stages.tools.show import Row, cell, nearest, new_console, new_table, print_json, verdict

LEGEND = (
    "e1 an equation, below it where its numbers come from: m1 the question's, e1 an earlier result, else a "
    "constant. < carries the answer, ✗ does not hold (its true value). m1 3→4: the answer if m1 were one "
    "larger; M as the majority's, G as the gold's, ? undefined."
)
SECTIONS = ("equations", "answer by", "s_end", "reward", "soundness", "text")  # rows with a line above them
WIDEST = 34  # terminal columns of a trajectory, at most


def main(question_id: str, rollouts: Path | None = None, text: bool = False, as_json: bool = False) -> None:
    """Print one question of a scored file; `text` shows the trajectories' texts too.

    Without a file it is that of the last round that asked the question. Raises UserError when there is no such
    question, or a file cannot be used.
    """
    params = load_params()
    last_first = [RoundPaths(name).scored for name in reversed(params.chain)]
    paths = [rollouts] if rollouts else [path for path in last_first if path.is_file()] or last_first[:1]
    path, record = find_question(paths, question_id)
    picture = explain(record, path, params)
    if as_json:
        print_json(picture)
    else:
        show(picture, new_console(), text)


def find_question(paths: Sequence[Path], name: str) -> tuple[Path, Row]:
    """The question with this id, and the first of the files that has it; a file is read whole, as to make pairs.

    Raises UserError for a file that cannot be used, and, with the nearest ids, when none has such a question.
    """
    ids = []
    for path in paths:
        found = None
        for record in read_questions(path, scored=True):
            ids.append(record["id"])
            if record["id"] == name:
                found = record
        if found is not None:
            return path, found
    raise UserError(f"{', '.join(map(str, paths))}: no question '{name}'" + nearest(name, ids))


# ---- what there is to show ---------------------------------------------------------------------------


def explain(record: Row, rollouts: Path, params: Params) -> Row:
    """Everything about one question as plain data. Numbers are exact and written as answers are: '18', '1/3'.

    Pairs are those of the round whose file `rollouts` is; of the last one for any other file.
    """
    own = next((name for name in params.rounds if RoundPaths(name).scored == rollouts), LAST_ROUND)
    gold, readings, group, golds = read_question(rollouts, record)
    majority = list(majorities(group.reasonings))
    trajectories = []
    for index, (row, reading) in enumerate(zip(record["trajectories"], readings, strict=True)):
        answer = row.get("answer", reading.answer)
        trajectories.append(
            {
                "id": row["id"],
                "arm": row.get("arm"),
                "answer": answer,
                "correct": row.get("correct", same_answer(answer, gold)),
                **{key: row.get(key) for key in ("soundness", "fault", *SIGNALS, "reward")},
                "reward_parts": parts_of(row, record, params.regime_w.reward),
                **{key: row.get(key) for key in ("finish", "tokens", "logprob", "text")},
                "read": [reading.start, reading.end],
                **reasoning_rows(group.reasonings[index], majority, golds),
            }
        )
    return {
        "id": record["id"],
        "question": record["question"],
        "numbers": {f"m{place}": canonical(number) for place, number in enumerate(group.numbers, 1)},
        "gold": {
            "answer": gold,
            "solution": record.get("solution"),
            **(reasoning_rows(golds, majority, golds) if golds else {}),
        },
        "signals": {key: record.get(key) for key in SIGNALS},
        **{key: record.get(key) for key in ("suspicion", "suspect_answer", "planted")},
        "trajectories": trajectories,
        "pairs": pairs_of(record, params.section_of("preference", own)),
    }


def read_question(path: Path, record: Row) -> tuple[str, list[Reading], GroupAnalysis, Reasoning | None]:
    """A question's gold answer, and what the shipped code reads of its trajectories and its gold solution.

    Raises UserError when the gold is no number.
    """
    try:
        gold = read_gold_answer(record)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    readings = [read_answer(row["text"], record["question"]) for row in record["trajectories"]]
    group = analyse_group(record["question"], solution_views(record["trajectories"], readings))
    return gold, readings, group, read_gold(record.get("solution"), group.numbers)


def parts_of(row: Row, record: Row, params: Reward) -> dict[str, float] | None:
    """What the file's reward is the sum of; `other` is what the parameters do not explain. None if unscored."""
    values = [row.get("s_wm"), record.get("s_wm"), record.get("s_end"), row.get("reward")]
    numbers = [one for one in values if one is not None]
    if len(numbers) < len(values):
        return None
    s_wm, mean, s_end, value = numbers
    parts = reward_parts(bool(row.get("correct")), s_wm, mean, s_end, row.get("tokens"), params)
    other = value - parts.total
    named = {name: getattr(parts, name) for name in ("correct", "coherence", "consensus", "length")}
    return named | ({"other": other} if abs(other) > 1e-9 else {})


def majorities(reasonings: Sequence[Reasoning]) -> Iterator[set[Number]]:
    """For each changed number the answers that most trajectories move to; empty where no two agree."""
    for column in zip(*(one.counterfactuals for one in reasonings), strict=True):
        counts = Counter(value for value in column if value is not None)
        most = max(counts.values(), default=0)
        yield {value for value, count in counts.items() if count == most > 1}


def reasoning_rows(reasoning: Reasoning, majority: Sequence[set[Number]], golds: Reasoning | None) -> Row:
    """Equations, links, carrier and counterfactuals of one text, as plain data."""
    equations = []
    for place, (equation, sources) in enumerate(
        zip(reasoning.solution.equations, reasoning.links, strict=True), 1
    ):
        printed = [canonical(operand.printed) + "%" * operand.percent for operand in equation.operands]
        linked = list(map(_source, sources, printed))
        equations.append(
            {
                "name": f"e{place}",
                "written": f"{infix(equation, printed)}={canonical(equation.value)}",
                "linked": infix(equation, linked),
                "holds": equation.holds,
                "computed": None if equation.computed is None else canonical(equation.computed),
            }
        )
    moves = [
        {
            "value": None if value is None else canonical(value),
            "majority": bool(majority) and value in majority[place],
            "gold": value is not None and golds is not None and value == golds.counterfactuals[place],
        }
        for place, value in enumerate(reasoning.counterfactuals)
    ]
    return {
        "equations": equations,
        "skipped": reasoning.solution.skipped,
        "carrier": None if reasoning.carrier is None else f"e{reasoning.carrier + 1}",
        "counterfactuals": moves,
    }


def _source(source: int, printed: str) -> str:
    """Where an operand comes from: e2 (an equation), m1 (a number of the question), else the constant itself."""
    if source == CONSTANT:
        return printed
    if source >= 0:
        return f"e{source + 1}"
    return f"m{-1 - source}" + "%" * printed.endswith("%")


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


def pairs_of(record: Row, spec: Preference) -> Row | None:
    """By kind, the pairs that params.yaml makes of the question, and how many candidates each reason left out.

    Lengths are not balanced, as that takes all questions. None when the trajectories have no verdicts and rewards.
    """
    spec = spec.model_copy(update={"length_balance": False})
    try:
        made, summary = make_pairs([record], spec)
    except UserError:
        return None
    keys = ("chosen_id", "rejected_id", "margin", "chosen_tokens", "rejected_tokens")
    return {
        kind: {
            "made": [{key: pair[key] for key in keys} for pair in made if pair["kind"] == kind],
            "left_out": {reason: count for reason, count in summary[kind]["refused"].items() if count},
        }
        for kind in KINDS
    }


# ---- showing it --------------------------------------------------------------------------------------


@dataclass
class Column:
    """What the table shows of one trajectory, or of several that are alike: its heading, arms and rows."""

    names: list[str]
    arms: list[str]
    cells: dict[str, Text | str]


def show(picture: Row, console: Console, text: bool = False) -> None:
    """Print what `explain` found; fits the console's width."""
    rows, signals = picture["trajectories"], picture["signals"]
    right = sum(bool(row["correct"]) for row in rows)
    line = Text.assemble(
        (picture["id"], "bold"), f"  gold {picture['gold']['answer']}, {right} of {len(rows)} right"
    )
    if any(value is not None for value in signals.values()):
        line.append("; means " + "  ".join(f"{key} {cell(value, '.3f')}" for key, value in signals.items()))
    console.print(line)
    if picture.get("suspicion"):
        words = f"suspicion {cell(picture['suspicion'], '.3f')}: they agree on {picture['suspect_answer']}"
        console.print(words, style="yellow")
    console.print(picture["question"], style="italic")
    numbers = ", ".join(f"{name} = {value}" for name, value in picture["numbers"].items())
    console.print(numbers or "no number in digits: nothing to change")
    columns = _columns(picture, text)
    unlimited = console.options.update(width=10_000)
    while columns:  # as many in each table as fit
        for size in range(len(columns), 0, -1):
            table = _table(columns[:size])
            if console.measure(table, options=unlimited).maximum <= console.width:
                break
        console.print(table)
        columns = columns[size:]
    console.print(LEGEND, style="dim")
    if any("other" in (row["reward_parts"] or {}) for row in rows):
        words = "other: what params.yaml does not explain; the file was scored with other parameters."
        console.print(words, style="yellow")
    _show_pairs(picture, console)


def _columns(picture: Row, text: bool) -> list[Column]:
    """A column for the gold solution, if there is one, and one for each group of trajectories that look the same."""
    columns = []
    gold = picture["gold"]
    if "equations" in gold:
        cells = {"answer": gold["answer"], **_reasoning_cells(gold, picture["numbers"], of_gold=True)}
        columns.append(Column(["gold"], [], cells | ({"text": gold["solution"]} if text else {})))
    for row in picture["trajectories"]:
        cells = {"answer": verdict(row["answer"], row["correct"])}
        cells |= _reasoning_cells(row, picture["numbers"])
        cells |= {name: cell(row[name], ".3f") for name in SIGNALS}
        cells["reward"] = Text(cell(row["reward"], ".3f"), "bold")
        for name, value in (row["reward_parts"] or {}).items():
            cells[f"  {name}"] = Text(f"{value:+.3f}", "" if value else "dim")
        cells["soundness"] = cell(row["soundness"])
        if row["fault"]:
            cells["fault"] = Text(str(row["fault"]), "red")
        cells["tokens"] = cell(row["tokens"], ",")
        if text:
            whole = cells["text"] = Text(row["text"])
            whole.stylize("dim", 0, row["read"][0])
            whole.stylize("dim", row["read"][1])
        like = next((one for one in columns if one.cells == cells), None)
        if like is None:
            columns.append(like := Column([], [], cells))
        like.names.append(row["id"].removeprefix(f"{picture['id']}/"))
        if row["arm"] is not None and row["arm"] not in like.arms:
            like.arms.append(row["arm"])
    return columns


def _reasoning_cells(row: Row, numbers: dict[str, str], of_gold: bool = False) -> dict[str, Text | str]:
    """The rows about what was read of one text."""
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
    cells: dict[str, Text | str] = {"equations": Text("\n").join(lines or [Text("none", "yellow")])}
    cells["answer by"] = row["carrier"] or Text("no equation", "yellow")
    labels = [f"{name} {value}→{canonical(Fraction(value) + 1)}" for name, value in numbers.items()]
    for label, move in zip(labels or ["unchanged"], row["counterfactuals"], strict=True):
        if move["value"] is None:
            cells[label] = Text("?", "yellow")
            continue
        marks = "M" * move["majority"] + "G" * (move["gold"] and not of_gold)
        cells[label] = Text.assemble(move["value"], (f" {marks}" if marks else "", "bold cyan"))
    return cells


def _table(columns: list[Column]) -> Table:
    """One table; its rows are those that any of its columns has, in the order they come."""
    table = new_table("", *(" ".join(column.names) for column in columns))
    table.columns[0].style = "dim"
    for column in table.columns[1:]:
        column.max_width = WIDEST
    table.add_row(
        "arm", *("\n".join(wrap(" ".join(column.arms), 14, break_long_words=False)) for column in columns)
    )
    for label in dict.fromkeys(label for column in reversed(columns) for label in column.cells):
        if label in SECTIONS:
            table.add_section()
        table.add_row(label, *(column.cells.get(label, "") for column in columns))
    return table


def _show_pairs(picture: Row, console: Console) -> None:
    """The pairs the question gives, and why not more."""
    if picture["pairs"] is None:
        words = "No signals, rewards and pairs: score the file with `python -m stages coherence`."
        console.print(words, style="yellow")
        return
    rows = picture["trajectories"]
    right = sum(bool(row["correct"]) for row in rows)
    table = new_table("kind", "chosen > rejected", "margin", "tokens", right=("margin", "tokens"))
    lines = []
    for kind, pairs in picture["pairs"].items():
        for pair in pairs["made"]:
            ids = [pair[key].removeprefix(f"{picture['id']}/") for key in ("chosen_id", "rejected_id")]
            tokens = [cell(pair[key]) for key in ("chosen_tokens", "rejected_tokens")]
            table.add_row(kind, " > ".join(ids), cell(pair["margin"], ".3f"), " > ".join(tokens))
        words = ", ".join(f"{reason} {count}" for reason, count in pairs["left_out"].items())
        if kind == "correctness" and right in (0, len(rows)):
            words = f"all trajectories are {'right' if right else 'wrong'}"
        elif kind == "coherence" and right < 2:
            words = "fewer than two trajectories are right"
        lines += [f"{kind}, not made: {words}"] if words else []
    if table.rows:
        console.print(f"\nPairs from this question, by params.yaml: {len(table.rows)}", style="bold")
        console.print(table)
    else:
        console.print("\nNo pairs from this question", style="bold")
    for line in lines:
        console.print(line)
