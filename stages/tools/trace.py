"""`python -m stages trace ID`: where a preference pair, a Platinum answer or a trajectory came from.

    python -m stages trace 'train-00017/0>3'    # a pair; quoted, as > means something to a shell
    python -m stages trace platinum-00042       # the answers of all policies, and what each policy was made from
    python -m stages trace train-00017          # a training question: its trajectories and pairs

Every link is checked: files are hashed, texts compared, seeds derived again. Files that are not here (not pulled)
are said to be so.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from heapq import nlargest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from stages.core.errors import UserError
from stages.core.paths import BASE, SFT_ADAPTER
from stages.core.provenance import (
    AS_RECORDED,
    DIFFERS,
    MADE_BY,
    PAIRS,
    PLATINUM_EVAL,
    PROBLEMS,
    ROLLOUTS,
    SCORED,
    TRAINING,
    UNCHECKED,
    History,
    Link,
    Step,
    broken,
    settings,
)
from stages.core.records import Fields, read_jsonl
from stages.engine.base import request_seed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Row = dict[str, Any]

POLICIES = ("base", "sft", "dpo")
SIDES = ("chosen", "rejected")
SELECTION = Path("metrics/curves/dpo_selection.csv")
PAIR_FIELDS: Fields = {
    **{"id": str, "kind": str, "question_id": str, "prompt": str},
    **{f"{side}{end}": str for side in SIDES for end in ("", "_id")},
}
QUESTION_FIELDS: Fields = {"id": str, "trajectories": list}
ANSWER_FIELDS: Fields = {"id": str, "question": str, "completion": str, "correct": bool}
# Of a trajectory: what rollout drew, and what coherence made of it.
DRAWN = ("arm", "style", "seed", "tokens", "logprob", "finish")
SCORES = ("answer", "correct", "soundness", "s_end", "s_path", "s_cf", "s_wm", "reward")


def main(name: str, text: bool = False, as_json: bool = False, console: Console | None = None) -> None:
    """Print where `name`, the id of a pair or of a question, came from; `text` shows the texts too.

    Raises UserError when nothing has this id, or, after printing, when a link of the chain does not hold.
    """
    picture = trace(name)
    if as_json:
        json.dump(picture, sys.stdout, ensure_ascii=False, indent=2)
        print()
    else:
        from rich.console import Console

        show(picture, console or Console(highlight=False), text)
    if picture["broken"]:
        first, more = picture["broken"][0], len(picture["broken"]) - 1
        others = f" (and {more} more, marked above)" if more else ""
        raise UserError(f"{name}: the chain is broken: {first}{others}; `dvc status` says what to run again")


def trace(name: str) -> Row:
    """All that is known of an id, as plain data. Raises UserError when nothing has it."""
    history = History()
    if ">" in name:
        return trace_pair(name, history)
    answers = {policy: PLATINUM_EVAL / f"{policy}.jsonl" for policy in POLICIES}
    found = {
        policy: row
        for policy, path in answers.items()
        if path.is_file() and (row := find(path, name, ANSWER_FIELDS))
    }
    if found:
        return trace_answers(name, found, history)
    for path in (SCORED, ROLLOUTS):
        if path.is_file() and (record := find(path, name, QUESTION_FIELDS)):
            return trace_question(record, path, history)
    raise UserError(_not_found(name, answers.values()))


def find(path: Path, name: str, fields: Fields) -> Row | None:
    """The record with an id, or None. Raises UserError when the file cannot be read."""
    return next((row for row in read_jsonl(path, fields) if row["id"] == name), None)


def _not_found(name: str, answers: Any) -> str:
    """What to say of an id that no file of records holds."""
    question, slash, _ = name.partition("/")
    if slash:
        return (
            f"trace: '{name}' is one trajectory; trace its question ({question}), or a pair, whose id has a > "
            f"and needs quotes in a shell: trace '{name}>3'"
        )
    splits = {split: PROBLEMS / f"{split}.jsonl" for split in ("train", "valid", "platinum")}
    within = next((s for s, path in splits.items() if path.is_file() and find(path, name, {"id": str})), None)
    if within == "train":
        return f"trace: '{name}' was not among the questions that the rollouts asked (rollout.questions)"
    if within == "valid":
        return f"trace: '{name}' is a validation question: DPO chose its step by them and keeps no answers"
    missing = [path.as_posix() for path in (*answers, SCORED) if not path.is_file()]
    if within == "platinum" or missing:
        return (
            f"trace: nothing here has the id '{name}', and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not here; `dvc pull` fetches, `dvc repro` makes what is missing"
        )
    ids = [row["id"] for path in splits.values() if path.is_file() for row in read_jsonl(path, {"id": str})]
    return f"trace: no pair or question '{name}'" + _nearest(name, ids)


def _nearest(name: str, ids: list[str]) -> str:
    def near(one: str) -> tuple[bool, float]:
        return one.endswith(name), SequenceMatcher(None, one, name).ratio()

    return f"; the nearest ids are {', '.join(nlargest(3, ids, near))}" if ids else ""


# ---- what there is to show ---------------------------------------------------------------------------


def trace_answers(name: str, rows: Mapping[str, Row], history: History) -> Row:
    """A Platinum question: each policy's completion, how it was drawn, and what the policies were made from."""
    steps = history.steps(tuple(MADE_BY))
    params_of = {step.stage: step.params for step in steps}
    completions: dict[str, Row] = {}
    for policy, row in rows.items():
        params = params_of.get(f"evaluate@{policy}") or {}
        spec, seed = params.get("evaluate") or {}, params.get("seed")
        samples = [
            {"seed": None if seed is None else request_seed(seed, "evaluate", name, str(place)), **sample}
            for place, sample in enumerate(_objects(row.get("samples")))
        ]
        keys = ("completion", "answer", "correct", "tokens", "finish")
        greedy: Row = {"temperature": 0.0, **{key: row.get(key) for key in keys}}
        drawn: Row = {key: spec.get(key) for key in ("temperature", "top_p", "max_new_tokens")}
        completions[policy] = {"greedy": greedy, "settings": {**drawn, "seed": seed}, "samples": samples}
    first = next(iter(rows.values()))
    return {
        "id": name,
        "kind": "platinum",
        "question": first["question"],
        "gold": first.get("gold"),
        "completions": completions,
        "not_here": [policy for policy in POLICIES if policy not in rows],
        "trained": trained_on(steps),
        **_chain(steps, []),
    }


def trace_question(record: Row, path: Path, history: History) -> Row:
    """A training question: its trajectories, and the pairs they gave."""
    steps = history.steps(TRAINING)
    arms = _arms(steps)
    trajectories = [{"id": row.get("id"), **_picked(row, arms)} for row in _objects(record["trajectories"])]
    pairs = None
    if PAIRS.is_file():
        keys = ("id", "kind", "margin")
        mine = (row for row in read_jsonl(PAIRS, PAIR_FIELDS) if row["question_id"] == record["id"])
        pairs = [{key: row.get(key) for key in keys} for row in mine]
    return {
        "id": record["id"],
        "kind": "train",
        "question": record.get("question"),
        "gold": record.get("gold"),
        "from": path.as_posix(),
        "trajectories": trajectories,
        "pairs": pairs,
        "drawn_by": drawn_by(steps),
        "trained": trained_on(steps),
        **_chain(steps, []),
    }


def trace_pair(name: str, history: History) -> Row:
    """A preference pair: its two trajectories as drawn and scored, and whether DPO was trained on it."""
    if not PAIRS.is_file():
        raise UserError(f"{PAIRS}: is not here; `dvc pull` fetches it, `dvc repro` makes it")
    pair, ids = None, []
    for row in read_jsonl(PAIRS, PAIR_FIELDS):
        ids.append(row["id"])
        if row["id"] == name:
            pair = row
            break
    if pair is None:
        raise UserError(f"{PAIRS}: no pair '{name}'" + _nearest(name, ids))
    steps = history.steps(TRAINING)
    files = {
        path: find(path, pair["question_id"], QUESTION_FIELDS)
        for path in (SCORED, ROLLOUTS)
        if path.is_file()
    }
    arms = _arms(steps)
    links = []
    sides: dict[str, Row] = {}
    for side in SIDES:
        own = pair[f"{side}_id"]
        rows = {path: _trajectory(record, own) for path, record in files.items()}
        links += [
            _compared(
                f"{side} text and reward",
                SCORED,
                rows,
                {"text": pair[side], "reward": pair.get(f"{side}_reward")},
            ),
            _compared(f"{side} as drawn", ROLLOUTS, rows, {"text": pair[side], **_drawn(rows.get(SCORED))}),
        ]
        row = {**(rows.get(ROLLOUTS) or {}), **(rows.get(SCORED) or {})}
        links += _seed_link(side, own, pair["question_id"], row, steps)
        sides[side] = {"id": own, **_picked(row, arms), "text": pair[side]}
    return {
        "id": name,
        "kind": "pair",
        "question_id": pair["question_id"],
        "question": pair["prompt"],
        "gold": next((record.get("gold") for record in files.values() if record), None),
        "pair": {"kind": pair["kind"], "margin": pair.get("margin"), **sides},
        "drawn_by": drawn_by(steps),
        "trained": trained_on(steps, pair),
        **_chain(steps, links),
    }


def _chain(steps: list[Step], links: list[Link]) -> Row:
    """The steps as data, the links of the record itself, and what does not hold."""
    return {
        "links": [vars(link) for link in links],
        "steps": [
            {
                "stage": step.stage,
                "recorded_in": step.source,
                "output": step.output.as_posix(),
                "identity": step.identity,
                "profile": step.profile,
                "params": step.params,
                "links": [vars(link) for link in step.links],
            }
            for step in steps
        ],
        "broken": [str(link) for link in [*(one for one in links if one.broken), *broken(steps)]],
    }


def _arms(steps: list[Step]) -> dict[str, Row]:
    """The arms as the rollouts pulled them."""
    params = next((step.params for step in steps if step.stage == "rollout"), {})
    return dict((params.get("rollout") or {}).get("arms") or {})


def _picked(row: Row, arms: dict[str, Row]) -> Row:
    """A trajectory's facts, how its arm asked in between."""
    arm = arms.get(str(row.get("arm"))) or {}
    more = [key for key in ("propensity", "uniform") if key in row]  # thompson
    return {
        **{key: row.get(key) for key in ("arm", "style")},
        **{key: arm.get(key) for key in ("temperature", "top_p", "system")},
        **{key: row.get(key) for key in (*DRAWN[2:], *more, *SCORES)},
    }


def _drawn(row: Row | None) -> Row:
    return {key: row[key] for key in DRAWN if key in row} if row else {}


def _trajectory(record: Row | None, name: str) -> Row | None:
    rows = _objects(record["trajectories"]) if record else []
    return next((row for row in rows if row.get("id") == name), None)


def _objects(values: Any) -> list[Row]:
    """What is an object in a list that an edited file may have filled with anything."""
    return [one for one in values if isinstance(one, dict)] if isinstance(values, list) else []


def _compared(what: str, path: Path, rows: Mapping[Path, Row | None], wanted: Row) -> Link:
    """Whether a pair's trajectory is in a file just as the pair has it."""
    state = UNCHECKED
    if path in rows:
        row = rows[path] or {}
        state = AS_RECORDED if all(row.get(key) == value for key, value in wanted.items()) else DIFFERS
    return Link("pair", "read", f"{path} ({what})", "", state)


def _seed_link(side: str, name: str, question: str, row: Row, steps: list[Step]) -> Iterator[Link]:
    """Whether a trajectory's seed is the one that follows from the run's seed."""
    params = next((step.params for step in steps if step.stage == "rollout"), {})
    if isinstance(params.get("seed"), int) and row.get("seed") is not None:
        pull = name.removeprefix(f"{question}/")
        same = row["seed"] == request_seed(params["seed"], "rollout", question, pull)
        words = f"{side} seed, from seed {params['seed']}, question and pull"
        yield Link("pair", "read", words, "", AS_RECORDED if same else DIFFERS)


def trained_on(steps: list[Step], pair: Row | None = None) -> Row:
    """Whether the DPO adapter was trained on the pairs that lie here, and on `pair`; which step was kept.

    `pairs_file` is true, false or null (cannot be known); `too_long` tells whether training left the pair out.
    """
    step = next((one for one in steps if one.stage == "dpo"), None)
    link = step.link("read", PAIRS) if step else None
    known = {AS_RECORDED: True, DIFFERS: False}.get(link.state) if link else None
    found: Row = {"pairs_file": known, "adapter": _weights(steps, "dpo")}
    if step and pair is not None:
        found["too_long"] = too_long(pair, step.params)
    curve = step.link("wrote", SELECTION) if step else None
    if curve and curve.state == AS_RECORDED:
        with SELECTION.open(encoding="utf-8", newline="") as file:
            rows = [(int(row["step"]), float(row["score"])) for row in csv.DictReader(file)]
        best = max(rows, key=lambda row: (row[1], -row[0]))
        found |= {"kept_step": best[0], "last_step": rows[-1][0], "kept_score": best[1]}
    return found


def drawn_by(steps: list[Step]) -> Row:
    """The adapter the trajectories were drawn from, and whether it is the one that lies here."""
    step = next((one for one in steps if one.stage == "rollout"), None)
    link = step.link("read", SFT_ADAPTER) if step else None
    return {"adapter": _weights(steps, "sft"), "state": link.state if link else UNCHECKED}


def too_long(pair: Row, params: Row) -> bool | None:
    """Whether DPO left a pair out for its length (dpo.max_tokens); None when the tokenizer is not here."""
    from stages.core.params import Prompt
    from stages.core.prompts import completion_ids, prompt_ids

    limit, prompt = (params.get("dpo") or {}).get("max_tokens"), params.get("prompt")
    if not (BASE / "tokenizer_config.json").is_file() or limit is None or prompt is None:
        return None
    from transformers import AutoTokenizer

    try:
        spec = Prompt.model_validate(prompt)
    except ValidationError:  # of another version of this project
        return None
    tokenizer = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    ended = pair.get("rejected_finish") != "length"
    ids = [
        completion_ids(tokenizer, pair["chosen"], opening=spec.opening),
        completion_ids(tokenizer, pair["rejected"], ended, spec.opening),
    ]
    return len(prompt_ids(tokenizer, spec, pair["prompt"])) + max(map(len, ids)) > int(limit)


def _weights(steps: list[Step], stage: str) -> str | None:
    """The recorded sha256 of an adapter's weights."""
    step = next((one for one in steps if one.stage == stage), None)
    link = step.link("wrote", MADE_BY[stage] / "adapter_model.safetensors") if step else None
    return link.recorded if link else None


# ---- showing it --------------------------------------------------------------------------------------


def show(picture: Row, console: Console, text: bool = False) -> None:
    """Print what `trace` found; fits the console's width."""
    from rich.text import Text

    titles = {"pair": "preference pair", "platinum": "Platinum question", "train": "training question"}
    title = Text.assemble(
        (picture["id"], "bold"), f"  {titles[picture['kind']]}, gold {_cell(picture['gold'])}"
    )
    console.print(title)
    console.print(Text(str(picture["question"])), style="italic")
    {"pair": _show_pair, "platinum": _show_answers, "train": _show_question}[picture["kind"]](
        picture, console
    )
    if text:
        _show_texts(picture, console)
    console.print("\nWhere it came from, the last stage first", style="bold")
    _print_links(picture["links"], console)
    for step in picture["steps"]:
        _show_step(step, console)
    holds = "Every link that could be checked holds." if not picture["broken"] else ""
    links = [*picture["links"], *(link for step in picture["steps"] for link in step["links"])]
    absent = sum(link["state"] == UNCHECKED for link in links)
    if absent:
        holds += f" {absent} could not be: their files are not here (`dvc pull` fetches them)."
    if holds:
        console.print("\n" + holds.strip(), highlight=False)


def _show_pair(picture: Row, console: Console) -> None:
    from rich.text import Text

    pair = picture["pair"]
    margin = f", margin {pair['margin']:.3f}" if isinstance(pair["margin"], float | int) else ""
    console.print(f"\n{pair['kind']} pair{margin}", markup=False)
    table = _table(("", *SIDES))
    rows = [pair[side] for side in SIDES]
    for key in rows[0]:
        if key != "text" and any(row[key] is not None for row in rows):
            label = {"id": "trajectory", "logprob": "log-probability"}.get(key, key)
            table.add_row(Text(label, "dim"), *(Text(_cell(row[key])) for row in rows))
    console.print(table)
    for line in (drawn_words(picture["drawn_by"]), *trained_words(picture["trained"], True)):
        console.print(Text(line))


def _show_answers(picture: Row, console: Console) -> None:
    from rich.text import Text

    table = _table(("policy", "greedy answer", "tokens", "finish", "drawn answers"))
    for policy, one in picture["completions"].items():
        greedy, samples, way = one["greedy"], one["samples"], one["settings"]
        drawn = ""
        if samples:
            right = sum(bool(sample.get("correct")) for sample in samples)
            ways = ", ".join(
                f"{key} {way[key]:g}" for key in ("temperature", "top_p") if way[key] is not None
            )
            drawn = f"{right} of {len(samples)} right" + (f" at {ways}" if ways else "")
        table.add_row(policy, _verdict(greedy), _cell(greedy["tokens"]), _cell(greedy["finish"]), Text(drawn))
    console.print(table)
    if picture["not_here"]:
        console.print(f"not here: the answers of {', '.join(picture['not_here'])}", style="yellow")
    seeds = {one["settings"]["seed"] for one in picture["completions"].values()} - {None}
    if seeds and any(one["samples"] for one in picture["completions"].values()):
        console.print(
            f"Each drawn answer has a seed of its own, from seed {seeds.pop()} (--json shows them)."
        )
    for line in kept_words(picture["trained"]):
        console.print(Text(line))


def _show_question(picture: Row, console: Console) -> None:
    from rich.text import Text

    table = _table(("trajectory", "arm", "answer", "tokens", "s_wm", "reward"))
    for row in picture["trajectories"]:
        name = str(row["id"]).removeprefix(f"{picture['id']}/")
        cells = [Text(_cell(row["arm"])), _verdict(row)]
        table.add_row(name, *cells, *(_cell(row[key]) for key in ("tokens", "s_wm", "reward")))
    console.print(table)
    console.print(Text(drawn_words(picture["drawn_by"])))
    pairs = picture["pairs"]
    if pairs is None:
        console.print(f"{PAIRS} is not here, so its pairs are not known.", style="yellow")
    elif not pairs:
        console.print("It gave no pairs.")
    else:
        names = ", ".join(f"{one['id']} ({one['kind']})" for one in pairs)
        console.print(Text(f"It gave {len(pairs)} pair{'s' * (len(pairs) > 1)}: {names}"))
        for line in trained_words(picture["trained"], False):
            console.print(Text(line))
    console.print(Text(f"python -m stages explain {picture['id']} shows how the scores came about.", "dim"))


def drawn_words(found: Row) -> str:
    """Which policy drew the trajectories, in words."""
    known = f", weights {found['adapter'][:12]}" if found["adapter"] else ""
    return f"Drawn from the SFT policy (its adapter{known}: {found['state']})."


def trained_words(found: Row, one: bool) -> Iterator[str]:
    """Whether the DPO adapter was trained on it, in words; `one` pair, or all of a question."""
    what = "this pair" if one else "them"
    if found["pairs_file"] is None:
        yield f"Whether a DPO adapter was trained on {what} cannot be said from what is here."
        return
    if not found["pairs_file"]:
        yield f"The DPO adapter was trained on another file of pairs than this one; whether on {what} is not known."
        return
    if found.get("too_long"):
        yield "Left out of the DPO adapter's training: longer than dpo.max_tokens."
        return
    unless = (
        ", unless longer than dpo.max_tokens (the tokenizer is not here)"
        if one and found.get("too_long") is None
        else ""
    )
    yield f"The DPO adapter was trained on {what}{unless}."
    yield from kept_words(found)


def kept_words(found: Row) -> Iterator[str]:
    """Which step of DPO the adapter is, in words, where that is known."""
    if "kept_step" in found:
        kept, last = found["kept_step"], found["last_step"]
        words = f"The DPO adapter kept is that of step {kept} of {last}, the best on validation"
        if kept == 0:
            words += ": the SFT adapter itself, so no pair changed it"
        elif kept < last:
            words += "; what came after it had no effect"
        yield words + "."


def _show_texts(picture: Row, console: Console) -> None:
    """The completions, or the pair's two texts."""
    from rich.padding import Padding
    from rich.text import Text

    texts = {policy: one["greedy"]["completion"] for policy, one in picture.get("completions", {}).items()}
    texts |= {side: picture["pair"][side]["text"] for side in SIDES if "pair" in picture}
    for label, written in texts.items():
        console.print(f"\n{label}", style="bold")
        console.print(Padding(Text(str(written)), (0, 0, 0, 2)))


def _show_step(step: Row, console: Console) -> None:
    """A stage, its parameters, and its links; of what it wrote, the main output and what is not as recorded."""
    from rich.padding import Padding
    from rich.text import Text

    stage, output, identity = step["stage"], step["output"], short(step["identity"] or "")
    title = Text.assemble("\n", (stage, "bold"), f"  {output}  ", (identity, "cyan"))
    title.append(f"  profile {step['profile']}" if step["profile"] else "")
    title.append("" if step["recorded_in"] == "manifest" else "  (no manifest here; by dvc.lock)", "yellow")
    console.print(title)
    if words := ", ".join(settings(stage, step["params"])):
        console.print(Padding(Text(words, "dim"), (0, 0, 0, 2), expand=False))
    links = step["links"]
    written = [link for link in links if link["role"] == "wrote"]
    of_output = [link for link in written if link["path"] == output or link["path"].startswith(f"{output}/")]
    shown = [
        link
        for link in of_output
        if link["path"] == output or link["path"].endswith((".safetensors", ".jsonl"))
    ]
    shown += [link for link in written if link["state"] != AS_RECORDED and link not in shown]
    rest = len(written) - len(shown)
    shown = [{**link, "path": link["path"].removeprefix(f"{output}/")} for link in shown]
    others = [link for link in links if link["role"] == "locked" and link["state"] != AS_RECORDED]
    _print_links([*others, *shown, *(link for link in links if link["role"] == "read")], console)
    if rest:
        console.print(Padding(Text(f"wrote {rest} more, as recorded", "dim"), (0, 0, 0, 2), expand=False))


def _print_links(links: list[Row], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for width in (5, None, None, None):
        table.add_column(width=width, overflow="fold")
    for link in links:
        bad = link["state"] in (DIFFERS,) or link["state"].startswith("not here; its")
        style = "bold red" if bad else "green" if link["state"] == AS_RECORDED else "yellow"
        role = "is" if link["role"] == "locked" else link["role"]
        state = link["state"] if link["role"] != "locked" else "not the one dvc.lock has"
        table.add_row(
            Text(f"{role}", "dim"),
            Text(link["path"]),
            Text(short(link["recorded"]), "cyan"),
            Text(state, style),
        )
    if links:
        from rich.padding import Padding

        console.print(Padding(table, (0, 0, 0, 2), expand=False))


def short(recorded: str) -> str:
    """The first twelve digits of a sum."""
    return recorded[: 16 if recorded.startswith("md5:") else 12]


def _table(columns: tuple[str, ...]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _verdict(row: Row) -> Text:
    from rich.text import Text

    answer = "none" if row["answer"] is None else str(row["answer"])
    if row["correct"] is None:
        return Text(answer)
    return Text(f"{answer} ✓", "green") if row["correct"] else Text(f"{answer} ✗", "red")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
