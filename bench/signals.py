"""How well do the signals of Regime W rank trajectories, against length and mean token log-probability?

    python bench/signals.py                                                  # the last run, a second
    python bench/signals.py --run tiny=metrics/regime_w/dpo.json --run abel=../other/metrics/regime_w/dpo.json
    python bench/signals.py --groups example_model_solutions.jsonl           # also real groups, ten seconds

Prints a Markdown table of AUCs with 95 % intervals (0.5 is a coin), says which signal does not beat length,
and draws docs/signals.svg. `--groups` takes OpenAI's GSM8K example solutions as groups of four, runs
coherence and preference on them in a temporary folder with this repository's params.yaml, prints what came
out, and adds them as one more run.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from common import (
    MODELS,
    ROOT,
    example_solutions,
    groups_of_four,
    make_workplace,
    new_parser,
    note,
    print_table,
)

from stages.page.svg import ticks
from stages.run.errors import UserError
from stages.run.files import atomic_write, read_json, read_jsonl, write_jsonl
from stages.run.paths import LAST

MEASURES = ("s_end", "s_path", "s_cf", "s_wm", "length", "mean_logprob")
NAMES = {"mean_logprob": "log-prob."}
BASELINE = "length"
FEWEST = 10  # questions; fewer show nothing
QUESTIONS = ("right over wrong, overall", "right over wrong, within a question", "sound over lucky")
GROUPS = "GSM8K example solutions"


@dataclass(frozen=True)
class Auc:
    """A chance of ranking right, with its 95 % interval where there is one."""

    auc: float
    low: float | None
    high: float | None
    questions: int | None = None

    @property
    def strength(self) -> float:
        """How well it ranks whichever way round it is read: short over long is a ranking too."""
        return max(self.auc, 1 - self.auc)


Ranks = dict[
    str, dict[str, Auc | None]
]  # question asked -> measure -> AUC, None where nothing could be compared


def main() -> None:
    """Read the runs, say what the signals are worth, draw the figure, print the table last."""
    parser = new_parser(__doc__)
    parser.add_argument("--run", action="append", default=[], metavar="NAME=FILE", help=f"a {LAST.regime_w}")
    parser.add_argument("--groups", type=Path, help="example_model_solutions.jsonl of grade-school-math")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "signals.svg")
    options = parser.parse_args()
    runs: dict[str, Ranks] = {}
    try:
        for one in options.run or ([] if options.groups else [f"tiny={ROOT / LAST.regime_w}"]):
            name, _, file = one.partition("=")
            runs[name] = ranks(read_json(Path(file)), file)
    except UserError as error:
        raise SystemExit(f"--run NAME=FILE: {error}") from None
    if options.groups:
        with tempfile.TemporaryDirectory(prefix="bench-signals-") as folder:
            facts, metrics = run_groups(options.groups, Path(folder) / "run")
        for what, value in facts.items():
            print(f"- {what}: {value}")
        print()
        runs[GROUPS] = ranks(metrics, str(options.groups))
    for line in verdicts(runs):
        print(f"- {line}")
    with atomic_write(options.figure) as svg:
        svg.write(figure(runs))
    note(f"{options.figure} drawn")
    print()
    rows = []
    for name, found in runs.items():
        for measure in MEASURES:
            cells = [cell(found[asked][measure]) for asked in QUESTIONS]
            if any(found[asked][measure] for asked in QUESTIONS):
                rows.append([name, NAMES.get(measure, measure), *cells])
    print_table(["run", "measure", *QUESTIONS], rows)


def ranks(metrics: Mapping[str, Any], source: str) -> Ranks:
    """The AUCs of one metrics/regime_w/dpo.json."""
    found: Ranks = {asked: {} for asked in QUESTIONS}
    try:
        over_wrong, over_lucky = metrics["correct_over_wrong"], metrics["sound_over_lucky"]
        for name in MEASURES:
            values = (over_wrong[name]["overall"], over_wrong[name]["within"], over_lucky[name])
            for asked, value in zip(QUESTIONS, values, strict=True):
                few = value.get("questions", FEWEST) < FEWEST
                found[asked][name] = None if few or value["auc"] is None else Auc(**value)
    except (KeyError, TypeError) as error:
        raise SystemExit(f"{source}: is no {LAST.regime_w} ({error!r})") from None
    return found


def cell(value: Auc | None) -> str:
    """`0.777 (0.753 to 0.802)`"""
    if value is None:
        return "–"
    interval = "" if value.low is None or value.high is None else f" ({value.low:.3f} to {value.high:.3f})"
    return f"{value.auc:.3f}{interval}"


def verdicts(runs: Mapping[str, Ranks]) -> list[str]:
    """Per run and question asked: which signals beat length and which do not.

    A signal beats length when its whole interval lies above what length reaches, read the better way round.
    """
    lines = []
    for name, found in runs.items():
        for asked, measured in found.items():
            bar = measured[BASELINE]
            if bar is None:
                lines.append(f"{name}, {asked}: nothing to compare")
                continue
            groups: dict[str, list[str]] = {}
            for measure, one in measured.items():
                if one is not None and measure != BASELINE:
                    groups.setdefault(against(one, bar.strength), []).append(NAMES.get(measure, measure))
            words = "; ".join(f"{word}: {', '.join(measures)}" for word, measures in groups.items())
            size = f"{bar.questions:,} questions, " if bar.questions else ""
            lines.append(f"{name}, {asked} ({size}length {bar.strength:.3f}): {words}")
    return lines


def against(one: Auc, bar: float) -> str:
    """How a signal's interval lies to what length reaches, read the better way round."""
    if one.low is None or one.high is None:
        return "above length, no interval" if one.auc > bar else "does not beat length, no interval"
    if one.low > bar:
        return "beats length"
    return "does not beat length" + (", nor a coin" if one.low <= 0.5 else "")


# ---- real groups ---------------------------------------------------------------------------------------


def run_groups(source: Path, place: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Coherence and preference on the example solutions in `place`; what came out, and the metrics."""
    make_workplace(place)
    rollouts, scored, pairs = place / "rollouts.jsonl", place / "scored.jsonl", place / "pairs.jsonl"
    write_jsonl(rollouts, groups_of_four(source))
    stage(place, "coherence", rollouts, scored)
    stage(place, "preference", scored, pairs)
    published = [row[model]["is_correct"] for row in example_solutions(source) for model in MODELS]
    records = list(read_jsonl(scored))
    rows = [row for record in records for row in record["trajectories"]]
    agree = Counter(
        row["arm"] for row, verdict in zip(rows, published, strict=True) if row["correct"] == verdict
    )
    made = list(read_jsonl(pairs))
    metrics = read_json(place / LAST.regime_w)
    summary = read_json(place / LAST.preference)
    not_shorter = summary["coherence"]["chosen_not_shorter"]
    facts = {
        "equations": f"{metrics['equations']['read']:,} read, {metrics['equations']['skipped']:,} skipped",
        "answers that agree with `is_correct`": ", ".join(
            f"{model} {agree[model]:,} of {len(records):,}" for model in MODELS
        ),
        "correct ones": ", ".join(f"{count:,} {kind}" for kind, count in metrics["soundness"].items()),
        "pairs": ", ".join(f"{summary[kind]['pairs']:,} {kind}" for kind in ("correctness", "coherence")),
        "coherence pairs whose chosen is not shorter": "–" if not_shorter is None else f"{not_shorter:.1%}",
        "pairs between identical texts": str(
            sum(pair["chosen"].strip() == pair["rejected"].strip() for pair in made)
        ),
    }
    return facts, metrics


def stage(place: Path, name: str, source: Path, out: Path) -> None:
    """`python -m stages NAME --rollouts SOURCE --out OUT` in `place`; its own message ends the bench."""
    command = [sys.executable, "-m", "stages", name, "--rollouts", str(source), "--out", str(out)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()}")
    note(done.stderr.strip())


# ---- the figure ----------------------------------------------------------------------------------------

PANEL, LABELS, TOP, ROW, RUN, MARGIN = 240, 80, 62, 20, 11, 24
LIGHT = ("#ffffff", "#1d2733", "#5b6876", "#d9dee5", ("#1f5fbf", "#c2410c", "#15803d", "#7c3aed"))
DARK = ("#14181d", "#e6eaef", "#a3adb8", "#333c47", ("#84b4ff", "#ff9d66", "#57c978", "#b79cff"))
SHAPES = (  # of up to four runs, told apart without colour too
    '<circle class="c0" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
    '<path class="c1" d="M{x:.1f} {y:.1f}m-4-4h8v8h-8z"/>',
    '<path class="c2" d="M{x:.1f} {y:.1f}m0-5l5 5-5 5-5-5z"/>',
    '<path class="c3" d="M{x:.1f} {y:.1f}m0-5l5 9h-10z"/>',
)


def colours(page: str, ink: str, soft: str, line: str, series: Sequence[str]) -> str:
    """The figure's CSS rules for one kind of page."""
    rules = [
        f".page {{ fill:{page} }} text {{ fill:{ink} }} .soft {{ fill:{soft} }} .grid {{ stroke:{line} }}"
    ]
    rules += [f".coin {{ stroke:{soft} }}"]
    rules += [f".c{index} {{ stroke:{colour}; fill:{colour} }}" for index, colour in enumerate(series)]
    return " ".join(rules)


STYLE = (
    "text { font:12px system-ui,sans-serif } .soft { font-size:11px } .bold { font-weight:600 } "
    ".coin { stroke-dasharray:4 3 } .range { stroke-width:3; stroke-linecap:round; opacity:.55 } "
    f"{colours(*LIGHT)} @media (prefers-color-scheme: dark) {{ {colours(*DARK)} }}"
)


def figure(runs: Mapping[str, Ranks]) -> str:
    """A panel per question asked: point and interval per measure and run, and the line of a coin at 0.5."""
    if len(runs) > len(SHAPES):
        raise SystemExit(f"the figure has room for {len(SHAPES)} runs, {len(runs)} were given")
    everything = [found[asked] for found in runs.values() for asked in QUESTIONS]
    shown = [measure for measure in MEASURES if any(measured[measure] for measured in everything)]
    known = [one for measured in everything for one in measured.values() if one]
    values = [v for one in known for v in (one.auc, one.low, one.high) if v is not None]
    low = math.floor(10 * min(0.45, *values)) / 10
    step = ROW + RUN * (len(runs) - 1)
    bottom = TOP + step * len(shown)
    width, height = LABELS + 3 * (PANEL + MARGIN), bottom + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="How well each measure ranks trajectories"><style>{STYLE}</style>'
        f'<rect class="page" width="{width}" height="{height}" rx="8"/>'
    ]
    legend = LABELS
    for index, name in enumerate(runs):
        parts.append(SHAPES[index].format(x=legend + 5, y=18))
        parts.append(f'<text x="{legend + 16}" y="22">{escape(name)}</text>')
        legend += 40 + 7 * len(name)
    for row, measure in enumerate(shown):
        y = TOP + step * row + step / 2 + 4
        parts.append(
            f'<text x="{LABELS - 10}" y="{y:.1f}" text-anchor="end">{NAMES.get(measure, measure)}</text>'
        )
    for column, asked in enumerate(QUESTIONS):
        left = LABELS + column * (PANEL + MARGIN)
        parts += panel(asked, left, low, bottom, [found[asked] for found in runs.values()], shown, step)
    note_text = "chance of ranking right, with 95 % interval; the dashed line is a coin (0.5)"
    parts.append(f'<text class="soft" x="{LABELS}" y="{height - 8}">{note_text}</text>')
    return "".join(parts) + "</svg>\n"


def panel(
    title: str,
    left: int,
    low: float,
    bottom: int,
    found: Sequence[Mapping[str, Auc | None]],
    shown: Sequence[str],
    step: int,
) -> list[str]:
    """The parts of one panel, from x = `left`; its axis goes from `low` to 1."""

    def at(value: float) -> float:
        return left + (value - low) / (1 - low) * (PANEL - 10)

    parts = [f'<text class="bold" x="{left}" y="{TOP - 14}">{escape(title)}</text>']
    for value in ticks(low, 1.0, 5):
        parts.append(f'<path class="grid" d="M{at(value):.1f} {TOP - 4}V{bottom}"/>')
        parts.append(
            f'<text class="soft" x="{at(value):.1f}" y="{bottom + 15}" text-anchor="middle">{value:.1f}</text>'
        )
    parts.append(f'<path class="coin" d="M{at(0.5):.1f} {TOP - 4}V{bottom}"/>')
    if not any(one for run in found for one in run.values()):
        parts.append(f'<text class="soft" x="{left + 8}" y="{TOP + 20}">nothing to compare</text>')
    for row, measure in enumerate(shown):
        for index, run in enumerate(found):
            one = run.get(measure)
            if one is None:
                continue
            y = TOP + step * row + step / 2 + RUN * (index - (len(found) - 1) / 2)
            words = f"{NAMES.get(measure, measure)}: {cell(one)}"
            parts.append(f"<g><title>{words}</title>")
            if one.low is not None and one.high is not None:
                span = f"M{at(one.low):.1f} {y:.1f}H{at(one.high):.1f}"
                parts.append(f'<path class="range c{index}" d="{span}"/>')
            parts.append(SHAPES[index].format(x=at(one.auc), y=y) + "</g>")
    return parts


if __name__ == "__main__":
    main()
