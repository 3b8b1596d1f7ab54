"""Collects what report.html shows."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.page.svg import interval_chart, line_chart
from stages.run.files import read_json
from stages.run.history import History, Manifest, broken, read_lock
from stages.run.paths import DATA_METRICS, KEPT, LAST, LAST_ROUND, LOCK, SFT_CURVE, SFT_SELECTION, RoundPaths
from stages.run.rounds import chain, compared, shown
from stages.run.stage import manifest_path
from stages.stats.looks import LUCK, kept_words
from stages.stats.one import LEAK_LIMIT, TRUNCATED_LIMIT, health_warnings, samples_in

Row = dict[str, Any]
Table = list[dict[str, str]]

QUESTION_BYTES = 3_600_000  # of the page's 5 MB
COMPLETION_CHARACTERS = (8000, 4000, 2500, 1600, 1000, 600, 300)

FIRST_VERDICT, LAST_VERDICT = f"sft_to_{LAST_ROUND}", f"base_to_{LAST_ROUND}"

# The page draws the last round; the ones before it have a row in a table.
# The charts of the training: the file, the title, the columns drawn together against the file's first column.
CURVE_CHARTS = (
    (SFT_CURVE, "SFT: loss", ("loss",)),
    (SFT_CURVE, "SFT: gradient norm", ("grad_norm",)),
    (SFT_SELECTION, "SFT: accuracy on the validation split", ("valid_accuracy", "valid_mean")),
    (LAST.curve, "DPO: loss", ("loss",)),
    (LAST.curve, "DPO: reward margin", ("reward_margin",)),
    (LAST.curve, "DPO: log-probabilities", ("logp_chosen", "logp_rejected")),
    (LAST.curve, "DPO: gradient norm", ("grad_norm",)),
    (LAST.selection, "DPO: accuracy on the validation split", ("valid_accuracy", "valid_mean")),
)
ARMS, BY_COHERENCE = LAST.plots / "arms.csv", LAST.plots / "coherence.csv"
TABLES = (SFT_CURVE, SFT_SELECTION, LAST.curve, LAST.selection, ARMS, BY_COHERENCE)

SUMMARIES = {DATA_METRICS: "Data", LAST.regime_w: "Regime W", LAST.preference: "Pairs"}
HEALTH = {
    "end_token": "ended by the end token",
    "truncated": "cut at the token limit",
    "leak": "piece of the prompt or of a next problem",
    "second_answer": "more than one answer",
    "no_answer": "no answer",
    "empty": "empty",
    "repeats": "going round in circles",
}


def page_facts(
    policies: Mapping[str, Row],
    comparisons: Mapping[str, Row],
    rows: Mapping[str, list[Row]],
    votes: Mapping[str, Row],
    starts: Mapping[str, str],
) -> dict[str, Any]:
    """Everything the page shows, as plain data for its template.

    `policies`, `rows` and `votes` are by policy, `comparisons` by "<a>_to_<b>", `starts` by round (run/rounds.py). A
    table, metrics file or manifest that is not there is left out. Raises UserError when a file is damaged.
    """
    titles = {f"{a}_to_{b}": f"{shown(a)} → {shown(b)}" for a, b in compared(starts)}
    # From SFT to the last round first, then the last steps: people open the page to see whether DPO helped.
    steps = [key for key in titles if key not in (FIRST_VERDICT, LAST_VERDICT)]
    order = [key for key in (FIRST_VERDICT, *reversed(steps), LAST_VERDICT) if key in comparisons]
    tables = {path: _read_csv(path) for path in TABLES if path.is_file()}
    metrics = {path: read_json(path) for path in SUMMARIES if path.is_file()}
    manifests = _manifests()
    kept = read_kept(policies)
    return {
        "policies": [_policy_facts(shown(name), values) for name, values in policies.items()],
        "policy_chart": _policy_chart(policies),
        "verdicts": [
            {
                "title": titles[key],
                "greedy": comparisons[key]["verdict"],
                "mean": comparisons[key].get("mean_verdict"),
                "tests": {name: one["verdict"] for name, one in comparisons[key].get("tests", {}).items()},
            }
            for key in order
        ],
        "comparisons": [{"title": titles[key], **comparisons[key]} for key in comparisons],
        "tests": _tests(policies, comparisons),
        "votes": [_vote_facts(shown(name), values) for name, values in votes.items() if values["questions"]],
        "twins": [
            {"name": shown(name), **values} for name, values in policies.items() if "changed" in values
        ],
        "health_names": HEALTH,
        "limits": {"leak": LEAK_LIMIT, "truncated": TRUNCATED_LIMIT},
        "warnings": [w for name, values in policies.items() for w in health_warnings(values, shown(name))],
        "kept": [f"{shown(name)} {kept_words(judged)}." for name, judged in kept.items()],
        "unchanged": [
            f"{shown(name)} {kept_words(judged)}." for name, judged in kept.items() if not judged["kept"]
        ],
        "luck": LUCK,
        "curves": [
            line_chart(
                title, *_series(tables[path], columns), markers=path in (SFT_SELECTION, LAST.selection)
            )
            for path, title, columns in CURVE_CHARTS
            if tables.get(path)
        ],
        "plots": [_plot(path, tables[path]) for path in (ARMS, BY_COHERENCE) if tables.get(path)],
        "rounds": _rounds(starts),
        "pairs": _pair_kinds(metrics.get(LAST.preference, {})),
        "summaries": [
            {"title": SUMMARIES[path], "rows": list(_flatten(values))} for path, values in metrics.items()
        ],
        "manifests": [
            {
                **manifest.model_dump(),
                "path": path.as_posix(),
                "params_text": json.dumps(manifest.params, ensure_ascii=False, indent=2),
            }
            for path, manifest in manifests.items()
        ],
        "disagreements": _disagreements(manifests) if LOCK.is_file() else [],
        "lock": LOCK.is_file(),
        "pinned": Path("requirements.txt").read_text(encoding="utf-8"),
        "questions": _questions(rows),
    }


def read_kept(policies: Iterable[str]) -> dict[str, Row]:
    """For each policy whose training has ended, which step is kept and why (stages/stats/looks.py)."""
    paths = {name: KEPT / f"{name}.json" for name in policies}
    return {name: read_json(path) for name, path in paths.items() if path.is_file()}


def _policy_facts(name: str, values: Row) -> dict[str, Any]:
    k = samples_in(values)
    rates = {
        "greedy, strict": "accuracy",
        "greedy, flexible": "flexible",
        **{f"{kind}@{k}": f"{kind}_at_{k}" for kind in ("mean", "maj", "pass")},
        f"pass^{k}": f"pass_hat_{k}",
        "agreement": "agreement",
    }
    return {
        "name": name,
        "metrics": values,
        "rates": {
            label: [values.get(key + end) for end in ("", "_low", "_high")]
            for label, key in rates.items()
            if key in values
        },
    }


def _tests(policies: Mapping[str, Row], comparisons: Mapping[str, Row]) -> list[Row]:
    """One row a test set, Platinum first: each policy's figures, and each comparison; none without other test sets."""
    names = dict.fromkeys(name for values in policies.values() for name in values.get("tests", {}))
    if not names:
        return []
    found: list[Row] = [
        {"name": "Platinum", "policies": [*policies.values()], "steps": [*comparisons.values()]}
    ]
    for name in names:
        found.append(
            {
                "name": name,
                "policies": [values.get("tests", {}).get(name) for values in policies.values()],
                "steps": [values.get("tests", {}).get(name) for values in comparisons.values()],
            }
        )
    return found


def _vote_facts(name: str, values: Row) -> dict[str, Any]:
    """One policy's vote, with the number of samples left out of the keys."""
    k = values["samples"]
    plain = {key.removesuffix(f"_at_{k}").replace(f"_at_{k}_", "_"): value for key, value in values.items()}
    return {"name": name, **plain}


def _policy_chart(policies: Mapping[str, Row]) -> str:
    rows = []
    for name, values in policies.items():
        k = samples_in(values)
        for label, key in (("greedy", "accuracy"), (f"mean@{k}", f"mean_at_{k}")):
            if key in values:
                rows.append(
                    (f"{shown(name)} {label}", values[key], values[f"{key}_low"], values[f"{key}_high"])
                )
    return interval_chart("Accuracy with 95 % interval", rows)


def _read_csv(path: Path) -> Table:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _column(table: Table, name: str) -> list[float]:
    """A column as numbers; a blank is nan, which is not drawn."""
    return [float(row[name] or "nan") for row in table]


def _series(table: Table, columns: Sequence[str]) -> tuple[str, list[tuple[str, list[float], list[float]]]]:
    """The name of a table's first column, and the other `columns` against it."""
    x_name = next(iter(table[0]))
    return x_name, [(name, _column(table, x_name), _column(table, name)) for name in columns]


def _plot(path: Path, table: Table) -> dict[str, Any]:
    """One of Regime W's tables: as a chart, and as it is."""
    if path == ARMS:
        columns = [_column(table, name) for name in ("mean_reward", "low", "high")]
        rows = [(row["arm"], *values) for row, *values in zip(table, *columns, strict=True)]
        drawn = [row for row in rows if all(value == value for value in row[1:])]
        chart = interval_chart("Mean reward of each arm, with 95 % interval", drawn, percent=False)
    else:
        chart = line_chart("Accuracy against s_wm", *_series(table, ["accuracy"]), markers=True)
    return {
        "title": path.stem,
        "chart": chart,
        "names": list(table[0]),
        "rows": [[_short(text) for text in row.values()] for row in table],
    }


def _short(text: str) -> str:
    """A number in four digits; a whole number, a name and a blank as they are."""
    try:
        return text if text.isdigit() else f"{float(text):.4g}"
    except ValueError:
        return text


def round_files(starts: Mapping[str, str]) -> list[Path]:
    """What the table of the rounds is made of."""
    rounds = map(RoundPaths, chain(starts))
    return [path for one in rounds for path in (one.regime_w, one.preference)]


def _rounds(starts: Mapping[str, str]) -> list[Row]:
    """One row a round: its start, its trajectories, its pairs, the step that was kept; none for a single round."""
    rows = []
    for name, before in chain(starts).items() if len(starts) > 1 else ():
        own = RoundPaths(name)
        row: Row = {"name": shown(name), "before": shown(before)}
        if own.regime_w.is_file():
            scored = read_json(own.regime_w)
            row |= {key: scored[key] for key in ("questions", "trajectories", "accuracy")}
            row["s_wm"] = scored["signals"]["s_wm"]
        if own.preference.is_file():
            row["pairs"] = read_json(own.preference)["pairs"]
        if judged := read_kept([name]).get(name):
            score = judged["score_best" if judged["kept"] else "score_start"]
            row |= {"kept": judged["kept"], "steps": judged["last"], "score": score}
            row["from_score"] = judged["score_start"]
        rows.append(row)
    return rows


def _pair_kinds(metrics: Row) -> list[Row]:
    """One row a kind of pair: how many, from how many questions, margin, length difference, not shorter."""
    kinds = ((name, metrics.get(name)) for name in ("correctness", "coherence"))
    return [{"kind": name, **kind} for name, kind in kinds if kind and kind["pairs"]]


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Metrics as a table of name and value, but for the arms, which have a table of their own."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "arms":
                yield from _flatten(inner, f"{name} › {key}" if name else key)
    else:
        yield name, f"{value:.4g}" if isinstance(value, float) else str(value)


def _questions(rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Every question with each policy's completion, cut down until the page is small enough.

    First long completions lose their middle, then questions that all policies get right or all get wrong are left out.
    The page says how many.
    """
    indexes = {name: {row["id"]: row for row in table} for name, table in rows.items()}
    first = next(iter(indexes.values()))
    shared = [key for key in first if all(key in index for index in indexes.values())]
    changed = [key for key in shared if len({bool(index[key]["correct"]) for index in indexes.values()}) > 1]

    def packed(keys: list[str], limit: int) -> dict[str, Any]:
        return {
            "policies": [shown(name) for name in rows],
            "left_out": len(shared) - len(keys),
            "limit": limit,
            "rows": [_question([index[key] for index in indexes.values()], limit) for key in keys],
        }

    choices = [(keys, limit) for keys in (shared, changed) for limit in COMPLETION_CHARACTERS]
    for keys, limit in choices:
        made = packed(keys, limit)
        if len(json.dumps(made, ensure_ascii=False).encode()) <= QUESTION_BYTES:
            return made
    return packed(changed[:2000], COMPLETION_CHARACTERS[-1])


def _question(rows: list[Row], limit: int) -> dict[str, Any]:
    return {
        "id": rows[0]["id"],
        "q": _middle_out(rows[0]["question"], 4 * limit),
        "gold": rows[0]["gold"],
        "text": [_middle_out(row["completion"], limit) for row in rows],
        "answer": [row["answer"] for row in rows],
        "right": [int(row["correct"]) for row in rows],
        "samples": [
            [sum(bool(s["correct"]) for s in row["samples"]), len(row["samples"])]
            if row.get("samples")
            else None
            for row in rows
        ],
        "note": [_note(row) for row in rows],
    }


def _note(row: Row) -> str:
    notes = [f"{row['tokens']} tokens"]
    notes += ["cut at the limit"] if row["finish"] == "length" else []
    notes += ["leak"] if row["leak"] else []
    notes += [f"{row['answers_found']} answers"] if row["answers_found"] > 1 else []
    return ", ".join(notes)


def _middle_out(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _manifests() -> dict[Path, Manifest]:
    """The manifests of the stages before this one, by path, in the order of the pipeline."""
    history = History()
    found = ((output, history.manifest(stage)) for stage, output in reversed(history.made_by.items()))
    return {manifest_path(output): manifest for output, manifest in found if manifest}


def _disagreements(manifests: Mapping[Path, Manifest]) -> list[str]:
    """Where manifests, the files they name and dvc.lock do not agree.

    DVC notes a parameter's value after the command ran, so an edit made meanwhile is recorded wrongly. And when a stage
    is run without DVC, later stages never read its output. A file that is not here (not pulled) is no disagreement.
    """
    locked_stages = read_lock()
    found = []
    for path, manifest in manifests.items():
        if manifest.stage not in locked_stages:
            found.append(f"{manifest.stage}: has a manifest ({path}) and no entry in dvc.lock")
            continue
        for values in locked_stages[manifest.stage].get("params", {}).values():
            for key, locked in values.items():
                used: Any = manifest.params
                for part in key.split("."):
                    used = used.get(part) if isinstance(used, Mapping) else None
                if used is not None:
                    found += [f"{manifest.stage}: {words}" for words in _differences(key, used, locked)]
    history = History()
    return [*found, *map(str, broken(history.steps(tuple(history.made_by))))]


def _differences(key: str, used: Any, locked: Any) -> Iterator[str]:
    if isinstance(used, Mapping) and isinstance(locked, Mapping):
        for name in locked:  # a key that only the manifest holds is a default nobody wrote down
            yield from _differences(f"{key}.{name}", used.get(name), locked.get(name))
    elif used != locked and not (used in (None, {}, []) and locked in (None, {}, [])):
        yield f"{key} was {json.dumps(used)} when it ran, dvc.lock says {json.dumps(locked)}"
