"""The comparison of the policies, DVC plot data, and `report.html`: one page that needs nothing but itself.

What is missing (a curve, a plot, a manifest) is left out or said there; one evaluation is enough.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.core.errors import UserError
from stages.core.provenance import LOCK, MADE_BY, History, broken, read_lock
from stages.core.records import atomic_write, read_json, read_jsonl, write_json
from stages.core.stage import stage_run
from stages.core.stats import LEAK_LIMIT, TRUNCATED_LIMIT, compare, health_warnings, summarise
from stages.core.svg import interval_chart, line_chart
from stages.core.table import POLICIES, samples_of

Row = dict[str, Any]

EVALUATIONS = Path("data/platinum_eval")
METRICS = Path("metrics")
COMPARISON = Path("metrics/comparison.json")
PLOT = Path("metrics/plots/policies.csv")
PAGE = Path("report.html")
TEMPLATES = Path(__file__).resolve().parent / "templates"

SEED = 0  # of the bootstraps and of a permutation test too large to be exact
FIELDS = {"id": str, "question": str, "completion": str, "correct": bool, "tokens": int, "finish": str}
PAIRS = (("base", "sft"), ("sft", "dpo"), ("base", "dpo"))
QUESTION_BYTES = 3_600_000  # of the page's 5 MB
COMPLETION_CHARACTERS = (8000, 4000, 2500, 1600, 1000, 600, 300)

# One chart per line: the columns drawn together, and what they are called.
CURVES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "sft": (("SFT: loss", ("loss",)), ("SFT: gradient norm", ("grad_norm",))),
    "dpo": (
        ("DPO: loss", ("loss",)),
        ("DPO: reward margin", ("reward_margin",)),
        ("DPO: log-probabilities", ("logp_chosen", "logp_rejected")),
        ("DPO: gradient norm", ("grad_norm",)),
    ),
    "dpo_selection": (("DPO: accuracy on the validation split", ("valid_accuracy",)),),
}
HEALTH = {
    "end_token": "ended by the end token",
    "truncated": "cut at the token limit",
    "leak": "piece of the prompt or of a next problem",
    "second_answer": "more than one answer",
    "no_answer": "no answer",
    "empty": "empty",
    "repeats": "going round in circles",
}


def main(
    evaluations: Path = EVALUATIONS,
    metrics: Path = METRICS,
    comparison: Path = COMPARISON,
    plot: Path = PLOT,
    page: Path = PAGE,
) -> None:
    """Write the paired comparisons, the plot data and the page.

    Raises UserError when no policy was evaluated, or a file that is there is damaged.
    """
    found = {name: evaluations / f"{name}.jsonl" for name in POLICIES}
    found = {name: path for name, path in found.items() if path.is_file()}
    if not found:
        raise UserError(f"{evaluations}: holds no base.jsonl, sft.jsonl or dpo.jsonl; run `dvc repro`")
    tables = sorted([*(metrics / "curves").glob("*.csv"), *(metrics / "plots").rglob("*.csv")])
    numbers = sorted([*metrics.glob("*.json"), *(metrics / "platinum_details").glob("*.json")])
    own = {comparison, plot, metrics / "headline.json"}
    inputs = [
        path for path in [*numbers, *tables] if path not in own and not path.name.endswith("manifest.json")
    ]
    with stage_run(
        "report", sections=(), inputs=[*found.values(), *inputs], outputs=[page, comparison, plot]
    ) as run:
        rows = {name: list(read_jsonl(path, FIELDS)) for name, path in found.items()}
        policies = {
            name: _metrics_of(metrics / "platinum_details" / f"{name}.json", rows[name]) for name in rows
        }
        comparisons = {
            f"{a}_to_{b}": compare(rows[a], rows[b], POLICIES[a], POLICIES[b], SEED)
            for a, b in PAIRS
            if a in rows and b in rows
        }
        write_json(comparison, comparisons)
        _write_policies(plot, policies)
        facts = _page_facts(metrics, policies, comparisons, tables)
        text = _render(facts | {"questions": _questions(rows)})
        with atomic_write(page) as file:
            file.write(text)
        for sentence in facts["verdicts"][:1]:
            run.say(f"{sentence['title']}, greedy: {sentence['greedy']}")
        for warning in [*facts["warnings"], *facts["disagreements"]]:
            run.say(f"WARNING {warning}")


def _metrics_of(path: Path, rows: list[Row]) -> dict[str, Any]:
    return read_json(path) if path.is_file() else dict(summarise(rows, SEED))


def _write_policies(path: Path, policies: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a policy, for `dvc plots`; the columns do not depend on the number of samples."""
    columns = (
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "mean",
        "mean_low",
        "mean_high",
        "truncated",
        "leak",
    )
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["policy", *columns])
        for name, values in policies.items():
            k = samples_of(values)
            keys = [c.replace("mean", f"mean_at_{k}") for c in columns]
            writer.writerow([POLICIES[name], *(values.get(key, "") for key in keys)])


# --- what the page shows ------------------------------------------------------------------------


def _page_facts(
    metrics: Path, policies: Mapping[str, Row], comparisons: Mapping[str, Row], tables: list[Path]
) -> dict[str, Any]:
    titles = {key: " → ".join(POLICIES[name] for name in key.split("_to_")) for key in comparisons}
    # The last step first: whether DPO helped is what the page is opened for.
    order = [key for key in ("sft_to_dpo", "base_to_sft", "base_to_dpo") if key in comparisons]
    manifests = _manifests()
    csv_tables = {path: _read_csv(path) for path in tables if path.name != PLOT.name}
    return {
        "policies": [_policy_facts(POLICIES[name], values) for name, values in policies.items()],
        "policy_chart": _policy_chart(policies),
        "verdicts": [
            {
                "title": titles[key],
                "greedy": comparisons[key]["verdict"],
                "mean": comparisons[key].get("mean_verdict"),
            }
            for key in order
        ],
        "comparisons": [{"title": titles[key], **comparisons[key]} for key in comparisons],
        "health_names": HEALTH,
        "limits": {"leak": LEAK_LIMIT, "truncated": TRUNCATED_LIMIT},
        "warnings": [w for name, values in policies.items() for w in health_warnings(values, POLICIES[name])],
        "curves": _curve_charts({p.stem: t for p, t in csv_tables.items() if p.parent.name == "curves"}),
        "plots": [_plot(p.stem, t) for p, t in csv_tables.items() if p.parent.name != "curves"],
        "pairs": _pair_kinds(metrics),
        "summaries": _summaries(metrics),
        "manifests": manifests,
        "disagreements": _disagreements(manifests),
        "lock": LOCK.is_file(),
        "pinned": _text(Path("requirements.txt")),
    }


def _policy_facts(name: str, values: Row) -> dict[str, Any]:
    k = samples_of(values)
    kinds = (("mean", "mean@"), ("maj", "maj@"), ("pass", "pass@"), ("pass_hat", "pass^"))
    samples = [
        (f"{label}{k}", f"{key}_at_{k}" if key != "pass_hat" else f"pass_hat_{k}") for key, label in kinds
    ]
    rates = [
        ("greedy, strict", "accuracy"),
        ("greedy, flexible", "flexible"),
        *samples,
        ("agreement", "agreement"),
    ]
    return {
        "name": name,
        "metrics": values,
        "rates": {
            label: [values.get(key + end) for end in ("", "_low", "_high")]
            for label, key in rates
            if key in values
        },
    }


def _policy_chart(policies: Mapping[str, Row]) -> str:
    rows = []
    for name, values in policies.items():
        k = samples_of(values)
        for label, key in (("greedy", "accuracy"), (f"mean@{k}", f"mean_at_{k}")):
            if key in values:
                rows.append(
                    (f"{POLICIES[name]} {label}", values[key], values[f"{key}_low"], values[f"{key}_high"])
                )
    return interval_chart("Accuracy with 95 % interval", rows)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(file)]


def _column(table: list[dict[str, str]], name: str) -> list[float]:
    """A column as numbers; what is blank or not a number is nan, and not drawn."""

    def number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return float("nan")

    return [number(row.get(name, "")) for row in table]


def _is_numeric(table: list[dict[str, str]], name: str) -> bool:
    return any(value == value for value in _column(table, name))


def _curve_charts(curves: Mapping[str, list[dict[str, str]]]) -> list[str]:
    """Charts of the training curves: the known ones as laid down, one chart a column for any other file."""
    charts = []
    for stem in [*(s for s in CURVES if s in curves), *(s for s in curves if s not in CURVES)]:
        table = curves[stem]
        if not table:
            continue
        x_name = next(iter(table[0]))
        known = CURVES.get(stem) or tuple((f"{stem}: {name}", (name,)) for name in table[0] if name != x_name)
        for title, columns in known:
            series = [(name, _column(table, x_name), _column(table, name)) for name in columns]
            charts.append(line_chart(title, x_name, series, markers=stem == "dpo_selection"))
    return [chart for chart in charts if chart]


def _plot(stem: str, table: list[dict[str, str]]) -> dict[str, Any]:
    """A plot file as a chart where its columns say how, and as a table always."""
    names = list(table[0]) if table else []
    title, chart = stem.replace("_", " "), ""
    intervals = [
        (name, low, high)
        for name in names
        for low, high in ((f"{name}_low", f"{name}_high"), ("low", "high"))
        if low in names and high in names and name not in (low, high, names[0]) and _is_numeric(table, name)
    ]
    if intervals and not _is_numeric(table, names[0]):
        name, low, high = intervals[0]
        points = zip(_column(table, name), _column(table, low), _column(table, high), strict=True)
        rows = [(row[names[0]], *values) for row, values in zip(table, points, strict=True)]
        drawn = [row for row in rows if all(value == value for value in row[1:])]
        chart = interval_chart(
            f"{title}: {name.replace('_', ' ')}",
            drawn,
            percent=all(0 <= v <= 1 for r in drawn for v in r[1:]),
        )
    elif names and _is_numeric(table, names[0]) and "accuracy" in names:
        series = [("accuracy", _column(table, names[0]), _column(table, "accuracy"))]
        chart = line_chart(f"Accuracy against {names[0]}", names[0], series, markers=True)
    return {
        "title": title,
        "chart": chart,
        "names": names,
        "rows": [[_short(row[name]) for name in names] for row in table[:200]],
        "left_out": max(0, len(table) - 200),
    }


def _short(text: str) -> str:
    try:
        return text if text.lstrip("-").isdigit() else f"{float(text):.4g}"
    except ValueError:
        return text


def _pair_kinds(metrics: Path) -> list[dict[str, Any]]:
    """One row a kind of pair: how many, from how many questions, margin, length difference, not shorter."""
    path = metrics / "preference.json"
    values = read_json(path) if path.is_file() else {}
    kinds = ((name, values.get(name)) for name in ("correctness", "coherence"))
    return [
        {"kind": name, **kind}
        for name, kind in kinds
        if isinstance(kind, dict) and kind.get("mean_margin") is not None
    ]


def _summaries(metrics: Path) -> list[dict[str, Any]]:
    """The JSON metrics of the earlier stages as name/value tables."""
    titles = {"data": "Data", "regime_w": "Regime W", "rollout": "Rollouts", "preference": "Pairs"}
    found = []
    for stem, title in titles.items():
        path = metrics / f"{stem}.json"
        if path.is_file():
            values = read_json(path)
            if isinstance(values, dict):
                values.pop("arms", None)  # shown above, as a figure and a table
            found.append({"title": title, "rows": list(_flatten(values))})
    return found


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{name} › {key}" if name else str(key))
    elif isinstance(value, float):
        yield name, f"{value:.4g}"
    else:
        yield name, f"{json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value!s:.120}"


# --- questions ----------------------------------------------------------------------------------


def _questions(rows: Mapping[str, list[Row]]) -> dict[str, Any]:
    """Every question with each policy's completion, made to fit: long completions lose their middle first,
    then questions that all policies judge alike are left out. What is left out is counted."""
    indexes = {name: {row["id"]: row for row in table} for name, table in rows.items()}
    first = next(iter(indexes.values()))
    shared = [key for key in first if all(key in index for index in indexes.values())]
    changed = [key for key in shared if len({bool(index[key]["correct"]) for index in indexes.values()}) > 1]

    def packed(keys: list[str], limit: int) -> dict[str, Any]:
        return {
            "policies": [POLICIES[name] for name in rows],
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
        "gold": str(rows[0].get("gold", "")),
        "text": [_middle_out(row["completion"], limit) for row in rows],
        "answer": [row.get("answer") for row in rows],
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
    notes += ["leak"] if row.get("leak") else []
    notes += [f"{row['answers_found']} answers"] if row.get("answers_found", 0) > 1 else []
    return ", ".join(notes)


def _middle_out(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


# --- provenance ---------------------------------------------------------------------------------


def _manifests() -> list[dict[str, Any]]:
    """Every manifest under data, checkpoints and metrics. Not this stage's own, which is of an earlier run,
    nor headline's, which may run before or after."""
    found = []
    for folder in ("data", "checkpoints", "metrics"):
        for path in sorted(Path(folder).rglob("*manifest.json")):
            manifest = read_json(path)
            if not isinstance(manifest, dict) or manifest.get("stage") in ("report", "headline"):
                continue
            params = manifest.get("params") or {}
            outputs = manifest.get("outputs") or {}
            found.append(
                {
                    "stage": str(manifest.get("stage", path.as_posix())),
                    "path": path.as_posix(),
                    "params": params,
                    "params_text": json.dumps(params, ensure_ascii=False, indent=2),
                    "outputs": outputs,
                }
            )
    return found


def _disagreements(manifests: list[dict[str, Any]]) -> list[str]:
    """Where manifests, the files they name and dvc.lock do not tell one story; [] also when there is no dvc.lock.

    DVC notes a parameter's value after the command ran, so an edit made meanwhile is recorded wrongly; and a
    stage run past DVC leaves an output that later ones never read. What is not here (not pulled) is no
    disagreement.
    """
    if not LOCK.is_file():
        return []
    try:
        stages, history = read_lock(), History()
        broken_links = broken(history.steps(tuple(MADE_BY)))
    except UserError as error:
        return [str(error)]
    found = []
    for manifest in manifests:
        if manifest["stage"] not in stages:
            found.append(f"{manifest['stage']}: has a manifest ({manifest['path']}) and no entry in dvc.lock")
            continue
        for values in (stages[manifest["stage"]].get("params") or {}).values():
            for key, locked in values.items():
                used: Any = manifest["params"]
                for part in key.split("."):
                    used = used.get(part) if isinstance(used, Mapping) else None
                if used is not None:
                    found += [f"{manifest['stage']}: {words}" for words in _differences(key, used, locked)]
    return [*found, *map(str, broken_links)]


def _differences(key: str, used: Any, locked: Any) -> Iterator[str]:
    if isinstance(used, Mapping) and isinstance(locked, Mapping):
        for name in locked:  # a key that only the manifest holds is a default nobody wrote down
            yield from _differences(f"{key}.{name}", used.get(name), locked.get(name))
    elif used != locked and not (used in (None, {}, []) and locked in (None, {}, [])):
        yield f"{key} was {json.dumps(used)} when it ran, dvc.lock says {json.dumps(locked)}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


# --- the page -----------------------------------------------------------------------------------


def _render(facts: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def as_json(value: Any) -> Markup:
        # \/ is the same JSON as a slash, and can neither end the script element nor look like an address.
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        return Markup(text.replace("/", "\\/").replace("<", "\\u003c"))

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"as_json": as_json, "percent": lambda v: "–" if v is None else f"{100 * v:.1f} %"}
    environment.filters |= {
        "points": lambda v: f"{100 * v:+.1f}",
        "p": lambda v: f"{v:.2g}" if v >= 0.0001 else "< 0.0001",
    }
    # A p-value stays on one line.
    environment.filters |= {
        "svg": Markup,
        "keep": lambda v: re.sub(r"(?<=\bp) ([=<]) ", "\u00a0\\1\u00a0", v),
    }
    return environment.get_template("report.html.j2").render(facts) + "\n"
