"""`python -m stages trace ID`: where a preference pair, a Platinum answer or a trajectory came from.

Every link is checked: files are hashed, texts compared, seeds derived again. Where a file is not here (not pulled),
the link says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.policy.request import rollout_seed
from stages.run.errors import UserError
from stages.run.files import read_json, read_jsonl
from stages.run.history import (
    AS_RECORDED,
    DIFFERS,
    UNCHECKED,
    History,
    Link,
    Step,
    broken,
    section_of,
    settings,
    trained_by,
)
from stages.run.params import load_params
from stages.run.paths import LOCK, PLATINUM_EVAL, RoundPaths
from stages.run.rounds import adapter_of, shown
from stages.tools.pairs import PAIR_FIELDS, SIDES
from stages.tools.show import (
    Row,
    cell,
    find_record,
    indented,
    nearest,
    new_console,
    new_table,
    print_json,
    raise_first,
    verdict,
)


def main(name: str, text: bool = False, as_json: bool = False) -> None:
    """Print where `name`, the id of a pair or of a question, came from; `text` shows the texts too.

    Raises UserError when nothing has this id, or, after printing, when a link of the chain does not hold.
    """
    picture = trace(name)
    if as_json:
        print_json(picture)
    else:
        show(picture, new_console(), text)
    words = "the chain is broken: {}; `dvc status` says what to run again"
    raise_first([f"{name}: {words.format(link)}" for link in picture["broken"]])


def trace(name: str) -> Row:
    """All that is known of an id, as data; of the last round that has it. Raises UserError when nothing has it."""
    params = load_params()
    rounds = [RoundPaths(one) for one in reversed(params.chain)]
    if ">" in name and (here := [own for own in rounds if own.pairs.is_file()]):
        own = next((one for one in here if _find(one.pairs, name)), here[0])
        return trace_pair(find_record(own.pairs, name, PAIR_FIELDS, "pair"), own)
    answers = {policy: PLATINUM_EVAL / f"{policy}.jsonl" for policy in params.policy_names}
    if found := {policy: row for policy, path in answers.items() if (row := _find(path, name))}:
        facts = {"completions": found, "not_here": [policy for policy in answers if policy not in found]}
        history = History()
        steps = history.steps(tuple(history.made_by))
        notes = [note for own in rounds for note in _kept_step(steps, own)]
        return _picture("Platinum question", next(iter(found.values())), facts, steps, notes)
    for own in rounds:
        if record := _find(own.scored, name) or _find(own.rollouts, name):
            steps = History().steps(tuple(trained_by(own.round)))
            hint = f"`python -m stages explain {name}` shows its trajectories and their scores."
            return _picture("training question", record, {}, steps, [*_drawn_from(steps, own), hint])
    asked = [*answers.values(), *(own.scored for own in rounds)]
    paths = [own.pairs for own in rounds] if ">" in name else asked
    if missing := [path.as_posix() for path in paths if not path.is_file()]:
        raise UserError(
            f"trace: nothing here has the id '{name}', and these files are not here: {', '.join(missing)}; "
            "`dvc pull` fetches, `dvc repro` makes them"
        )
    known = {row["id"] for path in paths for row in read_jsonl(path, {"id": str})}
    words = f"trace: neither rollout nor evaluate asked a question '{name}'"
    raise UserError(words + nearest(name, sorted(known)))


def _find(path: Path, name: str) -> Row | None:
    """The question's record in a file, if the file is here and has it."""
    if not path.is_file():
        return None
    return next((row for row in read_jsonl(path, {"id": str}) if row["id"] == name), None)


# ---- what there is to show ---------------------------------------------------------------------------


def trace_pair(pair: Row, own: RoundPaths) -> Row:
    """A preference pair of a round: its two trajectories as drawn and scored, and whether DPO was trained on it."""
    steps = History().steps(tuple(trained_by(own.round)))
    params = next((step.params for step in steps if step.stage == f"rollout@{own.round}"), {})
    arms = section_of(params, "rollout", own.round).get("arms") or {}
    later = own.round if own.round != next(iter(load_params().chain)) else ""
    both = (own.scored, own.rollouts)
    records = {path: _find(path, pair["question_id"]) or {} for path in both if path.is_file()}
    links: list[Link] = []
    sides: dict[str, Row] = {}
    for side in SIDES:
        side_id = pair[f"{side}_id"]
        found = {
            path: next((row for row in _objects(record.get("trajectories")) if row.get("id") == side_id), {})
            for path, record in records.items()
        }
        scored, drawn = (found.get(path) for path in both)
        row = {**(drawn or {}), **(scored or {})}
        as_paired = {"text": pair[side], "reward": pair.get(f"{side}_reward")}
        as_scored = {**{key: row[key] for key in drawn or {}}, "text": pair[side]}
        links.append(_same(f"{own.scored} ({side} text and reward)", scored, as_paired))
        links.append(_same(f"{own.rollouts} ({side} as drawn)", drawn, as_scored))
        if isinstance(params.get("seed"), int) and row.get("seed") is not None:
            pull = side_id.removeprefix(f"{pair['question_id']}/")
            seed = rollout_seed(params["seed"], later, pair["question_id"], pull)
            words = f"{side} seed, from seed {params['seed']}, question and pull"
            links.append(_same(words, row, {"seed": seed}))
        arm = arms.get(str(row.get("arm"))) or {}
        sides[side] = {"id": side_id, "arm": row.get("arm"), **arm, **row, "text": pair[side]}
    gold = next((record.get("gold") for record in records.values()), None)
    return _picture(
        "preference pair",
        {"id": pair["id"], "question": pair["prompt"], "gold": gold},
        {"pair": {"kind": pair["kind"], "margin": pair.get("margin"), **sides}},
        steps,
        [*_drawn_from(steps, own), *_trained_on(steps, own)],
        links,
    )


def _picture(
    kind: str, record: Row, facts: Row, steps: list[Step], notes: Iterable[str], links: Sequence[Link] = ()
) -> Row:
    """What is known of one id: its own facts and links, the steps behind it, and every link that does not hold."""
    bad = [*(link for link in links if link.broken), *broken(steps)]
    return {
        **{key: record.get(key) for key in ("id", "question", "gold")},
        **{"kind": kind, **facts, "notes": list(notes)},
        **{"links": links, "steps": steps, "broken": list(map(str, bad))},
    }


def _objects(values: Any) -> list[Row]:
    """The objects in a list. A file that somebody edited may hold anything else too."""
    return [one for one in values if isinstance(one, dict)] if isinstance(values, list) else []


def _same(path: str, row: Row | None, wanted: Row) -> Link:
    """A link of the pair itself: whether a record has the `wanted` values. `row` is None when its file is not here."""
    state = UNCHECKED
    if row is not None:
        state = AS_RECORDED if row and wanted.items() <= row.items() else DIFFERS
    return Link("pair", "read", path, "", state)


def _link(steps: list[Step], stage: str, role: str, path: Path) -> Link | None:
    return next((step.link(role, path) for step in steps if step.stage == stage), None)


def _drawn_from(steps: list[Step], own: RoundPaths) -> Iterator[str]:
    """Which policy drew the trajectories, in words."""
    start = load_params().chain[own.round]
    link = _link(steps, f"rollout@{own.round}", "read", adapter_of(start) or Path())
    yield f"Drawn from the {shown(start)} policy (its adapter: {link.state if link else UNCHECKED})."


def _trained_on(steps: list[Step], own: RoundPaths) -> Iterator[str]:
    """Whether the round's adapter was trained on the pairs that lie here, in words."""
    link = _link(steps, f"dpo@{own.round}", "read", own.pairs)
    if link and link.state == AS_RECORDED:
        yield f"The {shown(own.round)} adapter was trained on this pair, unless it is longer than dpo.max_tokens."
        yield from _kept_step(steps, own)
    elif link and link.state == DIFFERS:
        yield f"The {shown(own.round)} adapter was trained on another file of pairs than this one."
    else:
        yield f"What is here does not say whether a {shown(own.round)} adapter was trained on this pair."


def _kept_step(steps: list[Step], own: RoundPaths) -> Iterator[str]:
    """Which step of its training the round's adapter is, in words, where that is known."""
    link = _link(steps, f"dpo@{own.round}", "wrote", own.kept)
    if link and link.state == AS_RECORDED:
        judged = read_json(own.kept)
        kept, last = judged["kept"], judged["last"]
        effect = ", the best on validation" + ("; what came after it had no effect" if kept < last else "")
        if kept == 0:
            start = shown(load_params().chain[own.round])
            effect = f": the {start} adapter itself, so no pair changed it"
        yield f"The {shown(own.round)} adapter kept is that of step {kept} of {last}{effect}."


# ---- showing it --------------------------------------------------------------------------------------


def show(picture: Row, console: Console, text: bool = False) -> None:
    """Print what `trace` found; fits the console's width."""
    console.print(
        Text.assemble((picture["id"], "bold"), f"  {picture['kind']}, gold {cell(picture['gold'])}")
    )
    console.print(str(picture["question"]), style="italic")
    texts = {}
    if "pair" in picture:
        texts = _show_pair(picture["pair"], console)
    elif "completions" in picture:
        texts = _show_answers(picture, console)
    for note in picture["notes"]:
        console.print(note)
    for label, written in texts.items() if text else ():
        console.print(f"\n{label}", style="bold")
        console.print(indented(written))
    console.print("\nWhere it came from, the last stage first", style="bold")
    _show_links(picture["links"], console)
    for step in picture["steps"]:
        _show_step(step, console)
    holds = "" if picture["broken"] else "Every link that could be checked holds."
    links = [*picture["links"], *(link for step in picture["steps"] for link in step.links)]
    if absent := sum(link.state == UNCHECKED for link in links):
        holds += f" {absent} could not be: their files are not here (`dvc pull` fetches them)."
    console.print("\n" + holds.strip())


def _show_pair(pair: Row, console: Console) -> dict[str, str]:
    """The two trajectories side by side. Returns their texts."""
    console.print(f"\n{pair['kind']} pair, margin {cell(pair['margin'], '.3f')}")
    table = new_table("", *SIDES)
    table.columns[0].style = "dim"
    names = {"id": "trajectory", "logprob": "log-probability"}
    for key in dict.fromkeys(key for side in SIDES for key in pair[side] if key != "text"):
        values = [pair[side].get(key) for side in SIDES]
        if values != [None, None]:
            table.add_row(names.get(key, key), *map(cell, values))
    console.print(table)
    return {side: pair[side]["text"] for side in SIDES}


def _show_answers(picture: Row, console: Console) -> dict[str, str]:
    """What each policy answered. Returns the texts of the greedy answers."""
    table = new_table("policy", "greedy answer", "tokens", "finish", "drawn answers")
    for policy, row in picture["completions"].items():
        samples = _objects(row.get("samples"))
        right = sum(bool(sample.get("correct")) for sample in samples)
        drawn = f"{right} of {len(samples)} right" if samples else ""
        answer = verdict(row.get("answer"), row.get("correct"))
        table.add_row(policy, answer, cell(row.get("tokens")), cell(row.get("finish")), drawn)
    console.print(table)
    if picture["not_here"]:
        console.print(f"not here: the answers of {', '.join(picture['not_here'])}", style="yellow")
    return {policy: str(row.get("completion")) for policy, row in picture["completions"].items()}


def _show_step(step: Step, console: Console) -> None:
    """A stage, its parameters, and its links; of what it wrote, records, weights and what is not as recorded."""
    output = step.output.as_posix()
    title = Text.assemble("\n", (step.stage, "bold"), f"  {output}  ", (_short(step.identity or ""), "cyan"))
    title.append(f"  profile {step.profile}" if step.profile else "")
    title.append("  (no manifest here; by dvc.lock)" if step.source == LOCK.name else "", "yellow")
    console.print(title)
    if words := ", ".join(settings(step.stage, step.params)):
        console.print(indented(Text(words, "dim")))
    fine = [link for link in step.links if link.role != "read" and link.state == AS_RECORDED]
    main = [link for link in fine if link.role == "wrote" and link.path.endswith((".safetensors", ".jsonl"))]
    shown = [link for link in step.links if link not in fine or link in main]
    _show_links(shown, console, f"{output}/")
    rest = sum(link.role == "wrote" for link in fine) - len(main)
    if rest:
        console.print(indented(Text(f"wrote {rest} more, as recorded", "dim")))


def _show_links(links: Sequence[Link], console: Console, folder: str = "") -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    for width in (5, None, None, None):
        table.add_column(width=width, overflow="fold")
    for link in links:
        style = "bold red" if link.broken else "green" if link.state == AS_RECORDED else "yellow"
        state = "not the one dvc.lock has" if link.role == "locked" else link.state
        role = "is" if link.role == "locked" else link.role
        recorded = Text(_short(link.recorded), "cyan")
        table.add_row(Text(role, "dim"), link.path.removeprefix(folder), recorded, Text(state, style))
    if links:
        console.print(indented(table))


def _short(recorded: str) -> str:
    """The first twelve digits of a sum."""
    return recorded[: 16 if recorded.startswith("md5:") else 12]
